"""Every pair of data.* settings is refused, or both have an effect: none is accepted and then ignored."""

import base64
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lit_gpt.data import datamodule
from lit_gpt.data.config import SPLITS
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError

# Values that differ from the default. A new setting has to get one here.
VALUES: dict[str, list[Any]] = {
    "files": ["other"],
    "mode": ["raw"],
    "format": ["tsv", "txt"],
    "columns": ["c3"],
    "template": ["{c2}-{c3}"],
    "delimiter": [";"],
    "quote": ["none"],
    "header": [False],
    "skip_rows": [1],
    "encoding": ["cp1252"],
    "tokenizer": ["small.tiktoken", "bpe"],
    "vocab": ["full"],
    "vocab_size": [260],
    "context_length": [6],
    "batch_size": [2],
    "global_batch_size": [8],
    "sampling": ["shuffled"],
    "val_fraction": [0.4],
    "test_fraction": [0.2],
    "val_files": ["val"],
    "test_files": ["test"],
    "split_seed": [5],
    "split_column": ["c4"],
    "group_column": ["c5"],
    "dedupe": [True],
    "document_mask": [True],
    "eval_windows": [3],
    "num_workers": [1],
    "seed": [7],
}
WITHOUT_EFFECT = {"num_workers": "other processes prepare the same batches"}
READING = (  # settings whose pairs are tested for every format
    *("files", "mode", "format", "columns", "template", "delimiter", "quote", "header", "skip_rows", "encoding"),
    *("val_files", "split_column", "group_column"),
)
WORLDS: dict[str, dict[str, Any]] = {  # the suffix of the files, and the settings without the pair
    "csv": {"columns": "c2"},
    "raw": {"mode": "raw"},
    "txt": {},
    "jsonl": {"columns": "c2"},
    "parquet": {"columns": "c2"},
}
BASE = {"context_length": 4, "batch_size": 4, "tokenizer": "byte"}


def make_records(name: str) -> list[dict[str, str]]:
    """Return rows with quotes, letters that are not ASCII, duplicates, splits and groups."""
    records = []
    for number in range(40):
        text = f'"{name} caf\u00e9 {number % 30}"'
        group, split = f"group {number % 13}", SPLITS[number % 3]
        records.append({"c3": f'"title {name} {number % 30}"', "c2": text, "c4": split, "c5": group})
    return records + records[:5]


def table_line(fields: list[str]) -> str:
    """Return a line of fields between semicolons, others between tabs, and others between commas."""
    semicolons, tabs = ([field.replace("caf", word).replace("title", word) for field in fields] for word in ("s", "t"))
    return ";".join(["a", *semicolons, "b"]) + "\t" + "\t".join([*tabs, "c"]) + "," + ",".join([*fields, "d"])


def write_files(folder: Path, world: str) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"ma", b"in", b"th", b"te", b"va"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "small.tiktoken").write_text("".join(lines), encoding="utf-8")
    for name in ("main", "other", "val", "test"):
        records, path = make_records(name), folder / f"{name}.{'csv' if world == 'raw' else world}"
        if world == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        elif world == "jsonl":
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        else:  # two headers, for skip_rows
            rows = [["c3", "c2", "c4", "c5"], ["c2", "c3", "c4", "c5"], *(list(row.values()) for row in records)]
            path.write_text("".join(table_line(row) + "\n" for row in rows), encoding="utf-8")


def outcome(world: str, folder: Path, pair: dict[str, Any]) -> Any:
    """Return all that follows from some settings beside those of a world; None if they are refused."""
    suffix = "csv" if world == "raw" else world
    settings = {"files": "main", **BASE, **WORLDS[world], **pair}
    if "template" in pair and "columns" not in pair:
        settings.pop("columns", None)
    for name in ("files", "val_files", "test_files"):
        if name in settings:
            settings[name] = str(folder / f"{settings[name]}.{suffix}")
    if "small" in settings["tokenizer"]:
        settings["tokenizer"] = str(folder / settings["tokenizer"])
    try:
        data = TextDataModule(**settings)
        report = {key: value for key, value in data.corpus.report.items() if key != "files"}
        report["encodings"] = [file["encoding"] for file in data.corpus.report["files"]]
        batch = [tensor.tolist() for tensor in data.get_batch("train")]
        evaluated = [[tensor.tolist() for tensor in loader.dataset[0]] for loader in data.val_dataloader()]
        counts = [len(loader) for loader in data.val_dataloader()]
        ids = [np.asarray(data.corpus.split(split)).tolist() for split in SPLITS]
        return json.dumps(
            [report, ids, data.tokenizer.vocab_size, batch, evaluated, counts, list(vars(data.plan).items())]
        )
    except UserError:
        return None


@pytest.fixture
def quick_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datamodule, "CACHE", tmp_path / "cache")
    return


def test_every_setting_has_a_value() -> None:
    assert list(VALUES) == list(inspect.signature(TextDataModule).parameters)


@pytest.mark.usefixtures("quick_cache")
@pytest.mark.parametrize("world", WORLDS)
def test_every_pair_of_settings_is_refused_or_has_both_effects(world: str, tmp_path: Path) -> None:
    write_files(tmp_path, world)
    base = {**BASE, **WORLDS[world]}
    settings = [(name, value) for name, values in VALUES.items() for value in values]
    given = [
        (name, value) for name, value in settings if base.get(name) != value and (name, value) != ("format", world)
    ]
    alone = {setting: outcome(world, tmp_path, dict([setting])) for setting in given}
    default = outcome(world, tmp_path, {})
    assert default is not None
    ignored = [setting for setting in given if alone[setting] == default and setting[0] not in WITHOUT_EFFECT]
    refused, effective = 0, 0
    for first, second in itertools.combinations(given, 2):
        is_reading = first[0] in READING and second[0] in READING
        if first[0] == second[0] or not (is_reading or world in ("csv", "raw")):
            continue
        both = outcome(world, tmp_path, dict([first, second]))
        refused += both is None
        effective += both is not None
        for setting, other in ((first, second), (second, first)):
            if both is not None and both == alone[other] and setting[0] not in WITHOUT_EFFECT:
                ignored.append((setting, "beside", other))
    print(f"{world}: {refused + effective} pairs, {refused} refused, {effective} with both effects")
    assert not ignored
