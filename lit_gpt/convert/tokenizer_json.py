"""Our tokenizers as tokenizer.json of Hugging Face, and back."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.byte_level import to_bytes, to_characters
from lit_gpt.compat import encoding_pattern
from lit_gpt.convert.byte_level import merged_pairs
from lit_gpt.convert.origin import restore_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.library_tokenizer import LibraryTokenizer
from lit_gpt.tokenizer import BytePairTokenizer, ByteTokenizer, CharTokenizer
from lit_gpt.tokenizer_base import ENDOFTEXT, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


def to_tokenizer_json(tokenizer: Tokenizer, mode: str) -> str:
    """Return a tokenizer.json that encodes as our tokenizer does.

    With mode "rows" it puts the end of text before each text, as `encode_prompt` does.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.text
    from tokenizers import AddedToken, processors

    library = _library_tokenizer(tokenizer)
    end = end_name(tokenizer)
    library.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    if mode == "rows":
        library.post_processor = processors.TemplateProcessing(
            single=f"{end} $A", pair=f"{end} $A {end} $B:1", special_tokens=[(end, tokenizer.end_of_text)]
        )
    text: str = library.to_str()
    return text


def _library_tokenizer(tokenizer: Tokenizer) -> "Library":
    """Return the tokenizer of the library `tokenizers`, without what it puts around a text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    end = {end_name(tokenizer): tokenizer.end_of_text}
    if isinstance(tokenizer, CharTokenizer):
        library = Library(models.WordLevel({**tokenizer.ids, **end}, unk_token="<|unknown|>"))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        library.decoder = decoders.Fuse()
        return library
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {to_characters(bytes([byte])): byte for byte in range(256)}
        library = Library(models.BPE({**vocab, **end}, merges=[]))
        library.pre_tokenizer = byte_level
    else:
        assert isinstance(tokenizer, BytePairTokenizer)
        tokens = tokenizer.tokens
        vocab = {to_characters(token): rank for rank, token in enumerate(tokens)}
        unused = {f"<|unused_{token}|>": token for token in range(len(tokens), tokenizer.end_of_text)}
        merges = [(to_characters(left), to_characters(right)) for left, right in merged_pairs(tokens)]
        # tiktoken looks a whole pre-token up before it merges, which `ignore_merges` does too
        library = Library(models.BPE({**vocab, **unused, **end}, merges, ignore_merges=True))
        split = pre_tokenizers.Split(Regex(to_oniguruma(encoding_pattern(tokenizer.encoding))), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    library.decoder = decoders.ByteLevel()
    return library


def end_name(tokenizer: Tokenizer) -> str:
    """Return the name of the end of text: tiktoken's, with more at its end where a token of a text has that name."""
    if isinstance(tokenizer, LibraryTokenizer):
        return tokenizer.library.id_to_token(tokenizer.end_of_text) or ENDOFTEXT
    name = ENDOFTEXT
    if isinstance(tokenizer, BytePairTokenizer):
        while name.encode() in tokenizer.tokens:
            name += "|>"
    return name


def to_oniguruma(pattern: str) -> str:
    """Return a regular expression of Rust, which tiktoken uses, as one of Oniguruma, which `tokenizers` uses.

    There `{1,3}+` repeats a repetition. Here it keeps what it has matched, and no expression has anything after it that
    could take it back. There `$` is the end of a line, here the end of the text.
    """
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", pattern).replace("$", r"\z")


# ------------------------------------------------------------------------------------------------------------ reading


def from_tokenizer_json(path: Path, origin: dict[str, Any] | None, begin: int, end: int, size: int) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Args:
        path: The file.
        origin: What our own export says of it, see `convert.origin`; None: it is another program's.
        begin: The id before a document.
        end: The id after one.
        size: V of the model.

    Raises:
        UserError: The file cannot be read, or is no tokenizer.
    """
    try:
        text = path.read_text(encoding="utf-8")
        description = json.loads(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a folder with its tokenizer.json") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no tokenizer.json of Hugging Face: copy it again from where it came") from None
    if origin is not None:
        try:
            return restore_tokenizer(origin, _tokens_of_text(description, end))
        except (ValueError, LookupError, TypeError):
            pass  # the file was changed after the export
    return LibraryTokenizer(text, begin, end, size)


def _tokens_of_text(description: dict[str, Any], end: int) -> list[bytes]:
    """Return the bytes of the ids below `end`, in the order of the ids, up to the first that is no part of a text."""
    model = description["model"]
    pieces = {token: piece for piece, token in model["vocab"].items()}
    convert = str.encode if model["type"] == "WordLevel" else to_bytes
    tokens = []
    for token in range(end):
        if pieces[token] == f"<|unused_{token}|>":
            break
        tokens.append(convert(pieces[token]))
    return tokens
