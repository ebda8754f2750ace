"""Sampling draws from the right tokens, and neither the cache nor padding changes a token."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_model import SHAPES
from torch import Tensor

from lit_gpt.device import supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import (
    _disable_onednn,
    check_sampling,
    encode_prompt,
    generate,
    prepare_for_inference,
    sample_token,
    stream_text,
    stream_tokens,
)
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer


def gpt(**changes: object) -> GPT:
    torch.manual_seed(3)
    shape = {"vocab_size": 257, "context_length": 16, "d_model": 32, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))  # so that probabilities differ clearly
    return model


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9},
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_fast_path_equals_generate(model: GPT, prompt: Tensor, **sampling: Any) -> None:
    slow = model.generate(prompt, 20, **sampling, generator=seeded(5))
    fast = stream_tokens(model, prompt, 20, **sampling, generator=seeded(5))
    assert torch.equal(torch.cat((prompt, torch.stack(list(fast), dim=1)), dim=1), slow)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("length", [1, 7, 16, 20])  # of the prompt: in the context of 16, all of it, and longer
def test_stream_tokens_equals_generate_for_equal_generators(length: int, sampling: dict[str, Any]) -> None:
    model = gpt()
    for rows in (1, 4):
        check_fast_path_equals_generate(model, torch.randint(257, (rows, length), generator=seeded(rows)), **sampling)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stream_tokens_equals_generate_for_all_shapes(shape: dict[str, Any]) -> None:
    model, prompt = gpt(**shape), torch.randint(257, (2, 7), generator=seeded(0))
    check_fast_path_equals_generate(model, prompt, temperature=0)
    check_fast_path_equals_generate(model, prompt, temperature=0.9)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_stream_tokens_draws_for_padded_rows_as_for_unpadded_ones(sampling: dict[str, Any]) -> None:
    model, generator = gpt(), seeded(5)
    prompts = rows = [[5], [7, 200, 31, 8], list(range(20)), [1, 2, 3, 4, 5, 6, 7]]
    for _ in range(20):
        logits = torch.cat([model(torch.tensor([row[-16:]]))[0][:, -1] for row in rows])  # (B, V)
        rows = [
            [*row, token] for row, token in zip(rows, sample_token(logits, **sampling, generator=generator).tolist())
        ]
    fast = torch.stack(list(stream_tokens(model, prompts, 20, **sampling, generator=seeded(5))), dim=1).tolist()
    assert [prompt + new for prompt, new in zip(prompts, fast)] == rows


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_row_with_a_generator_of_its_own_draws_as_it_does_alone(sampling: dict[str, Any]) -> None:
    model, prompts = gpt(), [[5], [7, 200, 31, 8], [7, 200, 31, 8]]
    together = generate(model, prompts, 24, **sampling, generator=[seeded(row) for row in range(3)])
    alone = [generate(model, [prompt], 24, **sampling, generator=seeded(row)) for row, prompt in enumerate(prompts)]
    assert [[tokens] for tokens in together] == alone


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_stream_tokens_gives_the_log_probabilities_of_the_model(sampling: dict[str, Any]) -> None:
    model, rows = gpt(), torch.randint(257, (2, 7), generator=seeded(1))
    logprobs: list[Tensor] = []
    for tokens in stream_tokens(model, rows, 12, **sampling, generator=seeded(5), logprobs=logprobs):
        with torch.inference_mode():
            expected = model(rows[:, -16:])[0][:, -1].softmax(dim=-1)[torch.arange(2), tokens].log()
        torch.testing.assert_close(logprobs[-1], expected)
        rows = torch.cat((rows, tokens[:, None]), dim=1)
    assert len(logprobs) == 12


@pytest.mark.parametrize(
    "changes",
    [{"position": "rope"}, {"position": "learned"}, {"position": "sinusoidal"}, {"previous_tokens": 3}],
    ids=["rope", "learned", "sinusoidal", "previous tokens"],
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_generate_pads_prompts_without_changing_results(changes: dict[str, object], use_cache: bool) -> None:
    model = gpt(**changes)
    for parameter in model.previous.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    prompts = [[5], [7, 200, 31, 8], list(range(20)), [1, 2, 3, 4, 5, 6, 7]]  # one is longer than the context
    for count in (6, 24):  # within the context, and past it
        alone = [generate(model, [prompt], count, temperature=0)[0] for prompt in prompts]
        assert generate(model, prompts, count, temperature=0, use_cache=use_cache) == alone
        plain = course_greedy(model, torch.tensor([prompts[1]]), count)
        assert alone[1] == plain[0, len(prompts[1]) :].tolist()


def course_greedy(model: GPT, tokens: Tensor, count: int) -> Tensor:
    """The course's loop with the most likely token in place of sampling."""
    for _ in range(count):
        likeliest = model(tokens[:, -model.config.context_length :])[0][:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=1)
    return tokens


def test_generate_of_no_tokens_continues_no_prompt() -> None:
    assert generate(gpt(), [[3], [4, 5]], 0) == [[], []]


def test_generate_stops_before_end_id() -> None:
    model = gpt()
    (free,) = generate(model, [[3]], 30, temperature=0)
    end = free[9]
    assert generate(model, [[3]], 30, end=end, temperature=0) == [free[: free.index(end)]]


