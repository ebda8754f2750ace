"""The lines about the data that several commands print."""

from collections import Counter
from typing import Any

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.sources import Source

MAX_LISTED_FILES = 3
MANY_TOKENS_PER_CHARACTER = 1.3


def encoding_lines(files: list[dict[str, Any]]) -> list[str]:
    """Return the lines about the files that are not UTF-8, and about guesses; the guesses first.

    Args:
        files: The files of a corpus, as in its report.
    """
    files = [file for file in files if not file["sure"] or not _is_utf8(file["encoding"])]
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


def hint_lines(report: dict[str, Any], config: CorpusConfig, sources: list[Source]) -> list[str]:
    """Return the lines about settings that may not be what a person wants for this text.

    Args:
        report: The report of a corpus.
        config: The settings of the corpus.
        sources: All files.
    """
    lines, options = [], config.read_options
    if options.mode == "rows" and any(options.suffix_of(source) == ".txt" for source in sources):
        lines.append("hint        each line of a .txt file is a document; --data.mode raw reads it as one text")
    end_tokens = report["documents"] if options.mode == "rows" else 0
    rate = (report["tokens"] - end_tokens) / report["characters"]
    if rate > MANY_TOKENS_PER_CHARACTER and not config.tokenizer.endswith(".json"):  # such a file belongs to a model
        others = " or ".join(name for name in ("bpe", "char") if name != config.tokenizer)
        lines.append(
            f"hint        {rate:.2f} tokens a character are many; with --data.tokenizer {others} more text fits into a "
            "context; scripts/prepare.py --compare shows how much"
        )
    return lines


def duplicates_warning(report: dict[str, Any]) -> str | None:
    """Return a warning if documents outside the training split have the text of a training document."""
    across, documents = report["duplicates_across"], {name: part["documents"] for name, part in report["parts"].items()}
    if not across:
        return None
    held_out = documents["val"] + documents["test"]
    names = "validation and test" if documents["test"] else "validation"
    return (
        f"{across:,} of {held_out:,} {names} documents ({across / held_out:.1%}) are also training documents, so that "
        "their loss says little about new text: give --data.dedupe true"
    )


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
