"""Files of torch.save that would cost more than their size warrants, or hold what no checkpoint holds, are refused.

Each is refused in one line by everything that opens a checkpoint, with little memory, before torch opens the file.
"""

import io
import pickle
import pickletools
import resource
import struct
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fit
from test_sharded_folder import update_digests, write_folder

from lit_gpt import UserError
from lit_gpt.checkpoint.archive import MAX_CALLS, MAX_OPCODES, OPCODES, Refused, examine
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.generate import main as generate
from lit_gpt.compat import PICKLED_TENSOR

MEGABYTE = 2**20


def examined(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return examine(file)


def test_examine_returns_plain_data_and_the_shapes_of_tensors() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    value = {
        "tensors": OrderedDict(
            weight=weight, part=weight.data[1:, ::2], scalar=torch.tensor(3), empty=torch.ones(0, 5)
        ),
        "plain": [None, True, -7, 2**62, 0.5, "text é", (1, (2,)), {"a": {3: []}}],
        "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        **{str(dtype): torch.zeros(3, dtype=dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.uint8)},
    }
    found = examined(value)
    assert (found["plain"], found["torch"]) == (value["plain"], value["torch"])
    assert type(found["tensors"]) is OrderedDict
    expected = {**value["tensors"], **{name: t for name, t in value.items() if isinstance(t, torch.Tensor)}}
    for name, tensor in {**found["tensors"], **{n: t for n, t in found.items() if n.startswith("torch.")}}.items():
        assert tensor.is_meta
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (
            expected[name].shape,
            expected[name].stride(),
            expected[name].dtype,
        )


# ---------------------------------------------------------------------------------------------------- crafted archives


def archive(content: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """Return a file as torch.save writes it, with another pickle and other storages."""
    file = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)
    records = {"data.pkl": content, "byteorder": b"little", **{f"data/{k}": v for k, v in (storages or {}).items()}}
    for name, record in records.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return file.getvalue()


class Storage:
    """A reference to a storage in an archive."""

    def __init__(self, key: str, numel: int) -> None:
        self.saved_id = ("storage", torch.FloatStorage, key, "cpu", numel)


class Call:
    """Is pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def pickled(value: Any) -> bytes:
    """Pickle a value as torch.save does, with Storage for storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.saved_id if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(size: tuple[int, ...], stride: tuple[int, ...], numel: int = 8, offset: int = 0, key: str = "0") -> Call:
    function = getattr(torch._utils, PICKLED_TENSOR[1])
    return Call(function, Storage(key, numel), offset, size, stride, False, OrderedDict())


def nested(depth: int) -> list[Any]:
    """Return a list that takes 2 ** depth visits."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value, value]
    return value


def deep(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def build_bomb() -> bytes:
    """Return a pickle that sets the same 10,000 attributes of one object 200 times."""
    state = {str(i): i for i in range(10_000)}  # its place in the memo is 0
    set_again = b"h\x00b" * 200
    return pickled(state)[:-1] + b"ccollections\nOrderedDict\n)R" + set_again + b"\x86."


STORAGE = {"0": bytes(32)}

PICKLES: dict[str, bytes] = {
    "stride 0": pickled(tensor((10**6, 10**6), (0, 0))),
    "stride 0 in one dimension": pickled(tensor((3, 4), (0, 1))),
    "beyond the end": pickled(tensor((8,), (1,), offset=1)),
    "negative stride": pickled(tensor((2,), (-1,), offset=4)),
    "negative size": pickled(tensor((-2, -2), (1, 1))),
    "size of a tensor is text": pickled(tensor(("2",), (1,))),  # type: ignore[arg-type]
    "more elements than bytes": pickled(tensor((10**9,), (1,), numel=10**9)),
    "fewer elements than bytes": pickled(tensor((1,), (1,), numel=1)),
    "missing storage": pickled(tensor((8,), (1,), key="1")),
    "storage of another file": pickled(tensor((8,), (1,), key="../data.pkl")),
    "exploding lists": pickled(nested(40)),
    "deep lists": deep(100_000),
    "too many values": b"\x80\x02(" + b"]" * MAX_OPCODES + b"l.",
    "too many calls": b"\x80\x02](" + b"ccollections\nOrderedDict\n)R" * (MAX_CALLS + 1) + b"e.",
    "attributes set again and again": build_bomb(),
    "memo of gigabytes": b"\x80\x02]r\xff\xff\xff\xff.",
    "huge number": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "list that contains itself": b"\x80\x02]q\x00h\x00a.",
    "truncated text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "copies of a list": pickled([Call(OrderedDict, [(i, i) for i in range(100)])]),
    "bytearray": pickled(Call(bytearray, 10**9)),
    "tensor of its own size": pickled(Call(torch.Tensor, 10**9)),
    "storage of its own size": pickled(Call(torch.UntypedStorage, 10**10)),
    "counter": pickled(Counter("abc")),
    "set": pickled({1, 2}),
    "bytes": pickled(b"abc"),
    "complex number": pickled(1j),
    "code": pickled(Call(print, "harm")),
}


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickle_is_refused_cheaply(name: str) -> None:
    file = io.BytesIO(archive(PICKLES[name], STORAGE))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused):
        examine(file)
    assert time.perf_counter() - start < 10  # seconds, on a machine that does other things too
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KB


def test_undamaged_crafted_archive_is_accepted() -> None:
    """So that the cases above are refused for what they are."""
    found = examine(io.BytesIO(archive(pickled([tensor((2, 4), (4, 1)), nested(5)]), STORAGE)))
    assert found[0].shape == (2, 4)
    assert found[1] == nested(5)


def special_tensors() -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = torch.eye(3)
        quantized = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
        jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        compressed = [dense.to_sparse_csr(), dense.to_sparse_csc(), dense.to_sparse_bsr((1, 1))]
        meta = torch.empty(10**6, 10**6, device="meta")
        return [dense.to_sparse(), *compressed, quantized, jagged, meta, dense.to(torch.complex64), dense.conj()]


@pytest.mark.parametrize("number", range(8))
def test_only_plain_dense_tensors_are_accepted(number: int) -> None:
    with pytest.raises(Refused):
        examined(special_tensors()[number])


def test_tensor_subclass_and_tensor_with_attributes_are_refused() -> None:
    content = pickled(Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (), {}))
    with pytest.raises(Refused):
        examine(io.BytesIO(archive(content, STORAGE)))
    attributed = torch.ones(2)
    attributed.note = "more"  # type: ignore[attr-defined]
    with pytest.raises(Refused):
        examined(attributed)


# ----------------------------------------------------------------------------------------------------- the zip archive


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_of_other_programs_and_compressed_ones_are_refused(method: int) -> None:
    file, rewritten = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(MEGABYTE)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(rewritten, "w", method) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(Refused):
        examine(rewritten)


def directory_entries(content: bytes) -> list[int]:
    """Return the positions of the entries in the directory of an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        count, position = len(opened.infolist()), opened.start_dir
    positions = []
    for _ in range(count):
        positions.append(position)
        name, extra, comment = struct.unpack_from("<3H", content, position + 28)
        position += 46 + name + extra + comment
    return positions


# (offset in an entry of the directory, format, value)
DIRECTORY_EDITS = {
    "compressed": (10, "<H", 8),
    "encrypted": (8, "<H", 1),
    "longer than the file": (20, "<2L", (2**30, 2**30)),
    "longer when it is unpacked": (24, "<L", 2**30),
    "overlapping": (42, "<L", 0),
    "outside": (42, "<L", 2**31),
    "attributes": (38, "<L", 16),
}


@pytest.mark.parametrize("name", DIRECTORY_EDITS)
def test_edited_directory_is_refused(name: str) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(1000), "b": torch.ones(1000)}, file)
    content = bytearray(file.getvalue())
    offset, form, value = DIRECTORY_EDITS[name]
    struct.pack_into(
        form, content, directory_entries(content)[5] + offset, *(value if type(value) is tuple else (value,))
    )
    with pytest.raises(Refused):
        examine(io.BytesIO(content))


