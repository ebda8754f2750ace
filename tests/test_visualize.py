"""--visualize true: what is logged, and that it does not change the run."""

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Fit, points, visualized, weights
from PIL import Image
from test_links import assert_unchanged, target
from test_model import gpt

from lit_gpt.data.shards import ShardedArray
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer
from lit_gpt.training.metrics import PositionLoss
from lit_gpt.training.pictures import Bars
from lit_gpt.training.projector import frequent_tokens, token_kind, write_projector
from lit_gpt.training.visualize import markdown_table, prompt_title, shown_matrices, spread_values, validation_prompt

__all__ = ["target"]  # a fixture

DROPOUT = ["--model.config.dropout", 0.2, "--model.schedule", "constant", "--generate.prompts", "['第', row]"]
PICTURES = ["visualize/attention", "visualize/loss_by_position", "visualize/next_token"]


def test_run_is_the_same_with_and_without_pictures_and_resumed(fit: Fit) -> None:
    assert fit("--name", "without", *DROPOUT).status == 0
    assert fit("--name", "with", *DROPOUT, "--visualize", "true").status == 0
    resumed = ["--name", "resumed", "--trainer.max_steps"]
    assert fit(*resumed, 3, *DROPOUT, "--visualize", "true").status == 0
    assert fit(*resumed, 6, "--ckpt_path", "last", config=None).status == 0  # its config says --visualize true
    runs = {name: Path(f"logs/{name}/version_0") for name in ("without", "with", "resumed")}
    scalars = {name: points(run) for name, run in runs.items()}
    states = {name: weights(run / "last.ckpt") for name, run in runs.items()}
    for name in ("with", "resumed"):
        for tag in ("loss/train", "loss/train_eval", "loss/val", "val/accuracy", "optim/grad_norm", "best/loss_val"):
            assert scalars[name][tag] == scalars["without"][tag]
        assert all(torch.equal(states[name][key], states["without"][key]) for key in states["without"])
    assert visualized(runs["without"]) == {}
    found = visualized(runs["with"])
    assert visualized(runs["resumed"]) == found
    for tag, values in found.items():
        assert [step for step, _ in values] == ([3, 6] if tag.startswith("gradients/") else [0, 3, 6])
    parts = ("attention.qkv", "attention.project", "mlp.up", "mlp.project")
    matrices = ["embedding", *(f"blocks.{block}.{part}" for block in (0, 1) for part in parts)]
    histograms = {f"{group}/{name}" for group in ("weights", "gradients") for name in matrices}
    # characters that no installed font has are shown as text beside a picture
    assert {tag for tag in found if not tag.endswith("/text_summary")} == {*PICTURES, *histograms}
    assert all(Image.open(io.BytesIO(png)).width > 600 for tag in PICTURES for _, png in found[tag])
    for name in ("projector_tokens.tsv", "projector_vectors.bytes"):
        assert (runs["with"] / name).read_bytes() == (runs["resumed"] / name).read_bytes()


def test_window_of_one_token_has_pictures(fit: Fit) -> None:
    result = fit("--visualize", "true", "--model.config.context_length", 1, "--trainer.max_steps", 1)
    assert result.status == 0
    assert visualized(Path("logs/small/version_0")).keys() >= set(PICTURES)


def test_what_pictures_need_is_said_before_training(fit: Fit) -> None:
    result = fit("--visualize", "true", "--trainer.logger", "false", "--trainer.max_steps", 1)
    assert (result.status, "visualize   nothing: this run has no StepLogger" in result.out) == (0, True)
    result = fit("--visualize", "true", "--preflight", "true")
    assert (result.status, "visualize   " in result.out) == (0, False)
    for flags, message in (
        ([], "--attention_heads shows nothing without --visualize true: give both, or null\n"),
        (["--visualize", "true"], "--attention_heads has [2, 0]: give pairs of a block from 0 to 1"),
    ):
        result = fit("--attention_heads", "[[2, 0]]", *flags)
        assert (result.status, result.out) == (2, "")
        assert result.err.startswith(f"error: {message}")


# ------------------------------------------------------------------------------------------------------------ parts


