"""Files of torch.save, examined before torch opens them.

A file of torch.save is a zip archive. A pickle in it describes everything; other entries hold the bytes of tensors.
`torch.load(weights_only=True)` runs no code from it, but a small file can make it allocate far more memory than it has
bytes, read beyond the end of a tensor's bytes, or compute for hours. What `examine` accepts cannot: its archive is
uncompressed, no tensor is larger than its bytes, and the cost of its pickle is bounded.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from lit_gpt.checkpoint.order import MAX_COMMENT_BYTES
from lit_gpt.compat import PICKLED_PARAMETER, PICKLED_TENSOR

# Limits, with what reaches them: a checkpoint of 25,000 tensors, or of a vocabulary of 400,000 tokens.
MAX_DIRECTORY_BYTES = 2**22
MAX_PICKLE_BYTES = 2**25
MAX_OPCODES = 1_000_000
MAX_CALLS = 100_000  # of functions that make tensors and dictionaries; a tensor takes two
MAX_BUILDS = 100  # attributes set on objects; torch.save does it for each state dict
MAX_DEPTH = 100  # of nested containers
MAX_VALUES = 1_000_000  # where a value that occurs in several places counts in each of them

# The three records at the end of an archive of torch.save, as the zip format defines them (APPNOTE.TXT, 4.3.14-4.3.16).
ZIP64_END = struct.Struct("<4s Q 2H 2L 4Q")  # ..., entries (2), bytes of the directory, its position
ZIP64_LOCATOR = struct.Struct("<4s L Q L")  # ..., position of ZIP64_END, number of disks
PLAIN_END = struct.Struct("<4s 2H 2H 2L H")  # ..., entries (2), bytes of the directory, its position, bytes of comment

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype, torch.device)

# What pickle writes in the protocol of torch.save for plain data and tensors.
OPCODES = {
    *("PROTO", "STOP", "MARK", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINPERSID"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


class Refused(Exception):
    """A file is no archive of torch.save, or damaged, or made to do harm; the message says what is wrong with it."""


def examine(file: BinaryIO) -> Any:
    """Return what a file of torch.save holds, with tensors on the meta device.

    Only its directory and its pickle are read, not the bytes of tensors.

    Args:
        file: Opened for reading; its position does not matter.

    Raises:
        Refused: The file is not as torch.save writes it, holds anything but tensors and plain data (numbers, strings,
            None, dictionaries, lists, tuples, dtypes and devices), or would cost more than its size warrants.
        OSError: It cannot be read.
    """
    try:
        archive = open_archive(file)
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "data.pkl" not in entries or entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise Refused("damaged, or not a checkpoint")
        content = archive.read(entries["data.pkl"])
        check_opcodes(content)
        storage_bytes = {name: entry.file_size for name, entry in entries.items() if name.startswith("data/")}
        return _Converter().convert(_Unpickler(content, storage_bytes).load())
    except (Refused, OSError):
        raise
    except Exception as error:  # damaged bytes can raise almost any exception
        raise Refused("damaged") from error


# ------------------------------------------------------------------------------------------------------ the archive


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Open the zip archive of torch.save and check its directory.

    Raises:
        Refused: An entry is compressed, lies outside the file or overlaps with another one; a name occurs twice; or the
            directory is too long, or not the one torch would read.
    """
    file.seek(0)
    if file.read(4) != b"PK\3\4":  # torch takes a file that begins otherwise for one of its older format
        raise Refused("damaged, or not a checkpoint")
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - ZIP64_END.size - ZIP64_LOCATOR.size - PLAIN_END.size - MAX_COMMENT_BYTES))
    tail = file.read()
    plain_at = tail.rfind(b"PK\5\6")
    locator_at = plain_at - ZIP64_LOCATOR.size
    zip64_at = locator_at - ZIP64_END.size
    if zip64_at < 0 or plain_at + PLAIN_END.size > len(tail):
        raise Refused("damaged, or not a checkpoint")
    signature, *_, count, length, start = ZIP64_END.unpack_from(tail, zip64_at)
    locator_signature, _, zip64_position, _ = ZIP64_LOCATOR.unpack_from(tail, locator_at)
    # The plain record repeats the numbers, as far as they fit into it. Nothing lies between the records, or after them.
    entries, comment_bytes = min(count, 2**16 - 1), len(tail) - plain_at - PLAIN_END.size
    plain = (b"PK\5\6", 0, 0, entries, entries, min(length, 2**32 - 1), min(start, 2**32 - 1), comment_bytes)
    if (
        (signature, locator_signature) != (b"PK\6\6", b"PK\6\7")
        or not zip64_position == start + length == size - len(tail) + zip64_at
        or PLAIN_END.unpack_from(tail, plain_at) != plain
    ):
        raise Refused("damaged, or not a checkpoint")
    if length > MAX_DIRECTORY_BYTES:
        raise Refused("its list of entries is too long")
    archive = zipfile.ZipFile(file)
    _check_entries(archive.infolist(), start)
    return archive