def test_archive_with_something_before_or_after_it_is_refused() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(10)}, file)
    content = file.getvalue()
    for crafted in (b"x" + content, content + b"x", content * 2, content + content[-22:], b"", content[:200]):
        with pytest.raises(Refused):
            examine(io.BytesIO(crafted))


def test_name_that_zipfile_would_change_is_refused() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(10)}, file)
    content = bytearray(file.getvalue())
    content[content.rindex(b"byteorder") + 4] = 0  # in the directory; zipfile ends the name here
    with pytest.raises(Refused, match="name of an entry"):
        examine(io.BytesIO(content))


def test_file_of_the_older_format_with_an_archive_at_its_end_is_refused() -> None:
    """torch.load would return the contents of the older format, and `examine` those of the archive."""
    older, archived = io.BytesIO(), io.BytesIO()
    torch.save({"a": "older"}, older, _use_new_zipfile_serialization=False)
    torch.save({"a": "archived"}, archived)
    added, content = len(older.getvalue()), bytearray(archived.getvalue())
    end = content.rindex(b"PK\6\6")  # the records after the directory
    for position in (*(entry + 42 for entry in directory_entries(content)), len(content) - 6):
        struct.pack_into("<L", content, position, struct.unpack_from("<L", content, position)[0] + added)
    for position in (end + 48, end + 64):  # of the directory and of its record
        struct.pack_into("<Q", content, position, struct.unpack_from("<Q", content, position)[0] + added)
    crafted = io.BytesIO(older.getvalue() + content)
    assert torch.load(crafted, weights_only=True) == {"a": "older"}
    assert zipfile.ZipFile(crafted).testzip() is None
    with pytest.raises(Refused):
        examine(crafted)


