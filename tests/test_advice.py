"""No message advises a setting that has that value already."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.readers import (
    RejectedRow,
    check_settings_have_effect,
    open_rows,
    open_text_chunks,
    with_detected_encoding,
)
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet", ".docx", "")
CONTENTS = {
    "empty": b"",
    "bytes": b"text\n" + b"fine\n" * 20 + b"caf\xe9\n",
    "utf-8": "text\ncafé 床前明月光\n".encode() * 20 + b"caf\xe9\n",
    "chinese": "text\n床前明月光\n疑是地上霜\n".encode("gb18030"),
    "utf-16": "text\nfine\n".encode("utf-16-le"),
    "quotes": b'text\n"open\nfine\n"a"b\n',
    "commas": b"id,text\n1,a,b\n",
    "semicolons": b"id;text\n1;a;b\n",
    "tabs": b"id\ttext\n1\ta\tb\n",
    "sep": b"sep=;\nid;text\n1;a;b\n",
    "json": b'{"text": 1}\n[]\n{"text": "\\ud83d"}\n',
    "binary": bytes(range(256)) * 4,
}
SETTINGS: dict[str, list[Any]] = {
    "mode": ["raw"],
    "format": ["csv", "tsv", "txt", "jsonl", "parquet"],
    "encoding": ["utf-8", "gb18030", "utf-16"],
    "delimiter": [",", ";", "\\t"],
    "quote": ["none", ";"],
    "header": [False],
    "columns": [("text",)],
    "skip_rows": [1, 9],
    "split_key_column": ["split"],
}


def messages(source: Source, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what is said about a file, each with the settings as they are in use then."""
    found: list[tuple[str, dict[str, Any]]] = []
    in_use = settings
    try:
        options = ReadOptions(**settings)
        in_use = vars(options)
        check_settings_have_effect([source], options)
        options, _ = with_detected_encoding(source, options)
        in_use = vars(options)
        if options.mode == "raw":
            with open_text_chunks(source, options) as (chunks, _):
                found += [(row.reason, in_use) for chunk in chunks for row in chunk.rejected]
        else:
            with open_rows(source, options) as (rows, _):
                found += [(row.reason, in_use) for row in rows if isinstance(row, RejectedRow)]
    except UserError as error:
        found.append((str(error), in_use))
    return found


@pytest.mark.parametrize("content", CONTENTS)
def test_advice_is_not_in_use_already(content: str, tmp_path: Path) -> None:
    singles = [{name: value} for name, values in SETTINGS.items() for value in values]
    pairs = [first | second for first, second in itertools.combinations(singles, 2)]
    defaults = vars(ReadOptions())
    num_advised = 0
    for suffix in SUFFIXES:
        (tmp_path / f"t{suffix}").write_bytes(CONTENTS[content])
        for settings in [{}, *singles, *pairs[len(suffix) :: 4]]:
            for message, in_use in messages(Source(str(tmp_path / f"t{suffix}")), settings):
                advice = message.rpartition(": ")[2]
                for name, value in re.findall(r"--data\.(\w+) ('[^']*'|\S+)", advice):
                    num_advised += 1
                    advised = value.strip("'\",;:()")
                    assert advised not in (str(in_use.get(name)), str((defaults | settings).get(name))), (
                        message,
                        settings,
                    )
    assert content == "empty" or num_advised > 20