def test_position_loss_is_the_mean_at_each_position() -> None:
    metric, losses = PositionLoss(3), torch.tensor([[1.0, 2, 3], [5, 6, 7]])
    metric.update(losses, torch.tensor([[True, True, False], [True, False, False]]))
    metric.update(losses, torch.ones(2, 3, dtype=torch.bool))
    expected = torch.tensor([(1 + 5 + 1 + 5) / 4, (2 + 2 + 6) / 3, (3 + 7) / 2])
    torch.testing.assert_close(metric.compute(), expected)


def test_histograms_are_of_at_most_four_blocks() -> None:
    names = [name for name, _ in shown_matrices(gpt(num_blocks=10, tie_embeddings=False))]
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "3", "6", "9"}
    assert {name for name in names if not name.startswith("blocks.")} == {"embedding", "head"}
    assert len(spread_values(torch.arange(10**5).view(100, 1000))) == pytest.approx(2**14, rel=0.15)


def test_markdown_shows_tokens_as_they_are() -> None:
    panels = Bars("after *", [("<end>", 0.5, False), ("|", 0.02, False)]), Bars("b", [("静", 1, True)])
    table = markdown_table(list(panels))
    assert table.splitlines() == [
        "| after &#42; | | b | |",
        "| :--- | ---: | :--- | ---: |",
        "| &#60;end&#62; | 50.0% | 静 | 100.0% |",
        "| &#124; | 2.0% |  |  |",
    ]


def test_title_shows_the_end_of_a_long_prompt() -> None:
    assert prompt_title("") == "at the beginning of a text"
    assert prompt_title("静 夜\n") == "after 静␣夜\\n"
    assert prompt_title("静" * 100 + "夜" * 59) == f"after …静{'夜' * 59}"


@pytest.mark.parametrize(("text", "prompt"), [("静夜", "静"), ("abcdef", "abc"), ("a", "a"), ("", "静夜思静")])
def test_validation_prompt_ends_at_a_whole_character(text: str, prompt: str) -> None:
    """`text` is the first text of the split. Where it is empty, the window is a part of a longer text."""
    data: Any = Mock(tokenizer=ByteTokenizer(), context_length=24)
    data.corpus_config.read_options.mode = "rows"
    data.val_ids = np.array([*text.encode(), *([256] if text else []), *("静夜思" * 9).encode()])
    shown, ids, following = validation_prompt(data)
    assert (shown, ids) == (prompt, [256, *prompt.encode()])
    assert following == data.val_ids[len(prompt.encode())]


def test_projector_has_the_vectors_of_the_most_frequent_tokens(tmp_path: Path, target: Path) -> None:
    text = np.array([*("aaa bb静静静\t".encode()), 256], dtype="<u2")
    embedding = np.random.default_rng(0).normal(size=(257, 5)).astype(np.float32)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("projector_vectors.bytes", "projector_tokens.tsv", "projector_config.pbtxt"):
        (run / name).symlink_to(target / "file")
    write_projector(run, ByteTokenizer(), ShardedArray([text], len(text)), embedding)
    assert_unchanged(target)
    header, *rows = (run / "projector_tokens.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "token\tid\tcount\tkind"
    assert rows[0] == "a\t97\t3\tletters"
    assert {"␣\t32\t1\tblank", "\\t\t9\t1\tblank", "<end>\t256\t1\tend of text"} <= set(rows)
    vectors = np.fromfile(run / "projector_vectors.bytes", dtype="<f4").reshape(len(rows), 5)
    assert (vectors == embedding[[int(row.split("\t")[1]) for row in rows]]).all()
    assert f"tensor_shape: {len(rows)}\n  tensor_shape: 5\n" in (run / "projector_config.pbtxt").read_text()


def test_frequent_tokens_are_counted_over_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.training.projector.MAX_COUNTED_TOKENS", 100)
    ids = np.repeat(np.array([7, 3, 5], dtype="<u2"), [500, 300, 200])
    tokens, counts = frequent_tokens(ShardedArray([ids], len(ids)), 9)
    assert (tokens.tolist(), counts.tolist()) == ([7, 3, 5], [50, 30, 20])


def test_kind_of_a_token() -> None:
    tokenizer = ByteTokenizer()
    kinds = [token_kind(tokenizer, token) for token in (*b"a1,+ \n", 0xE9, 256)]
    assert kinds[:6] == ["letters", "digits", "punctuation", "symbols", "blank", "blank"]
    assert kinds[6:] == ["part of a character", "end of text"]
    assert token_kind(CharTokenizer("静"), 0) == "Chinese"
