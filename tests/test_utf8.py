"""Generated text is valid UTF-8: the allowed tokens are those that Python's decoder accepts, found by trying all."""

import codecs
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generate import SAMPLING, gpt, seeded
from torch import Tensor

from lit_gpt.inference.generate import generate, sample_token, stream_text, stream_tokens
from lit_gpt.inference.utf8 import Utf8Constraint, utf8_constraint
from lit_gpt.sampling import keep_likeliest
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, open_tokenizer, prune, train_bpe


class ListTokenizer(Tokenizer):
    """A vocabulary that is given; the end of text comes after it."""

    name = "list"

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.end_of_text, self.vocab_size = len(tokens), len(tokens) + 1

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token] if token < len(self.tokens) else b""

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "tokens": [token.hex() for token in self.tokens]}


# ----------------------------------------------------------------------------------------- the oracle: Python's decoder


UNREACHABLE = 9  # more than there are kinds of unfinished characters


def unfinished(text: bytes) -> bytes | None:
    """Return the bytes of the character that `text` ends in, b"" if it ends with a whole one; None if it is invalid."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return None if "\ufffd" in decoder.decode(text) else decoder.getstate()[0]


def allowed(tokens: tuple[bytes, ...], pending: bytes, remaining: int) -> set[int]:
    """Return the ids that may follow the unfinished character `pending` if `remaining` tokens come after them."""
    limit = max(remaining, fewest_tokens(tokens, pending) - 1)
    return {
        i
        for i, token in enumerate(tokens)
        if (token or not pending)
        and (after := unfinished(pending + token)) is not None
        and fewest_tokens(tokens, after) <= limit
    }


@functools.cache
def fewest_tokens(tokens: tuple[bytes, ...], pending: bytes) -> int:
    """Return how many tokens complete the character at least, found by trying all sequences."""
    found = {pending}
    for count in range(UNREACHABLE):
        if b"" in found:
            return count
        found = {
            after
            for text, token in itertools.product(found, tokens)
            if token and (after := unfinished(text + token)) is not None
        }
    return UNREACHABLE


# -------------------------------------------------------------------------------------------------- allowed tokens

CHARACTERS = (  # of all lengths, and at the bounds of RFC 3629
    "a\u00e9\u07ff\u0800\u4e2d\ud7ff\ue000\ufffd\U00010000\U0001f600\U00040000\U0010ffff"
)
INVALID = [b"\xc0", b"\xc1", b"\xf5", b"\xff", b"\xe0\x80", b"\xed\xa0\x80", b"\xf0\x8f", b"\xf4\x90"]


def pieces(text: str) -> st.SearchStrategy[bytes]:
    """Parts of the bytes of a text, which begin and end anywhere."""
    data = text.encode()
    ends = st.integers(0, len(data))
    return st.tuples(ends, ends).map(lambda pair: data[min(pair) : max(pair)])


TOKENS = st.one_of(
    st.text(CHARACTERS, max_size=3).flatmap(pieces), st.binary(max_size=2), st.sampled_from(INVALID), st.just(b"")
)
PENDING = [b""] + [char.encode()[:n] for char in CHARACTERS for n in range(1, len(char.encode()))]


BOUNDS = bytes.fromhex("00417f 808f909fa0bcbdbebf c0c1c2df e0e1ecedeeef f0f1f3f4f5ff")  # of the ranges of bytes
BYTES = Utf8Constraint([bytes([i]) for i in range(256)])


def check_allowed_tokens(tokens: tuple[bytes, ...]) -> None:
    constraint = Utf8Constraint(list(tokens))
    for pending in PENDING:
        if fewest_tokens(tokens, pending) == UNREACHABLE:  # no text is ever there
            continue
        state = BYTES.start(torch.tensor([list(b"a" + pending)]))  # (1,)
        for remaining in range(5):
            found = set(constraint.penalties(state, remaining)[0].isfinite().nonzero().flatten().tolist())
            assert found == allowed(tokens, pending, remaining)
            assert found


@given(st.lists(TOKENS, max_size=12))
def test_allowed_tokens_are_those_that_pythons_decoder_can_complete(tokens: list[bytes]) -> None:
    check_allowed_tokens((*tokens, b""))


def test_allowed_bytes_are_those_that_pythons_decoder_can_complete() -> None:
    check_allowed_tokens(tuple(bytes([i]) for i in BOUNDS))


@given(st.lists(TOKENS, max_size=12), st.data())
def test_state_after_a_prompt_is_that_of_its_last_unfinished_character(
    tokens: list[bytes], data: st.DataObject
) -> None:
    """Also where the prompt is not valid itself: Python's decoder begins anew after an invalid byte, and so do we."""
    tokens = [token for token in tokens if token] or [b"a"]
    constraint = Utf8Constraint([*tokens, *(bytes([i]) for i in range(256))])
    ids = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=6))
    padding = data.draw(st.integers(0, 4))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(b"".join(tokens[i] for i in ids))
    expected = BYTES.start(torch.tensor([list(b"a" + decoder.getstate()[0])]))
    prompts = torch.tensor([[data.draw(st.integers(0, len(tokens) - 1))] * padding + ids])
    assert torch.equal(constraint.start(prompts, torch.tensor([padding])), expected)


