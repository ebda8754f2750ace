"""What a run leaves for a reader: summary.json, report.html, and the curves in its event files."""
