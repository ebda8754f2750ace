"""Step and time of a checkpoint in the comment of its file, so that the newest of 10,000 is found without opening them.

The comment repeats what the contents say. It is a hint only: a damaged comment is not used, and a wrong one is found
when the checkpoint is opened.
"""

import contextlib
import io
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lit_gpt.files import open_regular

NON_TENSOR_FILE = "rest.pt"  # in the folder of a sharded checkpoint, everything that is not a tensor

COMMENT = re.compile(rb"(global_step=(\d{1,19}) saved_at=([0-9.e+]{1,30})) crc32=([0-9a-f]{8})")
MAX_COMMENT_BYTES = 100


class Order(NamedTuple):
    """What decides which of two checkpoints is newer."""

    step: int
    saved_at: float


def write_comment(file: BinaryIO, order: Order) -> None:
    """Write step and time of a checkpoint into the comment of its file, which `torch.save` has just written."""
    text = f"global_step={order.step} saved_at={order.saved_at!r}".encode()
    comment = text + b" crc32=%08x" % zlib.crc32(text)
    file.seek(-2, io.SEEK_END)  # a zip archive ends with the length of its comment, and the comment
    file.write(struct.pack("<H", len(comment)) + comment)


def read_comment(path: str | Path) -> Order | None:
    """Return what `write_comment` wrote for a checkpoint, a file or a folder; None if that is missing or damaged."""
    try:
        file = open_regular(path)
    except IsADirectoryError:
        return read_comment(Path(path, NON_TENSOR_FILE))
    except OSError:
        return None
    with file:
        with contextlib.suppress(OSError):  # the file is shorter
            file.seek(-MAX_COMMENT_BYTES, io.SEEK_END)
        match = COMMENT.search(file.read(MAX_COMMENT_BYTES))
    if match is None or int(match[4], 16) != zlib.crc32(match[1]):
        return None
    return Order(int(match[2]), float(match[3]))