def test_padding_is_no_part_of_a_prompt() -> None:
    constraint = Utf8Constraint([b"\xe4", b"\xb8", b"\xad", b"a"])
    prompts = torch.tensor([[0, 0, 1], [3, 0, 1]])  # padding has the id 0
    expected = [BYTES.start(torch.tensor([list(text)])).item() for text in (b"\xb8", b"a\xe4\xb8")]
    assert constraint.start(prompts, torch.tensor([2, 0])).tolist() == expected


# -------------------------------------------------------------------------------------------------- generated texts

VOCABULARIES: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "bpe": lambda: train_bpe(["静夜思 床前明月光，疑是地上霜。举头望明月，低头思故乡。 naïve café 😀😃"] * 3, 300),
    "pruned": lambda: prune(open_tokenizer("gpt2"), open_tokenizer("gpt2").encode("床前明月光 naïve 😀"))[0],  # type: ignore[arg-type]
    "pieces": lambda: ListTokenizer(
        [b"a", b"b\xe4", b"\xb8\xad\xe4\xb8", b"\xad", b"\xf0\x9f", b"\x98\x80\xf0", b"\xff"]
    ),
}


@pytest.mark.parametrize("sampling", [SAMPLING[0], SAMPLING[1], SAMPLING[4]], ids=str)
@pytest.mark.parametrize("name", VOCABULARIES)
def test_generated_texts_are_valid_and_end_with_a_whole_character(name: str, sampling: dict[str, Any]) -> None:
    tokenizer = VOCABULARIES[name]()
    model = gpt(vocab_size=tokenizer.vocab_size + 3)  # a padded vocabulary: the last ids are no tokens
    constraint = utf8_constraint(model, tokenizer)
    invalid = 0
    for count in (1, 2, 3, 20):  # the context has 16 tokens
        for end in (tokenizer.end_of_text, None):
            prompts = [[tokenizer.end_of_text], [tokenizer.end_of_text, *token_ids(tokenizer, "a")]] * 8
            options: dict[str, Any] = {"end": end, **sampling}
            for row in generate(model, prompts, count, generator=seeded(count), constraint=constraint, **options):
                text_of(tokenizer, row).decode()  # raises an error for what is not valid
                assert end is not None or len(row) == count
            unmasked = generate(model, prompts, count, generator=seeded(count), **options)
            invalid += sum("\ufffd" in tokenizer.decode(row) for row in unmasked)
    assert invalid > 0  # without the constraint the model does break characters


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.tokens.index(text.encode())] if isinstance(tokenizer, ListTokenizer) else tokenizer.encode(text)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


