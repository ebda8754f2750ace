"""The lines about the data that several commands print."""

from collections import Counter
from typing import Any

MAX_LISTED_FILES = 3


def encoding_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines about the files that are not UTF-8, and about guesses; the guesses first.

    Args:
        report: The report of a corpus.
    """
    files = [file for file in report["files"] if not file["sure"] or not _is_utf8(file["encoding"])]
    files.sort(key=lambda file: file["sure"])
    lines: list[str] = []
    for file in files[:MAX_LISTED_FILES]:
        lines += _describe_encoding(file)
    rest = files[MAX_LISTED_FILES:]
    if rest:
        counts = Counter(file["encoding"] for file in rest)
        guesses = sum(not file["sure"] for file in rest)
        lines.append(
            f"            and {len(rest):,} more: {', '.join(f'{count:,} {name}' for name, count in counts.items())}"
            + (f"; {guesses:,} of them are guesses" if guesses else "")
        )
    return lines


def _describe_encoding(file: dict[str, Any]) -> list[str]:
    """Return the line about the encoding of one file; of a guess also what it reads, and what to do if it is wrong."""
    if file["sure"]:
        return [f"encoding    {file['encoding']}: {file['name']}"]
    other = file["runner_up"] or "another one"
    return [
        f"encoding    {file['encoding']}, a guess: {file['name']}",
        *(f"            {example}" for example in file["examples"]),
        f"            if this is misread, give --data.encoding {other}, or the right one",
    ]


def _is_utf8(encoding: str) -> bool:
    return encoding.lower().replace("_", "-") in ("utf-8", "utf8", "utf-8-sig")
