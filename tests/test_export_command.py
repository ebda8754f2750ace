"""scripts/export.py: what it writes, says and refuses, with the target Hugging Face."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Fit

from lit_gpt.cli.export import main
from lit_gpt.convert import hugging_face
from lit_gpt.convert.parity import ParityError

pytest.importorskip("transformers", reason="needs transformers: pip install 'lit-gpt[hf]'")

LAST = "logs/small/version_0/last.ckpt"
ONE_STEP = ["--trainer.max_steps", 1, "--trainer.limit_val_batches", 0]


def names() -> set[str]:
    return {path.name for path in Path().iterdir()}


def test_export_says_what_was_compared_and_leaves_one_folder(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*ONE_STEP).status == 0
    before = names()
    assert main(["--name", "small", "--to", "hf", "a/model", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    assert "compared    10,000 strings encoded equally; logits of" in printed.out
    assert "bfloat16: a/model" in printed.out
    assert "the training text is not here" not in printed.err
    assert names() == before | {"a"}
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in Path("a/model").iterdir()} == files | {"tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in Path("a").iterdir()] == ["model"]


def test_export_without_the_training_text_compares_on_the_texts_of_the_model(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*ONE_STEP).status == 0
    Path("rows.txt").write_text("another text\n" * 99, encoding="utf-8")
    assert main(["--ckpt_path", LAST, "--to", "hf", "model"]) == 0
    assert "the training text is not here: comparing on texts that the model writes" in capsys.readouterr().err


def test_difference_leaves_nothing_behind(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*args: Any) -> float:
        raise ParityError("the logits of the exported model differ")

    assert fit(*ONE_STEP).status == 0
    before = names()
    monkeypatch.setattr(hugging_face, "compare_logits", differs)
    assert main(["--ckpt_path", LAST, "--to", "hf", "model"]) == 2
    assert "the logits of the exported model differ" in capsys.readouterr().err
    assert names() == before


def test_shape_without_an_architecture_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--model.config.previous_tokens", 1, "--model.config.norm", "layernorm"]
    assert fit(*ONE_STEP, *shape).status == 0
    before = names()
    assert main(["--ckpt_path", LAST, "--to", "hf", "a/b/model"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.config.previous_tokens is 1, model.config.qk_norm is true with norm layernorm" in error
    assert names() == before


def test_path_that_cannot_be_used_is_refused_and_unchanged(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*ONE_STEP).status == 0
    Path("link").symlink_to("nowhere")
    for path, message in {
        "link": "link already exists",
        "rows.txt/model": "rows.txt/model cannot be written (Not a directory): give",
    }.items():
        assert main(["--ckpt_path", LAST, "--to", "hf", path]) == 2
        assert message in capsys.readouterr().err
    assert Path("link").readlink() == Path("nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--to is missing"),
        (["--to", "hff", "x"], "--to hff is unknown (did you mean 'hf'?)"),
        (["--to", "hf", "rows.txt"], "rows.txt already exists"),
        (["--to", "gguf", "x"], "--to gguf x: give a name that ends in .gguf"),
        (["--to", "html", "x.htm"], "--to html x.htm: give a name that ends in .html"),
        (["--to", "gguf", "taken.gguf"], "taken.Modelfile already exists"),
        (["--to", "hf", "x", "--dtype", "q8_0"], "--dtype q8_0: --to hf writes float32, float16, bfloat16"),
        (["--to", "hf", "x", "--ckpt_path", "nothing.ckpt"], "nothing.ckpt does not exist"),
    ],
    ids=str,
)
def test_flag_that_cannot_work_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("taken.Modelfile").touch()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
