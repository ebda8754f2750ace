"""How the Trainer writes and opens a checkpoint file: atomically, and without running code in it."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint


class AtomicCheckpointIO(CheckpointIO):
    """Write the Trainer's checkpoints atomically, and open them without running code in them.

    Args:
        checkpoint: A checkpoint that is verified already. It is not verified again when the Trainer loads it.
    """

    def __init__(self, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Checkpoint.open(path, verify=not self.is_verified(path)).read()

    def is_verified(self, path: str | Path) -> bool:
        """Return whether the checkpoint at `path` is the one that is verified already."""
        return self.checkpoint is not None and self.checkpoint.path == Path(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        # A ModelCheckpoint of the user takes this path from the checkpoint it resumes from, and only compares how it
        # begins with its own folder.
        if ".." not in Path(path).parts:
            Path(path).unlink(missing_ok=True)
