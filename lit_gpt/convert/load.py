"""Open a model wherever it comes from: a checkpoint, a folder of Hugging Face, a GGUF file, or a name on the hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.model import GPT
from lit_gpt.tokenizer_base import Tokenizer

NAME_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
SUFFIXES = (".gguf", ".safetensors")


@dataclass(frozen=True)
class ImportedModel:
    """A model of another program. It has no training text, and no state of an optimizer.

    Attributes:
        path: A folder of Hugging Face, or a .safetensors in it, or a .gguf file.
    """

    path: Path

    def load_model(self) -> tuple[GPT, Tokenizer, str]:
        """Read the model; see `lit_gpt.load_model`."""
        if self.path.suffix.lower() == ".gguf":
            from lit_gpt.convert.gguf_file import read_gguf  # only needed here

            return read_gguf(self.path)
        from lit_gpt.convert.hugging_face_import import read_hugging_face  # only needed here

        return read_hugging_face(self.path)


def open_model(path: str | Path) -> Checkpoint | ImportedModel:
    """Return what has a model at a path, or under a name on the Hugging Face hub.

    Raises:
        UserError: Nothing is there, or a checkpoint is damaged.
    """
    path = Path(path)
    if NAME_ON_HUB.fullmatch(str(path)) and path.suffix not in (*SUFFIXES, ".ckpt") and not path.parent.exists():
        path = download(str(path))
    if is_imported(path):
        return ImportedModel(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a checkpoint, as logs/<name>/version_<n>/best.ckpt, a folder of Hugging Face "
            "or a .gguf file"
        )
    return Checkpoint.open(path)


def is_imported(path: Path) -> bool:
    """Whether the model of another program is at a path."""
    try:
        is_folder = path.is_dir() and (path / "config.json").exists()
        return is_folder or (path.suffix.lower() in SUFFIXES and path.exists())
    except (OSError, ValueError):  # no path: it is too long, or has a null character
        return False


def load_model(path: str | Path) -> tuple[GPT, Tokenizer, str]:
    """Load a model with its tokenizer.

    Example:
        >>> model, tokenizer, mode = load_model("logs/poems/version_0/best.ckpt")
        >>> model, tokenizer, mode = load_model("SmolLM2-135M")

    Args:
        path: A checkpoint; a folder of Hugging Face, or a .safetensors in it; or a .gguf file. Where nothing has this
            path: a name on the Hugging Face hub, as "owner/model", which `huggingface_hub` downloads if installed.

    Returns:
        The model in evaluation mode, on the CPU, with float32 weights; its tokenizer; and its `data.mode`, "rows" or
        "raw".

    Raises:
        UserError: There is no such model, or it is damaged, or has a part that ours lacks.
    """
    return open_model(path).load_model()


def download(name: str) -> Path:
    """Download a model from the Hugging Face hub, or find it in the cache of `huggingface_hub`.

    Raises:
        UserError: `huggingface_hub` is not installed, or finds no such model.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name}: no such file or folder: give a path; for a name on the Hugging Face hub, pip install "
            "huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the library raises what its network client raises
        raise UserError(
            f"{name}: no such path here, and the Hugging Face hub does not give it ({type(error).__name__}): check the "
            "name and the network"
        ) from None
