"""Print rows of values as a table, or as JSON lines."""

import json
from collections.abc import Iterable
from typing import Any


def print_rows(rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Prints rows under the names of their values; or each as JSON, as soon as it is there."""
    if as_json:
        for row in rows:
            print(json.dumps(row), flush=True)
        return
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys] + [[f"{row[key]:.4f}" if key == "loss" else _cell(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
