"""Run scripts/consolidate.py: write a sharded checkpoint into one ordinary checkpoint file."""

from pathlib import Path

from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser
from lit_gpt.errors import UserError


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: consolidate(args))


def consolidate(args: list[str]) -> None:
    """Write the file and print its step and size.

    Raises:
        UserError: The folder is not a checkpoint, or is damaged; or the file exists already, or cannot be written.
    """
    parser = LineParser(
        "Write a sharded checkpoint, as training with configs/fsdp.yaml saves it, into one checkpoint file: "
        "python scripts/consolidate.py logs/gpt2/version_0/best.ckpt gpt2.ckpt"
    )
    parser.add_argument("folder", type=Path, help="sharded checkpoint")
    parser.add_argument("file", type=Path, help="checkpoint file to write")
    options = parser.parse_args(args)
    if options.file.exists():
        raise UserError(f"{options.file} already exists: give another name, or delete it")
    checkpoint = Checkpoint.open(options.folder)
    save_checkpoint(checkpoint.read(), options.file)
    print(f"step {checkpoint.step:,}, {options.file.stat().st_size / 1e6:,.1f} MB: {options.file}")
