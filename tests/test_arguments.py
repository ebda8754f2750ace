"""Tests of how configs and flags are combined, and of the errors that `lit_gpt.cli.arguments` and the parser find."""

from pathlib import Path

import pytest
from conftest import DEFAULT, Fit
from user_errors import OVERLAY, Case, check_case, check_case_on_two_ranks, write

from lit_gpt.cli.arguments import CommandLine

CONFIGS: dict[str, Case] = {
    "missing file": Case(["--config", "smal.yaml"], "--config smal.yaml: no such file (did you mean 'small.yaml'?)"),
    "no file given": Case(["--config"], "--config names no file"),
    "empty file": Case(OVERLAY, "overlay.yaml has no settings", write("", "overlay.yaml")),
    "invalid YAML": Case(OVERLAY, "correct the YAML", write("trainer: [\n", "overlay.yaml")),
    "binary file": Case(OVERLAY, "overlay.yaml is not YAML in UTF-8", write("\x00", "overlay.yaml")),
    "list as key": Case(OVERLAY, "overlay.yaml is not YAML in UTF-8", write("? [a, b]\n: 1\n", "overlay.yaml")),
    "duplicate key": Case(
        OVERLAY,
        "overlay.yaml line 3: key 'max_steps' is given twice",
        write("trainer:\n  max_steps: 1\n  max_steps: 2\n", "overlay.yaml"),
    ),
    "unknown key": Case(
        OVERLAY,
        "unknown key model.config.d_modle (did you mean",
        write("model: {config: {d_modle: 8}}", "overlay.yaml"),
    ),
    "linked setting": Case(
        OVERLAY,
        "data.context_length follows from model.config.context_length",
        write("data: {context_length: 8}", "overlay.yaml"),
    ),
    "dotted key": Case(
        OVERLAY, "overlay.yaml: data.seed: write it as data: seed, key below key", write("data.seed: 8", "overlay.yaml")
    ),
    "null setting": Case(
        OVERLAY, "--data.batch_size null: give a value", write("data: {batch_size: null}", "overlay.yaml")
    ),
    "null section": Case(
        OVERLAY, "overlay.yaml: generate is None: write its settings below it", write("generate: null", "overlay.yaml")
    ),
    "section is a list": Case(
        OVERLAY, "trainer is [{'max_steps': 3}]: write its", write("trainer:\n  - max_steps: 3\n", "overlay.yaml")
    ),
    "null name": Case(
        OVERLAY,
        "--name None: use only letters, digits and ._-",
        write("name:\ntrainer: {max_steps: 3}\n", "overlay.yaml"),
    ),
    "null timeout": Case(
        OVERLAY, "--timeout null: give a value, or leave it out", write("timeout:\nname: x\n", "overlay.yaml")
    ),
    "null timeout alone": Case(
        OVERLAY, "--timeout null: give a value, or leave it out", write("timeout:\n", "overlay.yaml")
    ),
    "section below a section is a list": Case(
        OVERLAY, "overlay.yaml: model.config is [1]: write its", write("model: {config: [1]}", "overlay.yaml")
    ),
    "NUL in a text": Case(
        OVERLAY, "--data.files contains a NUL character", write('data: {files: "a\\0b"}', "overlay.yaml")
    ),
    "value that does not fit its tag": Case(
        OVERLAY, "overlay.yaml is not YAML in UTF-8", write("timeout: !!bool x", "overlay.yaml")
    ),
    "text for a switch": Case(
        OVERLAY, "--preflight x: give true, false or no value", write("preflight: x", "overlay.yaml")
    ),
    "null Trainer argument": Case(
        OVERLAY, "--trainer.overfit_batches null: give", write("trainer: {overfit_batches: }", "overlay.yaml")
    ),
    "recursive alias": Case(
        OVERLAY, "line 2: aliases (*a) are not supported: write", write("trainer: &a\n  x: *a\n", "overlay.yaml")
    ),
    "merge key": Case(
        OVERLAY,
        "merge keys (<<) are not supported",
        write("trainer:\n  <<: {max_steps: 3}\n", "overlay.yaml"),
    ),
    "ckpt_path last in config": Case(
        OVERLAY, "give it as a flag, --ckpt_path last", write("ckpt_path: last", "overlay.yaml")
    ),
}
FLAGS: dict[str, Case] = {
    "unknown flag": Case(
        ["--trainer.max_step", "3"], "unknown flag --trainer.max_step (did you mean 'trainer.max_steps'?)"
    ),
    "single dash": Case(["-ckpt_path", "last"], "-ckpt_path: a flag has two dashes"),
    "value for a section": Case(["--trainer", "{max_steps: 3}"], "--trainer takes no value of its own"),
    "unexpected word": Case(["--data.files", "a.csv", "b.csv"], "unexpected word 'b.csv'"),
    "wrong type": Case(["--trainer.max_steps", "many"], "--trainer.max_steps many: give int"),
    "unknown choice": Case(
        ["--model.config.mlp", "geglu"], "--model.config.mlp geglu: give one of swiglu, gelu, gelu_tanh, relu, relu2"
    ),
    "linked setting": Case(["--model.config.vocab_size", "9"], "model.config.vocab_size follows from the tokenizer"),
    "empty value": Case(["--data.batch_size", ""], "--data.batch_size"),
    "seed not a number": Case(["--seed_everything", "true"], "--seed_everything True: give int"),
    "unknown precision": Case(["--trainer.precision", "12"], "--trainer.precision"),
    "name with a slash": Case(["--name", "a/b"], "--name 'a/b': use only letters, digits and ._-"),
    "name of dots only": Case(["--name", ".."], "--name '..': use only letters, digits and ._-"),
    "name too long": Case(["--name", "a" * 300], "at most 100 of them"),
    "wrong type of two": Case(["--trainer.max_epochs", "true"], "--trainer.max_epochs true: give int, null"),
    "dash": Case(["--trainer.benchmark", "-"], "--trainer.benchmark -: give bool, null"),
    "blank": Case(["--model.compile", " "], "--model.compile ' ': give bool"),
    "null": Case(["--timeout", "null"], "--timeout None: give int"),
    "long value": Case(["--trainer.logger", "x" * 5000], f"--trainer.logger {'x' * 79}…: give Logger, bool, null"),
    "long value of another program": Case(["--trainer.strategy", "x" * 5000], f"strategy='{'x' * 100}"),
    "thousands of digits": Case(["--model.weight_decay", "9" * 5000], "--model.weight_decay: a number of thousands of"),
    "more than 64 bits": Case(
        ["--trainer.reload_dataloaders_every_n_epochs", "9" * 400],
        "--trainer.reload_dataloaders_every_n_epochs is a number of more than 64 bits",
    ),
    "infinite number": Case(["--early_stopping.min_delta", ".inf"], "--early_stopping.min_delta is inf: give a finite"),
    "step of too many tokens": Case(
        ["--trainer.accumulate_grad_batches", "2147483647"],
        "accumulate_grad_batches 2147483647 gives an optimizer step of 137,438,953,408 tokens: give fewer batches",
    ),
    "path too long": Case(["--ckpt_path", "9" * 5000], ": File name too long: give a shorter path"),
    "argument of no class": Case(
        ["--trainer.callbacks.init_args.x", "1"], "--trainer.callbacks.x: give --trainer.callbacks CLASS"
    ),
    "auto and a wrong type": Case(
        ["--ckpt_path", "auto", "--trainer.max_steps", "many"], "--trainer.max_steps many: give int"
    ),
    "last of an invalid name": Case(["--ckpt_path", "last", "--name", "../x"], "--name '../x': use only letters"),
}


