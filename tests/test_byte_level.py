"""Byte-pair vocabularies as other programs write them."""

import pytest

from lit_gpt.convert.byte_level import CHARACTERS, merged_pairs, to_bytes, to_characters
from lit_gpt.tokenizer import train_bpe

tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers: pip install 'lit-gpt[hf]'")


def test_characters_of_bytes_are_those_of_tokenizers() -> None:
    assert set(CHARACTERS.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = "".join(map(chr, range(128))) + "é你👩"
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert to_characters(text.encode()) == "".join(part for part, _ in split)
    assert to_bytes(to_characters(bytes(range(256)))) == bytes(range(256))


def test_merged_pairs_give_the_ids_of_the_vocabulary_they_come_from() -> None:
    text = "one fish two fish red fish blue fish 静夜思 静静"
    tokenizer = train_bpe([text], 290)
    vocab = {to_characters(token): rank for rank, token in enumerate(tokenizer.tokens)}
    merges = [(to_characters(left), to_characters(right)) for left, right in merged_pairs(tokenizer.tokens)]
    assert len(merges) == len(vocab) - 256
    other = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    for word in ("fish", " fish", "静夜思", "stone"):
        assert other.encode(to_characters(word.encode())).ids == tokenizer.encode(word)