def test_generate_computes_a_token_once_and_stops_soon_after_the_end_of_all_rows() -> None:
    model, computed = gpt(context_length=64), []
    model.norm.register_forward_hook(lambda module, args, output: computed.append(output.shape[1]))
    (free,) = generate(model, [[3, 4]], 40, temperature=0)
    assert computed == [2] + [1] * 39
    computed.clear()
    generate(model, [[3, 4]], 40, end=free[4], temperature=0)
    assert computed == [2] + [1] * 15


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_prepare_for_inference_changes_probabilities_by_rounding_only(bias: bool, rows: int) -> None:
    model, prompts = gpt(bias=bias, position="sinusoidal", context_length=64), torch.arange(40).view(rows, -1)
    with torch.inference_mode():
        before = model(prompts)[0].softmax(dim=-1)
    prepare_for_inference(model)
    with torch.inference_mode():
        after = model(prompts)[0]
    assert after.dtype == (torch.bfloat16 if supports_bfloat16(torch.device("cpu")) else torch.float32)
    torch.testing.assert_close(after.float().softmax(dim=-1), before, rtol=0, atol=0.03)
    drawn = torch.stack(list(stream_tokens(model, prompts, 12, temperature=0)), dim=1)
    with torch.inference_mode():
        plain = course_greedy(model, prompts, 12)[:, prompts.shape[1] :]
    assert (drawn == plain).float().mean() > 0.9  # a tie may be decided by the last bit
    assert torch.backends.mkldnn.enabled


def test_onednn_is_disabled_while_any_thread_needs_it() -> None:
    before, entered, leave = torch.backends.mkldnn.enabled, threading.Event(), threading.Event()

    def hold() -> None:
        with _disable_onednn:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    with _disable_onednn:
        thread.start()
        entered.wait()
        assert not torch.backends.mkldnn.enabled
    assert not torch.backends.mkldnn.enabled  # the other thread still needs it
    leave.set()
    thread.join()
    assert torch.backends.mkldnn.enabled == before


def test_sample_token_with_temperature_zero_returns_argmax() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample_token(logits, top_k=1), logits.argmax(-1))
    assert torch.equal(sample_token(logits, top_p=1e-300), logits.argmax(-1))
    assert torch.equal(sample_token(logits, temperature=1e-300), logits.argmax(-1))


def test_sample_token_draws_at_a_small_temperature() -> None:
    logits = torch.tensor([[0.0, 1e-4]]).expand(5000, 2)
    drawn = sample_token(logits, temperature=1e-4, generator=seeded(0)).double()
    assert drawn.mean().item() == pytest.approx(1 / (1 + torch.e**-1), abs=0.03)


def test_sample_token_draws_from_top_k_and_top_p_with_the_right_frequencies() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    logits = probabilities.log().expand(5000, 5)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**limits: float) -> list[float]:
        drawn = sample_token(logits, generator=generator, **limits)  # type: ignore[arg-type]
        return (torch.bincount(drawn, minlength=5) / 5000).tolist()

    assert frequencies() == pytest.approx(probabilities.tolist(), abs=0.03)
    assert frequencies(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.03)
    assert frequencies(top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.03)
    assert frequencies(top_p=0.71) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], abs=0.03)
    assert frequencies(temperature=0.5)[1] == pytest.approx(0.16 / 0.285, abs=0.03)


def test_sample_token_takes_two_random_numbers_for_each_row() -> None:
    """As long as it does, drawing from a large vocabulary costs next to nothing on a CPU."""
    for rows in (1, 3):
        used, counted = seeded(0), seeded(0)
        sample_token(torch.randn(rows, 5000, generator=seeded(1)), generator=used)
        torch.rand(rows, 2, dtype=torch.float64, generator=counted)
        assert torch.equal(used.get_state(), counted.get_state())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [({"temperature": -1}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5")],
    ids=["temperature", "top_k", "top_p"],
)
def test_stream_tokens_refuses_values_out_of_range(sampling: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(stream_tokens(gpt(), [[1]], 1, **sampling))


def test_check_sampling_accepts_the_bounds() -> None:
    check_sampling(temperature=0, top_k=1, top_p=1)


def streamed_pieces(monkeypatch: pytest.MonkeyPatch, ids: list[int], mode: str = "rows") -> list[str]:
    """Return the pieces that `stream_text` yields if the model draws `ids`."""

    def draw(*args: object, **kwargs: object) -> Iterator[Tensor]:
        for token in ids:
            yield torch.tensor([token])

    monkeypatch.setattr("lit_gpt.inference.generate.stream_tokens", draw)
    return list(stream_text(gpt(), ByteTokenizer(), "", mode))


def test_stream_text_yields_a_character_when_all_its_bytes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert streamed_pieces(monkeypatch, list("a中".encode())) == ["a", "", "", "中", ""]
    assert streamed_pieces(monkeypatch, list("中".encode())[:2]) == ["", "", "\ufffd"]


def test_stream_text_ends_at_end_of_text_with_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "".join(streamed_pieces(monkeypatch, [97, 256, 98])) == "a"
    assert "".join(streamed_pieces(monkeypatch, [97, 256, 98], mode="raw")) == "ab"


def test_encode_prompt_starts_as_training_texts_do() -> None:
    tokenizer = CharTokenizer("\nab")
    assert encode_prompt(tokenizer, "ab", mode="rows") == [3, 1, 2]
    assert encode_prompt(tokenizer, "", mode="rows") == [3]
    assert encode_prompt(tokenizer, "ab", mode="raw") == [1, 2]
    assert encode_prompt(tokenizer, "", mode="raw") == [0]
    assert encode_prompt(CharTokenizer("ab"), "", mode="raw") == [0]  # without line ends
    with pytest.raises(UserError, match="character 'c'"):
        encode_prompt(tokenizer, "c", mode="raw")


def test_stream_text_restores_training_mode_and_leaves_random_state() -> None:
    model = gpt(dropout=0.5).train()
    state = torch.get_rng_state()
    texts = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        texts.append(list(stream_text(model, ByteTokenizer(), "a", "rows", max_new_tokens=5, generator=generator)))
    assert texts[0] == texts[1]
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
