"""A flag or a later config replaces what stands for the same in an earlier config."""

from pathlib import Path
from typing import Any

import pytest
from conftest import DEFAULT, Fit
from test_text_settings import parse
from user_errors import assert_user_error

from lit_gpt.cli.exclusive_settings import DECIDING, GROUPS, remove_replaced

VALUES: dict[str, Any] = {
    "data.columns": "text",
    "data.template": "{text}",
    "data.split_column": "part",
    "data.split_seed": 3,
    "data.group_column": "author",
    "data.val_fraction": 0.2,
    "data.test_fraction": 0.3,
    "data.val_files": "val.csv",
    "data.test_files": "test.csv",
    "data.global_batch_size": 32,
    "trainer.accumulate_grad_batches": 2,
    "trainer.check_val_every_n_epoch": 2,
    "trainer.val_check_interval": 50,
    "trainer.max_steps": 77,
    "trainer.max_epochs": 3,
}
DEFAULTS = dict.fromkeys([*VALUES, *DECIDING]) | {"data.tokenizer": "cl100k_base", "data.test_fraction": 0.0}
PAIRS = [pair for side, other in GROUPS for a in side for b in other for pair in ((a, b), (b, a))]


def make_config(*keys: str) -> dict[str, Any]:
    config: dict[str, Any] = {"model": {"dropout": 0.1}}
    for section, name in (key.split(".") for key in keys):
        config.setdefault(section, {})[name] = VALUES[f"{section}.{name}"]
    return config