# ------------------------------------------------------------------------------------------------------- the commands


LAST = Path("logs/small/version_0/last.ckpt")


def config_edit(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def edit(contents: dict[str, Any]) -> None:
        contents["hyper_parameters"]["config"].update(changes)
        for key, value in changes.items():
            old = next(line for line in contents["config"].splitlines() if line.strip().startswith(f"{key}:"))
            contents["config"] = contents["config"].replace(old, f"{old.partition(':')[0]}: {value}")

    return edit


BOMBS: dict[str, Callable[[dict[str, Any]], object]] = {
    "context_length": config_edit(context_length=10**9),
    "d_model": config_edit(d_model=10**6),
    "num_blocks": config_edit(num_blocks=10**9),
    "num_heads": config_edit(num_heads=10**18),
    "lists": lambda contents: contents["hyper_parameters"].update(x=nested(40)),
    "stride 0": lambda contents: contents["state_dict"].update({"gpt.x": torch.zeros(1).expand(10**9)}),
    "one tensor under many names": lambda contents: contents["state_dict"].update(
        {f"gpt.{i}": contents["state_dict"]["gpt.embedding.weight"] for i in range(1000)}
    ),
    "sparse": lambda contents: contents["state_dict"].update({"gpt.x": torch.eye(2).to_sparse()}),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_commands_refuse_bombs_in_one_line_with_little_memory(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, edit in BOMBS.items():
        contents = torch.load(LAST, weights_only=True)
        edit(contents)
        torch.save(contents, "bomb.ckpt")
        command = "fit" if name in ("context_length", "num_blocks") else "validate"
        result = fit(command, "--ckpt_path", "bomb.ckpt", config=None)
        assert (result.status, result.err.count("\n")) == (2, 1), (name, result.err)
        assert "bomb.ckpt" in result.err
        assert generate(["--ckpt_path", "bomb.ckpt"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KB


@pytest.mark.parametrize("name", ["exploding lists", "too many values", "memo of gigabytes", "stride 0", "code"])
@pytest.mark.parametrize("file", ["rest.pt", "__0_0.distcp"])
def test_bombs_in_a_checkpoint_folder_are_refused(tmp_path: Path, name: str, file: str) -> None:
    folder = write_folder(tmp_path / "last.ckpt")
    (folder / file).write_bytes(archive(PICKLES[name], STORAGE))
    update_digests(folder)
    with pytest.raises(UserError) as raised:
        Checkpoint.open(folder).read()
    assert "\n" not in str(raised.value)


def test_opcodes_are_those_of_torch_save() -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2), "b": [1, (2, 3, 4, 5), 70_000, 2**40, 0.5, None, True, False, {}], "c": ()}, file)
    with zipfile.ZipFile(file) as opened:
        found = {opcode.name for opcode, *_ in pickletools.genops(opened.read("archive/data.pkl"))}
    assert found <= OPCODES
