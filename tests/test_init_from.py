"""Runs that start from the weights of another model, and commands that take the model of another program."""

from pathlib import Path

import pytest
import torch
from conftest import Fit, points, weights

from lit_gpt import load_model
from lit_gpt.cli.export import main as export_main
from lit_gpt.cli.generate import main as generate_main

CONSTANT = ["--model.schedule", "constant", "--model.warmup_steps", 0]


def needs_transformers() -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install 'lit-gpt[hf]'")


def write_llama(folder: str) -> None:
    """Write a model of transformers with random weights."""
    needs_transformers()
    from test_hugging_face_import import write_theirs  # it imports transformers

    write_theirs(Path(folder), "Llama")


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_run_starts_from_the_weights_of_a_model(fit: Fit, source: str) -> None:
    if source == "folder":
        needs_transformers()
    assert fit("--name", "first", "--model.config.dropout", 0.1).status == 0
    start = "logs/first/version_0/last.ckpt"
    if source == "folder":
        assert export_main(["--ckpt_path", start, "--to", "hf", "model"]) == 0
        start = "model"
    result = fit("--model.init_from", start, "--trainer.max_steps", 2, *CONSTANT)
    assert result.status == 0, result.err
    assert f"starts from {start}" in result.out
    assert "before training; a uniform guess" in result.out
    trained, tokenizer, _ = load_model("logs/first/version_0/last.ckpt")
    again, same, _ = load_model("logs/small/version_0/last.ckpt")
    assert (again.config.d_model, again.config.dropout, same) == (trained.config.d_model, 0.0, tokenizer)
    first, second = (points(Path("logs", name, "version_0"))["loss/val"] for name in ("first", "small"))
    assert second[0] == (0, pytest.approx(first[-1][1], rel=1e-5))
    command = ["--model.init_from", start, "--name", "small", "--ckpt_path", "last", "--trainer.max_steps"]
    result = fit(*command, 3, *CONSTANT)
    assert result.status == 0, result.err
    assert "starts from" not in result.out
    Path(start).rename("moved")
    result = fit("--name", "small", "--ckpt_path", "last", "--trainer.max_steps", 4, *CONSTANT, config=None)
    assert result.status == 0, result.err


def test_imported_model_is_validated_generates_and_starts_a_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    write_llama("theirs")
    result = fit("validate", "--ckpt_path", "theirs", config=None)
    assert result.status == 2
    assert "theirs comes without a text: give --data.files, the text to validate it on" in result.err
    result = fit("validate", "--ckpt_path", "theirs")
    assert result.status == 0, result.err
    assert "model       theirs" in result.out
    assert generate_main(["--ckpt_path", "theirs", "one fish", "--max_new_tokens", "3"]) == 0
    assert "one fish" in capsys.readouterr().out
    assert generate_main(["--ckpt_path", "theirs", "--novel"]) == 2
    assert "--novel needs the training text, which theirs does not state" in capsys.readouterr().err
    short = ["--model.config.context_length", 16, "--model.learning_rate", 1e-9, "--trainer.max_steps", 1]
    result = fit("--model.init_from", "theirs", *short, *CONSTANT)
    assert result.status == 0, result.err
    source, ours = load_model("theirs")[0].state_dict(), weights(Path("logs/small/version_0/last.ckpt"))
    for name, value in source.items():
        torch.testing.assert_close(ours[f"gpt.{name}"], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.init_from", "theirs", "--model.config.d_model", 64], "d_model 32 there, 64 here"),
        (
            ["--model.init_from", "theirs", "--data.tokenizer", "byte"],
            "--data.tokenizer byte: the model of --model.init",
        ),
        (["--model.init_from", "nothing"], "nothing"),
        (["--model.init_from", "theirs", "--ckpt_path", "x.ckpt"], "both say where the weights are"),
        (["--model.init_from", "theirs", "--budget", "1m"], "--budget 1m chooses settings for a new model"),
        (["--ckpt_path", "theirs"], "no run can resume: give --model.init_from theirs"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_the_start_are_refused(fit: Fit, flags: list[object], message: str) -> None:
    write_llama("theirs")
    result = fit(*flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert not Path("logs").exists()


def test_run_that_makes_its_model_worse_says_so(fit: Fit) -> None:
    assert fit("--name", "first").status == 0
    start = ["--model.init_from", "logs/first/version_0/last.ckpt", "--trainer.max_steps", 2, *CONSTANT]
    assert "warning     loss/val was lower before training" in fit(*start, "--model.learning_rate", 1).out
    assert "was lower before training" not in fit(*start, "--model.learning_rate", 1e-4).out


def test_file_of_a_tokenizer_that_is_none_is_refused(fit: Fit) -> None:
    Path("x.json").write_text('{"name": "unknown"}', encoding="utf-8")
    result = fit("--data.tokenizer", "x.json")
    assert result.status == 2
    assert "x.json has no tokenizer of lit_gpt" in result.err