def test_rows_that_begin_inside_a_character_complete_it() -> None:
    tokenizer, model = ByteTokenizer(), gpt()
    prompts = [
        list(text) for text in ("é".encode()[:1], "中文".encode()[:5], "a😀".encode()[:2], "😀".encode()[:3], b"ab")
    ]
    for count in (3, 4, 12):
        constraint = utf8_constraint(model, tokenizer)
        rows = generate(model, prompts, count, generator=seeded(count), constraint=constraint)
        for prompt, row in zip(prompts, rows):
            text_of(tokenizer, [*prompt, *row]).decode()
    (row,) = generate(model, [list(b"\xf0")], 2, constraint=utf8_constraint(model, tokenizer), generator=seeded(0))
    assert unfinished(bytes([0xF0, *row])) == bytes([0xF0, *row])  # two bytes cannot complete it, but begin to


@pytest.mark.parametrize("limits", [{}, {"top_k": 4, "temperature": 0.5}, {"top_p": 0.6}], ids=str)
def test_drawn_tokens_have_the_distribution_of_the_model_restricted_to_allowed_tokens(limits: dict[str, Any]) -> None:
    tokenizer = ListTokenizer([b"a", b"\xe4", b"\xb8", b"\xad", b"\xb8\xad", b"\xb8\xada"])
    model, rows = gpt(vocab_size=7), 4000
    for prompt in ([0], [1], [1, 2]):
        pending = text_of(tokenizer, prompt).removeprefix(b"a")
        ids = sorted(allowed((*tokenizer.tokens, b""), pending, 1))
        restricted = model(torch.tensor([prompt]))[0][0, -1, ids].detach() / limits.get("temperature", 1)
        kept = keep_likeliest(restricted[None], limits.get("top_k"), limits.get("top_p"))[0]
        expected = torch.zeros(7).scatter(0, torch.tensor(ids), kept.softmax(dim=-1))
        constraint = utf8_constraint(model, tokenizer)
        drawn = next(stream_tokens(model, [prompt] * rows, 2, generator=seeded(0), constraint=constraint, **limits))
        torch.testing.assert_close(torch.bincount(drawn, minlength=7) / rows, expected, rtol=0, atol=0.03)
        assert 1 < len(ids) < 7


def test_log_probabilities_are_those_of_the_model_without_the_constraint() -> None:
    model, logprobs = gpt(), list[Tensor]()
    prompt = torch.tensor([list(b"a\xe4")])
    constraint = utf8_constraint(model, ByteTokenizer())
    drawn = list(stream_tokens(model, prompt, 3, 0.5, generator=seeded(0), logprobs=logprobs, constraint=constraint))
    logits, _ = model(torch.cat((prompt, torch.stack(drawn, dim=1)), dim=1))
    expected = logits[0, 1:-1].log_softmax(dim=-1).gather(1, torch.stack(drawn))[:, 0]
    torch.testing.assert_close(torch.cat(logprobs), expected.detach())


def test_constraint_of_bfloat16_logits_draws_from_their_exact_quotients() -> None:
    """As without a constraint, logits are converted to float32 before they are divided by the temperature."""
    logits = torch.randn(3, 50, generator=seeded(0)).bfloat16()
    for temperature in (0, 0.3, 1):
        penalties = torch.zeros(3, 50)
        drawn = sample_token(logits, temperature, generator=seeded(1), penalties=penalties)
        assert torch.equal(drawn, sample_token(logits, temperature, generator=seeded(1)))
        if temperature:
            torch.testing.assert_close(penalties, logits.float() / temperature)  # the sum, in place


def test_vocabulary_of_whole_characters_needs_no_constraint() -> None:
    assert utf8_constraint(gpt(vocab_size=5), CharTokenizer("a中😀")) is None


def test_stream_text_is_valid_unless_raw_bytes_are_asked_for() -> None:
    model, tokenizer = gpt(), ByteTokenizer()

    def stream(**options: Any) -> str:
        return "".join(stream_text(model, tokenizer, "中", "raw", max_new_tokens=40, generator=seeded(0), **options))

    assert "\ufffd" not in stream()
    assert "\ufffd" in stream(raw_bytes=True)
