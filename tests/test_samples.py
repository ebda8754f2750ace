"""GenerateText: text during training, which does not change the run."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Fit, points, texts, weights

from lit_gpt.cli.generate import main as generate
from lit_gpt.errors import UserError
from lit_gpt.lines import display_width
from lit_gpt.runs.report import _texts
from lit_gpt.training.samples import GenerateText, sample_lines, sample_markdown

RUN = Path("logs/small/version_0")


def test_text_generation_changes_neither_losses_nor_weights(fit: Fit) -> None:
    dropout = ["--model.config.dropout", 0.2]
    assert fit("--name", "with", *dropout).status == 0
    assert fit("--name", "without", *dropout, "--generate.prompts", "[]").status == 0
    points_with, points_without = (points(Path(f"logs/{name}/version_0")) for name in ("with", "without"))
    for tag in ("loss/train", "loss/train_eval", "loss/val", "optim/grad_norm"):
        assert points_with[tag] == points_without[tag]
    weights_with, weights_without = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("with", "without"))
    assert all(torch.equal(weights_with[name], weights_without[name]) for name in weights_with)
    assert texts(Path("logs/without/version_0")) == {}


def test_text_is_generated_at_start_validations_and_end(fit: Fit) -> None:
    result = fit("--trainer.max_steps", 7, "--generate.prompts", "['第', row]", "--generate.max_new_tokens", 5)
    logged = texts(RUN)
    assert sorted(logged) == [0, 3, 6, 7]
    assert all(text.startswith(f"step {step}, continuing 'row'\n\n```\nrow") for step, text in logged.items())
    for prompt in ("第", "row"):
        texts_of_prompt = rf"\nsamples     (?:of the untrained model, )?continuing '{prompt}'\n  \| {prompt}"
        assert len(re.findall(texts_of_prompt, result.out)) == 4


def test_equal_runs_generate_equal_texts(fit: Fit) -> None:
    for name in ("a", "b"):
        assert fit("--name", name).status == 0
    assert texts(Path("logs/a/version_0")) == texts(Path("logs/b/version_0"))


def test_texts_are_valid_utf8_unless_raw_bytes_are_asked_for(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """The model has single bytes as tokens and learns little in six steps."""
    assert fit("--generate.num_samples", 20, "--generate.max_new_tokens", 9).status == 0
    assert "\ufffd" not in "".join(texts(RUN).values())
    for flags, is_valid in ([], True), (["--raw_bytes"], False):
        assert generate(["--prompt", "第", "--max_new_tokens", "60", *flags]) == 0
        assert ("\ufffd" not in capsys.readouterr().out) == is_valid


def test_one_sample_of_one_token_is_the_least() -> None:
    GenerateText(num_samples=1, max_new_tokens=1)
    for arguments in ({"num_samples": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="give 1 or more"):
            GenerateText(**arguments)


def test_prompts_are_read_as_templates_are() -> None:
    assert GenerateText([r"a\nb", r"a\\nb"]).prompts == ["a\nb", r"a\nb"]


def test_samples_of_the_untrained_model_are_one_line_each_cut_at_whole_characters() -> None:
    texts = ["静夜" * 50, "静夜\nshort", "静夜" + r"\x1b" * 50]
    header, *lines = sample_lines("静夜", texts, is_untrained=True, columns=40)
    assert header == "samples     of the untrained model, con…"
    assert lines == ["  | " + "静夜" * 8 + "静…", r"  | 静夜\nshort", "  | 静夜" + r"\x1b" * 7 + "…"]
    assert max(map(display_width, [header, *lines])) == 40


def test_samples_of_a_trained_model_are_whole_and_name_their_prompt() -> None:
    assert sample_lines("a\nb", ["a\nbc", "a\nbd"], is_untrained=False) == [
        r"samples     continuing 'a\nb'", "  | a", "  | bc", "", "  | a", "  | bd"
    ]  # fmt: skip
    assert sample_lines("", ["x" * 80], is_untrained=False) == [
        "samples     without a prompt", "  | " + "x" * 76, "    xxxx"
    ]  # fmt: skip


def test_text_with_backticks_stays_one_block_in_tensorboard_and_report() -> None:
    text = "a\n```\nb\n````\n"
    assert _texts(sample_markdown("", [text, "c"], step=1)) == [text, "c"]


def test_text_panel_says_step_and_prompt() -> None:
    assert sample_markdown("a*b", ["a*bc"], 1200) == "step 1,200, continuing 'a\\*b'\n\n```\na*bc\n```"
    text = "```\n<b>\n```"  # of a model that was trained on Markdown
    assert sample_markdown("", [text], 1) == f"step 1, without a prompt\n\n````\n{text}\n````"
