"""Texts that are drawn in batches are those that are drawn alone; training rows are recognised."""

import itertools

import pytest
import torch
from test_generate import gpt

from lit_gpt.inference.generate import stream_text
from lit_gpt.inference.texts import GeneratedText, TrainingRows, generate_texts, seeded_generator
from lit_gpt.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

SAMPLING = {"max_new_tokens": 20, "temperature": 1.5}


@pytest.mark.parametrize("mode", ["rows", "raw"])
@pytest.mark.parametrize("raw_bytes", [True, False])
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("静ab\n")], ids=["byte", "char"])
def test_generate_texts_equals_stream_text_with_the_same_seed(tokenizer: Tokenizer, mode: str, raw_bytes: bool) -> None:
    model = gpt(vocab_size=tokenizer.vocab_size)
    texts = list(
        generate_texts(model, tokenizer, "静ab", mode, 5, seed=3, batch_size=3, raw_bytes=raw_bytes, **SAMPLING)
    )
    assert [text.seed for text in texts] == list(range(3, 8))
    assert any(text.is_complete for text in texts) == (mode == "rows" and tokenizer.name == "char")
    for text in texts:
        generator = seeded_generator(model, text.seed)
        pieces = stream_text(model, tokenizer, "静ab", mode, raw_bytes, generator=generator, **SAMPLING)
        assert text.continuation == "".join(pieces)
        assert text.text == "静ab" + text.continuation
        assert text.is_complete == (mode == "rows" and text.tokens[-1] == tokenizer.end_of_text)
        assert len(text.tokens) == 20 or text.is_complete


def test_generate_texts_gives_a_log_probability_for_each_token() -> None:
    model, tokenizer = gpt(context_length=64), ByteTokenizer()
    for text in generate_texts(model, tokenizer, "ab", "rows", 3, with_logprobs=True, **SAMPLING):
        ids = torch.tensor([[256, *b"ab", *text.tokens]])
        with torch.inference_mode():
            expected = model(ids)[0].log_softmax(dim=-1)[0, 2:-1].gather(1, ids[0, 3:, None])[:, 0]
        assert text.logprobs is not None
        torch.testing.assert_close(torch.tensor(text.logprobs), expected)


def test_generate_texts_draws_others_for_those_that_are_not_accepted() -> None:
    model, tokenizer = gpt(), ByteTokenizer()
    everything = list(generate_texts(model, tokenizer, "", "raw", 20, **SAMPLING))
    accepted = [text for text in everything if text.seed % 3 == 0][:6]
    asked: list[int] = []

    def accept(text: GeneratedText) -> bool:
        asked.append(text.seed)
        return text.seed % 3 == 0

    for batch_size in (1, 4, 32):
        texts = list(generate_texts(model, tokenizer, "", "raw", 6, batch_size=batch_size, accept=accept, **SAMPLING))
        assert texts == accepted
    assert asked == list(range(1337, accepted[-1].seed + 1)) * 3


def test_generate_texts_gives_up_after_ten_tries_for_each_text() -> None:
    tries = itertools.count()
    texts = generate_texts(
        gpt(), ByteTokenizer(), "", "raw", 3, accept=lambda text: next(tries) == 17, max_new_tokens=2
    )
    assert [text.seed for text in texts] == [1337 + 17]
    assert next(tries) == 30


def test_generate_texts_stops_soon_with_whole_characters() -> None:
    checks = itertools.count()
    texts = list(
        generate_texts(
            gpt(), ByteTokenizer(), "", "raw", 50, batch_size=25, should_stop=lambda: next(checks) >= 1, **SAMPLING
        )
    )
    assert len(texts) == 25
    assert {len(text.tokens) for text in texts} == {16}
    assert not any("\ufffd" in text.text for text in texts)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("\n ab静夜")], ids=["byte", "char"])
def test_training_rows_are_recognised_as_a_whole_or_by_their_beginning(tokenizer: Tokenizer) -> None:
    rows = TrainingRows(tokenizer.encode_documents(["ab", "静夜\na", " ", "ab ab"])[0], tokenizer)

    def lacks(text: str, is_complete: bool) -> bool:
        return rows.lack(GeneratedText(text[:1], text[1:], 0, [], is_complete))

    for text in ("ab", "静夜\na", " ", "ab ab"):
        assert not lacks(text, True)
        assert not lacks(text, False)
    for text in ("", "a", "静", "ab a"):
        assert lacks(text, True)
        assert not lacks(text, False)
    for text in ("b", "夜\na", "ab b", "ab\n", "静夜\nab"):
        assert lacks(text, True)
        assert lacks(text, False)
