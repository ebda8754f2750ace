"""Vocabularies of other programs in GGUF files, as the `tokenizer.json` of the package tokenizers.

llama.cpp names the way in which a text is split ("pre"); the file itself has tokens and merges. Splits that end in
`ByteLevel` with its regular expression are those of GPT-2.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_gpt.errors import UserError
from lit_gpt.library_tokenizer import LibraryTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens in GGUF
ADD_BOS = "tokenizer.ggml.add_bos_token"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    """Return the split by a regular expression whose matches are pre-tokens."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(use_regex=False)]


# The split by its name in GGUF. Vocabularies of Llama 3 take a whole pre-token that is a token, without merges.
PRE_TOKENIZERS = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": _split(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{OTHERS}"),
    "qwen2": _split(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{OTHERS}"),
}
PRE_TOKENIZERS |= dict.fromkeys(("llama3", "llama-v3"), PRE_TOKENIZERS["llama-bpe"])  # other names of the same
IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3")


def add_vocabulary(writer: "GGUFWriter", tokenizer: LibraryTokenizer) -> None:
    """Add the metadata of a vocabulary to a GGUF file, as llama.cpp has it.

    Raises:
        UserError: It is no byte-pair vocabulary, or is split in a way for which llama.cpp has no name.
    """
    description = json.loads(tokenizer.library.to_str())  # where each step has all its settings
    model, steps = description["model"], description["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    pre = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if model["type"] != "BPE" or pre is None:
        raise UserError(
            "the tokenizer splits texts in a way that has no name in a GGUF file: export with --to hf or --to html"
        )
    names = [f"[UNUSED{token}]" for token in range(tokenizer.vocab_size)]
    types = [UNUSED] * tokenizer.vocab_size
    for text, token in model["vocab"].items():
        names[token], types[token] = text, NORMAL
    for added in description["added_tokens"]:
        names[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])


def read_vocabulary(metadata: Mapping[str, Any]) -> tuple[LibraryTokenizer, str]:
    """Return the tokenizer in the metadata of a GGUF file of another program, and the mode of its model.

    Returns:
        The tokenizer; and "rows" if programs are to begin a text with its first special token, else "raw".

    Raises:
        ValueError: It is no byte-pair vocabulary, or is split in a way that is unknown here.
    """
    text = tokenizer_json(metadata)
    end = metadata["tokenizer.ggml.eos_token_id"]
    begin = metadata.get("tokenizer.ggml.bos_token_id", end)
    mode = "rows" if metadata.get(ADD_BOS, False) else "raw"
    return LibraryTokenizer(text, begin, end, len(metadata["tokenizer.ggml.tokens"])), mode


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """Return the `tokenizer.json` of the vocabulary in the metadata of a GGUF file.

    Raises:
        ValueError: It is no byte-pair vocabulary, or is split in a way that is unknown here.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"its tokenizer is {model!r} with pre {pre!r}, not 'gpt2' with one of {known}")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    added = [
        {"id": token, "content": text, "special": kind == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for token, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    settings = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        "post_processor": _begin(tokens, metadata) if metadata.get(ADD_BOS, False) else None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre in IGNORES_MERGES,
        },
    }
    return json.dumps(settings, ensure_ascii=False)


def _begin(tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the step that puts a special token before a text."""
    token = metadata["tokenizer.ggml.bos_token_id"]
    name = tokens[token]
    begin, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
