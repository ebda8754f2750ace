"""Sampling keeps what it promises to keep, and the cache changes no token."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt.device import supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import (
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
            parameter.add_(0.2 * torch.randn(parameter.shape))  # decided opinions
    return model


def course_generate(model: GPT, tokens: Tensor, count: int, temperature: float, generator: torch.Generator) -> Tensor:
    """The course's loop: crop, last position, temperature, softmax, a draw by one random number a row, append."""
    for _ in range(count):
        logits = model(tokens[:, -model.config.context_length :])[0][:, -1] / temperature
        reached = F.softmax(logits, dim=-1).cumsum(dim=-1)
        points = torch.rand(len(tokens), 1, generator=generator) * reached[:, -1:]
        drawn = (reached <= points).sum(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, drawn), dim=1)
    return tokens


@pytest.mark.parametrize("position", ["rope", "learned", "sinusoidal"])
@pytest.mark.parametrize("length", [1, 7, 16, 20])
def test_streaming_draws_the_tokens_of_the_courses_loop(position: str, length: int) -> None:
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
def test_prompts_of_unequal_length_are_written_on_as_each_alone(changes: dict[str, object], use_cache: bool) -> None:
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
    for _ in range(count):
        likeliest = model(tokens[:, -model.config.context_length :])[0][:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat((tokens, likeliest), dim=1)
    return tokens


def test_a_text_ends_before_its_end_of_text() -> None:
    model = gpt()
    (free,) = generate(model, [[3]], 30, temperature=0)
    end = free[9]
    assert generate(model, [[3]], 30, end=end, temperature=0) == [free[: free.index(end)]]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quickened_model_writes_near_what_it_did(bias: bool, rows: int) -> None:
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


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample_token(logits, top_k=1), logits.argmax(-1))
    assert torch.equal(sample_token(logits, top_p=1e-300), logits.argmax(-1))
    assert torch.equal(sample_token(logits, temperature=1e-300), logits.argmax(-1))


def test_top_k_and_top_p_keep_the_likeliest_only() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    logits = probabilities.log().expand(5000, 5)
    generator = torch.Generator().manual_seed(0)

    def shares(**limits: float) -> list[float]:
        drawn = sample_token(logits, generator=generator, **limits)  # type: ignore[arg-type]
        return (torch.bincount(drawn, minlength=5) / 5000).tolist()

    assert shares() == pytest.approx(probabilities.tolist(), abs=0.03)
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.03)
    assert shares(top_p=0.7) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=0.03)
    assert shares(top_p=0.71) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], abs=0.03)
    assert shares(temperature=0.5)[1] == pytest.approx(0.16 / 0.285, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [({"temperature": -1}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5")],
    ids=["temperature", "top_k", "top_p"],
)
def test_sampling_out_of_range_is_said(sampling: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample_token(torch.zeros(1, 3), **sampling)  # type: ignore[arg-type]


def written(monkeypatch: pytest.MonkeyPatch, ids: list[int], mode: str = "rows") -> list[str]:
    """The pieces a person sees when the model draws `ids`."""

    def draw(*args: object, **kwargs: object) -> Iterator[Tensor]:
        for token in ids:
            yield torch.tensor([token])

    monkeypatch.setattr("lit_gpt.inference.generate.stream_tokens", draw)
    return list(stream_text(gpt(), ByteTokenizer(), "", mode))


def test_a_character_is_written_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, list("a中".encode())) == ["a", "", "", "中", ""]
    assert written(monkeypatch, list("中".encode())[:2]) == ["", "", "\ufffd"]


def test_a_document_ends_at_the_end_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "".join(written(monkeypatch, [97, 256, 98])) == "a"
    assert "".join(written(monkeypatch, [97, 256, 98], mode="raw")) == "ab"


def test_what_is_shown_cannot_steer_a_terminal() -> None:
    assert strip_control_characters("a\x1b[2Jb\tc\n中\u3000\x07\r") == "a\ufffd[2Jb\tc\n中\u3000\ufffd\ufffd"


def test_a_prompt_begins_as_training_texts_do() -> None:
    tokenizer = CharTokenizer("\nab")
    assert encode_prompt(tokenizer, "ab", mode="rows") == [3, 1, 2]
    assert encode_prompt(tokenizer, "", mode="rows") == [3]
    assert encode_prompt(tokenizer, "ab", mode="raw") == [1, 2]
    assert encode_prompt(tokenizer, "", mode="raw") == [0]
    assert encode_prompt(CharTokenizer("ab"), "", mode="raw") == [0]  # no line end among them
    with pytest.raises(UserError, match="character 'c'"):
        encode_prompt(tokenizer, "c", mode="raw")


def test_writing_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = gpt(dropout=0.5).train()
    state = torch.get_rng_state()
    texts = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        texts.append(list(stream_text(model, ByteTokenizer(), "a", "rows", max_new_tokens=5, generator=generator)))
    assert texts[0] == texts[1]
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
