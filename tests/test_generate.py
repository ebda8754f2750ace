"""Sampling draws from the right tokens, and neither the cache nor padding changes a token."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt.device import supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import (
    _disable_onednn,
    encode_prompt,
    generate,
    prepare_for_inference,
    stream_text,
    stream_tokens,
    strip_control_characters,
)
from lit_gpt.inference.sampling import sample_token
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


def course_generate(model: GPT, tokens: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
    """The course's loop: crop, take the last position, divide by the temperature, softmax, sample, append."""
    for _ in range(count):
        logits = model(tokens[:, -model.config.context_length :])[0][:, -1] / temperature
        reached = F.softmax(logits, dim=-1).cumsum(dim=-1)
        points = torch.rand(len(tokens), 1, generator=generator) * reached[:, -1:]
        drawn = (reached <= points).sum(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("length", [1, 7, 16, 20])
def test_stream_tokens_matches_course_loop(position: str, length: int) -> None:
    model = gpt(position=position, num_kv_heads=2)
    prompt = torch.randint(257, (2, length), generator=torch.Generator().manual_seed(0))
    expected = course_generate(model, prompt, 24, 0.9, torch.Generator().manual_seed(5))
    drawn = stream_tokens(model, prompt, 24, temperature=0.9, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.stack(list(drawn), dim=1), expected[:, length:])


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


def test_generate_stops_before_end_id() -> None:
    model = gpt()
    (free,) = generate(model, [[3]], 30, temperature=0)
    end = free[9]
    assert generate(model, [[3]], 30, end=end, temperature=0) == [free[: free.index(end)]]


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


@pytest.mark.parametrize(
    ("sampling", "message"),
    [({"temperature": -1}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5")],
    ids=["temperature", "top_k", "top_p"],
)
def test_sample_token_refuses_values_out_of_range(sampling: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_token(torch.zeros(1, 3), **sampling)  # type: ignore[arg-type]


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


def test_strip_control_characters_keeps_tabs_and_line_ends_only() -> None:
    assert strip_control_characters("a\x1b[2Jb\tc\n中\u3000\x07\r") == "a\ufffd[2Jb\tc\n中\u3000\ufffd\ufffd"


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