@pytest.mark.parametrize(("earlier", "later"), PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_later_setting_replaces_the_earlier_one(earlier: str, later: str) -> None:
    no_steps = [{"trainer": {"max_steps": -1}}] if later == "trainer.max_epochs" else []
    configs = [make_config(earlier)]
    remove_replaced(configs, {later: str(VALUES[later])}, DEFAULTS)
    assert configs == [*no_steps, make_config()]
    configs = [make_config(earlier), make_config(later)]
    remove_replaced(configs, {}, DEFAULTS)
    assert configs == [*no_steps, make_config(), make_config(later)]


@pytest.mark.parametrize(("earlier", "later"), PAIRS, ids=[" ".join(pair) for pair in PAIRS])
def test_default_and_null_replace_nothing(earlier: str, later: str) -> None:
    configs = [make_config(earlier), make_config(later)]
    remove_replaced(configs, {earlier: "null"}, {**DEFAULTS, later: VALUES[later]})
    assert configs == [make_config(earlier), make_config(later)]


def test_two_settings_in_one_place_stay(folder: Path) -> None:
    configs = [make_config("data.columns", "data.template"), make_config("trainer.max_steps", "trainer.max_epochs")]
    expected = [dict(config) for config in configs]
    remove_replaced(configs, {}, DEFAULTS)
    assert configs == expected


@pytest.mark.parametrize(
    ("deciding", "unused", "used"),
    [
        ({"tokenizer": "byte"}, {"vocab": "full", "vocab_size": 500}, {}),
        ({"tokenizer": "char"}, {"vocab": "full"}, {}),
        ({"tokenizer": "bpe"}, {"vocab": "full"}, {"vocab_size": 500}),
        ({"tokenizer": "cl100k_base"}, {"vocab_size": 500}, {"vocab": "full"}),
        ({"mode": "raw"}, {"columns": "a", "delimiter": ";", "format": "csv", "header": False, "dedupe": True}, {}),
        ({"mode": "raw"}, {"template": "{a}", "quote": "'", "split_seed": 3, "group_column": "a"}, {"skip_rows": 2}),
        ({"mode": "raw"}, {"split_column": "a"}, {"encoding": "cp1252"}),
        ({"mode": "rows"}, {}, {"columns": "a", "format": "csv", "dedupe": True}),
        ({"format": "txt"}, {"columns": "a", "delimiter": ";", "header": False, "group_column": "a"}, {"skip_rows": 2}),
        ({"format": "tsv"}, {"delimiter": ";"}, {"columns": "a", "quote": "'"}),
        ({"format": "jsonl"}, {"delimiter": ";", "quote": "'"}, {"columns": "a", "encoding": "cp1252"}),
        ({"format": "parquet"}, {"skip_rows": 1, "encoding": "cp1252"}, {"columns": "a", "split_column": "b"}),
        ({"val_files": "v.csv"}, {"split_seed": 3, "group_column": "a"}, {"columns": "a"}),
        ({"val_files": "v.csv"}, {}, {"split_seed": 3, "test_fraction": 0.2}),
        ({"test_files": "t.csv"}, {}, {"split_seed": 3}),
        ({"test_files": "t.csv"}, {"test_fraction": 0.2, "split_seed": 3}, {"val_files": "v.csv"}),
    ],
)
def test_later_setting_removes_what_has_no_effect_beside_it(
    deciding: dict[str, Any], unused: dict[str, Any], used: dict[str, Any]
) -> None:
    expected = [{"data": used}] if used else [{}]
    flags = {f"data.{name}": value for name, value in deciding.items()}
    configs = [{"data": unused | used}]
    remove_replaced(configs, flags, DEFAULTS)
    assert configs == expected
    configs = [{"data": unused | used}, {"data": deciding}]
    remove_replaced(configs, {}, DEFAULTS)
    assert configs == [*expected, {"data": deciding}]
    together = [{"data": unused | used | deciding}]
    remove_replaced(together, {}, DEFAULTS)
    assert together == [{"data": unused | used | deciding}]
    earlier = [{"data": deciding}, {"data": unused | used}]
    if "test_fraction" not in unused:  # this one replaces `test_files`
        remove_replaced(earlier, {}, DEFAULTS)
        assert earlier == [{"data": deciding}, {"data": unused | used}]


def test_only_the_setting_that_wins_removes_others() -> None:
    configs = [{"data": {"vocab": "full"}}, {"data": {"tokenizer": "byte"}}]
    remove_replaced(configs, {"data.tokenizer": "gpt2"}, DEFAULTS)
    assert configs == [{"data": {"vocab": "full"}}, {"data": {"tokenizer": "byte"}}]


def test_tokenizer_removes_the_vocabulary_of_a_config(folder: Path) -> None:
    settings = parse("--config", str(DEFAULT.with_name("course.yaml")), "--data.tokenizer", "byte")
    assert (settings.data.tokenizer, settings.data.vocab) == ("byte", "pruned")


def test_setting_that_a_later_null_takes_back_replaces_nothing() -> None:
    for taken_back in ([], [{"data": {"template": None}}]):
        configs = [make_config("data.columns"), make_config("data.template"), *taken_back]
        remove_replaced(configs, {} if taken_back else {"data.template": None}, DEFAULTS)
        assert configs == [make_config("data.columns"), make_config("data.template"), *taken_back]
    configs = [make_config("trainer.max_steps"), make_config("trainer.max_epochs")]
    remove_replaced(configs, {"trainer.max_epochs": "null"}, DEFAULTS)
    assert configs == [make_config("trainer.max_steps"), make_config("trainer.max_epochs")]


def test_epochs_replace_the_default_number_of_steps(folder: Path) -> None:
    settings = parse("--trainer.max_epochs", "3")
    assert (settings.trainer.max_steps, settings.trainer.max_epochs) == (-1, 3)
    settings = parse("--trainer.max_epochs", "3", "--trainer.max_steps", "9")
    assert (settings.trainer.max_steps, settings.trainer.max_epochs) == (9, 3)
    assert parse("--trainer.max_epochs=-1").trainer.max_steps == 1000


def test_template_replaces_the_columns_of_a_saved_config(fit: Fit) -> None:
    Path("t.csv").write_text("title,text\n" + "".join(f"t{i},some text {i}\n" for i in range(60)), encoding="utf-8")
    table = ["--data.files", "t.csv", "--trainer.max_steps", 1]
    assert fit(*table, "--data.columns", "text").status == 0
    saved = "logs/small/version_0/config.yaml"
    data = parse("--config", saved, "--data.template", "{title}: {text}").data
    assert (data.columns, data.template) == (None, "{title}: {text}")
    both = ["--data.columns", "text", "--data.template", "{text}"]
    assert_user_error(fit(*both, config=saved), "--data.columns and --data.template both choose the columns")
    validated = fit("validate", "--name", "small", "--data.template", "{text}", config=None)
    assert validated.status == 0, validated.err
