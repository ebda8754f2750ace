"""A tokenizer in the metadata of a GGUF file, and back.

llama.cpp knows byte-pair encoding by the name of its regular expression ("pre"), and SentencePiece. Which
vocabulary of this project it is stands elsewhere in the file, see origin.py.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_gpt.byte_level import to_bytes, to_characters
from lit_gpt.convert.byte_level import merged_pairs
from lit_gpt.convert.gguf_vocabulary import CONTROL, NORMAL, UNUSED, add_vocabulary
from lit_gpt.convert.tokenizer_json import end_name
from lit_gpt.errors import UserError
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.tokenizer import BytePairTokenizer, CharTokenizer
from lit_gpt.tokenizer_base import ENDOFTEXT, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The regular expression of a vocabulary in llama.cpp; all others here have that of cl100k_base.
PRE_NAMES = {"gpt2": "gpt-2", "o200k_base": "gpt-4o"}
NO_MERGE = "ÿ ÿ"  # llama.cpp loads no vocabulary without merges; these two bytes never occur in UTF-8
SPACE = "▁"  # how SentencePiece writes " "


def add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, mode: str) -> None:
    """Add the metadata of a tokenizer to a GGUF file.

    Args:
        writer: Of the file.
        tokenizer: The tokenizer of the model.
        mode: The `data.mode` of training: with "rows" a text begins with the end of another one.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        add_vocabulary(writer, tokenizer)
    elif isinstance(tokenizer, CharTokenizer):
        _add_characters(writer, tokenizer)
    else:
        _add_byte_pairs(writer, tokenizer)
    writer.add_bos_token_id(tokenizer.begin_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(mode == "rows")
    writer.add_add_eos_token(False)


def _add_byte_pairs(writer: "GGUFWriter", tokenizer: Tokenizer) -> None:
    tokens, merges = [bytes([byte]) for byte in range(256)], [NO_MERGE]
    if isinstance(tokenizer, BytePairTokenizer):
        tokens = tokenizer.tokens
        merges = [" ".join(map(to_characters, pair)) for pair in merged_pairs(tokens)] or [NO_MERGE]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_NAMES.get(tokenizer.name, "llama-bpe"))
    writer.add_token_list([*map(to_characters, tokens), *_special_tokens(tokenizer, len(tokens))])
    writer.add_token_types(_types(tokenizer))
    writer.add_token_merges(merges)


def _types(tokenizer: Tokenizer) -> list[int]:
    """Return the type of each id in GGUF."""
    types = [NORMAL if tokenizer.token_bytes(token) else UNUSED for token in range(tokenizer.vocab_size)]
    types[tokenizer.end_of_text] = CONTROL
    return types


def _special_tokens(tokenizer: Tokenizer, first: int) -> list[str]:
    """Return the names of the ids from `first` that are no parts of a text."""
    names = [f"<|unused_{token}|>" for token in range(first, tokenizer.vocab_size)]
    names[tokenizer.end_of_text - first] = end_name(tokenizer)
    return names


def _add_characters(writer: "GGUFWriter", tokenizer: CharTokenizer) -> None:
    if SPACE in tokenizer.characters:
        raise UserError(
            f"the tokenizer char has the character {SPACE!r} (U+2581), which means a space in a GGUF file: export with "
            "--to hf or --to html"
        )
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokenizer.characters.replace(" ", SPACE), ENDOFTEXT])
    writer.add_token_types(_types(tokenizer))
    writer.add_token_scores([0.0] * tokenizer.vocab_size)
    writer.add_add_space_prefix(False)


def read_tokens(metadata: Mapping[str, Any]) -> list[bytes]:
    """Return the bytes of the tokens that are parts of a text, from a GGUF file that `add_tokenizer` has written."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    parts = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    if metadata["tokenizer.ggml.model"] == "llama":
        return [token.replace(SPACE, " ").encode() for token in parts]
    return [to_bytes(token) for token in parts]