def _check_entries(entries: list[zipfile.ZipInfo], end: int) -> None:
    names = {entry.filename.lower() for entry in entries}  # torch ignores the case
    if len(names) < len(entries) or len({name.partition("/")[0] for name in names}) != 1:
        raise Refused("an entry occurs twice")
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        if entry.filename != entry.orig_filename:  # zipfile cuts names, and may replace them; torch does not
            raise Refused("the name of an entry is not as torch.save writes it")
        if entry.compress_type or entry.file_size != entry.compress_size:
            raise Refused(f"{entry.filename} is compressed, which torch.save never does")
        if entry.external_attr or entry.flag_bits & 1:
            raise Refused(f"{entry.filename} has attributes that torch.save never writes")
        if entry.header_offset + 30 + len(entry.filename) + entry.file_size > end:
            raise Refused(f"{entry.filename} is longer than its place in the file")
        end = entry.header_offset


def compare_checksums(file: BinaryIO) -> None:
    """Read all bytes of an archive of torch.save and compare them with its checksums.

    Raises:
        Refused: They differ.
    """
    archive = open_archive(file)
    try:
        damaged = archive.testzip()
    except Exception as error:  # damaged bytes can raise almost any exception
        raise Refused("damaged") from error
    if damaged:
        raise Refused(f"checksum of {damaged}")


# ------------------------------------------------------------------------------------------------------- the pickle


def _argument_bytes() -> dict[int, int]:
    """Return the number of bytes that follow each opcode; pickletools has negative numbers for a length or a text."""
    return {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes if op.name in OPCODES}


ARGUMENT_BYTES = _argument_bytes()
CODES = {op.name: ord(op.code) for op in pickletools.opcodes}


def check_opcodes(content: bytes) -> None:
    """Check that a pickle is made of few enough of the opcodes that torch.save writes.

    Each of these makes at most one object and takes bounded time. Others, as those that copy a container, do not.

    Raises:
        Refused: It has too many opcodes, or too large a number.
        LookupError: It has an opcode that torch.save does not write, or ends within one.
        ValueError: It ends within the name of a function.
    """
    lengths, counts = ARGUMENT_BYTES, [0] * 256
    function, text, integer, put, stop = (
        CODES[name] for name in ("GLOBAL", "BINUNICODE", "LONG1", "LONG_BINPUT", "STOP")
    )
    position, opcode = 0, -1
    for count in range(MAX_OPCODES):  # `count` opcodes have been read
        if opcode == stop:
            break
        opcode = content[position]
        counts[opcode] += 1
        argument = position + 1
        position = argument + lengths[opcode]
        if lengths[opcode] < 0 or opcode == put:
            if opcode == text:
                position = argument + 4 + int.from_bytes(content[argument : argument + 4], "little")
            elif opcode == function:  # two lines: module and name
                position = content.index(b"\n", content.index(b"\n", argument) + 1) + 1
            elif opcode == integer:
                position = argument + 1 + content[argument]
                if content[argument] > 9:  # of longer ones many can have the same hash, and a dictionary would be slow
                    raise Refused("it has a number that is too large")
            elif int.from_bytes(content[argument:position], "little") > count:  # the memo would get as many places
                raise Refused("damaged")
    if opcode != stop or counts[CODES["REDUCE"]] > MAX_CALLS or counts[CODES["BUILD"]] > MAX_BUILDS:
        raise Refused("it has too many values")


