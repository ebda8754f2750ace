"""Read the curves and the sample texts of a run from its event files."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lit_gpt.files import open_regular

Curve = list[tuple[int, float]]  # (step, value), each step once, in ascending order

# Above this many bytes of event files only a part of the events is parsed, so that a report takes seconds after days of
# training. Events that contain one of the rare tags are all parsed.
MAX_PARSED_BYTES = 20 * 2**20
RARE_TAGS = (b"loss/val", b"forecast/", b"samples/")
MAX_EVENT_BYTES = 2**26


@dataclass
class Events:
    """What the event files of a run hold.

    Attributes:
        curves: tag -> curve.
        texts: tag -> step -> text, in Markdown.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    texts: dict[str, dict[int, str]] = field(default_factory=dict)


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """Return the curves in the event files directly in the folder of a run: tag -> [(step, value)]."""
    return read_events(folder).curves


def read_events(folder: str | Path) -> Events:
    """Read the event files directly in the folder of a run.

    A file that is damaged, or cut off because its process was killed, is read up to that place. Symbolic links are not
    followed.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    paths = [path for path in Path(folder).glob("events.*") if path.is_file() and not path.is_symlink()]
    # by time, process and number: the file of a resumed run comes after those before
    paths.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    stride = 1 + sum(path.stat().st_size for path in paths) // MAX_PARSED_BYTES
    curves: dict[str, dict[int, float]] = {}
    events = Events()
    for path in paths:
        for number, record in enumerate(_records(path)):
            if number % stride and not any(tag in record for tag in RARE_TAGS):
                continue
            try:
                event = Event.FromString(record)
            except DecodeError:
                break
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curves.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.metadata.plugin_data.plugin_name == "text" and value.tensor.string_val:
                    text = value.tensor.string_val[0].decode("utf-8", "replace")
                    events.texts.setdefault(value.tag.removesuffix("/text_summary"), {})[event.step] = text
    events.curves = {tag: sorted(points.items()) for tag, points in curves.items()}
    return events


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file: length (8 bytes), checksum (4), record, checksum (4).

    The reader of the tensorboard package compares the checksums in Python, which takes five times as long as all the
    rest, and needs most of a second to be imported.
    """
    try:
        with open_regular(path) as file:
            while len(header := file.read(12)) == 12:
                (length,) = struct.unpack_from("<Q", header)
                if length > MAX_EVENT_BYTES:
                    return
                record = file.read(length + 4)
                if len(record) < length + 4:
                    return
                yield record[:-4]
    except OSError:  # what is read so far is shown
        return