@pytest.mark.parametrize("case", CONFIGS.values(), ids=CONFIGS)
def test_wrong_config_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


@pytest.mark.parametrize("case", FLAGS.values(), ids=FLAGS)
def test_wrong_flag_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


def test_wrong_config_on_two_ranks_is_reported_once(folder: Path) -> None:
    check_case_on_two_ranks(folder, CONFIGS["unknown key"])


@pytest.mark.parametrize(
    ("args", "completed"),
    [
        ([], ["fit", f"--config={DEFAULT}"]),
        (["--data.files", "a.csv"], ["fit", "--data.files", "a.csv"]),
        (["--data.files=a.csv"], ["fit", "--data.files=a.csv"]),
        (["fit", "--a", "1", "-c", "small.yaml"], ["fit", "--config=small.yaml", "--a", "1"]),
        (
            ["--a=1", "-csmall.yaml", "--config=small.yaml"],
            ["fit", "--config=small.yaml", "--config=small.yaml", "--a=1"],
        ),
        (["--ckpt_path", "auto", "--a", "1"], ["fit", f"--config={DEFAULT}", "--a", "1"]),
    ],
    ids=["nothing", "files", "files in one word", "command and config", "two configs", "no checkpoint"],
)
def test_command_line_is_completed(folder: Path, args: list[str], completed: list[str]) -> None:
    assert CommandLine(args, DEFAULT).args == completed


def test_resume_args_leave_out_flags_of_one_command(folder: Path) -> None:
    once = ["--name", "mine", "--allow_data_change=true", "--trainer.default_root_dir", "runs", "--ckpt_path=auto"]
    command_line = CommandLine(["fit", *once, "--a", "1", "--config", "small.yaml", "--b=2"], DEFAULT)
    assert command_line.resume_args == ["--config=small.yaml", "--a", "1", "--b=2"]
    assert command_line.root_dir == "runs"
    assert command_line.notice == "no checkpoint of 'mine' under runs: starting from the beginning"


def test_run_name_is_file_name_of_first_config_with_allowed_characters(folder: Path) -> None:
    Path("my poems.v2.yaml").write_text("name: other\n", encoding="utf-8")
    assert CommandLine(["--config", "my poems.v2.yaml", "--config", "small.yaml"], DEFAULT).run_name == "my_poems.v2"
    assert CommandLine([], DEFAULT).run_name == "default"
    assert CommandLine(["--seed_everything", "1"], DEFAULT).given_args == ["fit", "--seed_everything", "1"]