class _StoredTensor(NamedTuple):
    """A tensor in an archive."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Storage(NamedTuple):
    """The bytes of tensors in an archive; `numel` counts elements."""

    dtype: torch.dtype
    numel: int


class _Unpickler(pickle.Unpickler):
    """Knows what torch.save writes for plain data and tensors, and nothing else. It returns tensors as _StoredTensor.

    Args:
        content: The pickle.
        storage_bytes: The size of each storage by the name of its entry, as data/0.
    """

    def __init__(self, content: bytes, storage_bytes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content))
        self.storage_bytes = storage_bytes

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) in KNOWN_FUNCTIONS:
            return KNOWN_FUNCTIONS[module, name]
        raise Refused("it holds code")

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, dtype, key, _, numel = saved_id
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise Refused("damaged")
        if self.storage_bytes[f"data/{key}"] != numel * dtype.itemsize:
            raise Refused(f"data/{key} has another size than its tensor")
        return _Storage(dtype, numel)


def _ordered_dict() -> OrderedDict:
    return OrderedDict()  # always empty: torch.save fills it by opcodes, which are counted


def _size(sizes: tuple[int, ...]) -> torch.Size:
    if len(sizes) > MAX_DEPTH:
        raise Refused("damaged")
    return torch.Size(sizes)


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: OrderedDict,
) -> _StoredTensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise Refused("damaged")
    if type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
        raise Refused("damaged")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.numel or (end > storage.numel and 0 not in size):
        raise Refused("a tensor is larger than its bytes")
    return _StoredTensor(storage.dtype, size, stride)


def _rebuild_parameter(tensor: _StoredTensor, requires_grad: bool, hooks: OrderedDict) -> _StoredTensor:
    if type(tensor) is not _StoredTensor or type(requires_grad) is not bool or type(hooks) is not OrderedDict or hooks:
        raise Refused("damaged")
    return tensor


def _device(*arguments: str | int) -> torch.device:
    return torch.device(*arguments)


KNOWN_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    PICKLED_TENSOR: _rebuild_tensor,
    PICKLED_PARAMETER: _rebuild_parameter,
}


class _Converter:
    """Replaces every _StoredTensor by a tensor on the meta device, and checks what else there is."""

    def __init__(self) -> None:
        self.converted: dict[int, tuple[Any, int]] = {}  # by id: the new value, and how many values are in it

    def convert(self, value: Any) -> Any:
        """Return the converted value.

        Raises:
            Refused: It has a type that is not plain data, contains itself, is nested too deep, or is too large when
                everything in it is visited.
        """
        return self._convert(value, 0)[0]

    def _convert(self, value: Any, depth: int) -> tuple[Any, int]:
        kind = type(value)
        if kind in PLAIN_TYPES:
            return value, 1
        if id(value) in self.converted:
            return self.converted[id(value)]
        if depth > MAX_DEPTH:  # also where a container contains itself
            raise Refused("it is nested too deep")
        new: Any
        if kind is _StoredTensor:
            new, count = torch.empty_strided(value.size, value.stride, dtype=value.dtype, device="meta"), 1
        elif kind in (dict, OrderedDict):
            items = [(key, *self._convert(item, depth + 1)) for key, item in value.items()]
            if not all(type(key) in (str, int) for key in value):
                raise Refused("a key is neither a text nor a number")
            new, count = kind((key, item) for key, item, _ in items), 1 + sum(count for _, _, count in items)
        elif kind in (list, tuple, torch.Size):
            pairs = [self._convert(item, depth + 1) for item in value]
            new, count = kind(item for item, _ in pairs), 1 + sum(count for _, count in pairs)
        else:
            raise Refused("it holds code")
        if count > MAX_VALUES:
            raise Refused("it has too many values")
        self.converted[id(value)] = new, count
        return new, count
