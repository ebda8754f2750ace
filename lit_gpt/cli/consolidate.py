"""Run scripts/consolidate.py: write a checkpoint, sharded or not, into one file; or only its weights."""

import torch

from lit_gpt.checkpoint.store import Checkpoint, write_contents
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, print_lines
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_write, expand_path, write_error

DESCRIPTION = """Write a checkpoint into one file: a sharded one, as training with
configs/fsdp.yaml saves it; or, with --weights, the weights of any checkpoint,
which torch.load("FILE", weights_only=True) opens."""
EXAMPLES = (
    "python scripts/consolidate.py logs/gpt2/version_0/best.ckpt gpt2.ckpt",
    "python scripts/consolidate.py --weights logs/poems/version_0/best.ckpt w.pt",
)


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: consolidate(args))


def consolidate(args: list[str]) -> None:
    """Write the file and print its step and size.

    Raises:
        UserError: The source is not a checkpoint, or is damaged; or the file exists already, or cannot be written.
    """
    parser = LineParser("python scripts/consolidate.py [--weights] SOURCE FILE", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source", metavar="SOURCE", type=expand_path, help="checkpoint: a file, or the folder of a sharded one"
    )
    parser.add_argument("file", metavar="FILE", type=expand_path, help="file to write, which does not exist yet")
    parser.add_argument("--weights", action="store_true", help="write only the state_dict of the GPT")
    options = parser.parse_args(args)
    if options.file.exists():
        raise UserError(f"{options.file} already exists: give another name, or delete it")
    checkpoint = Checkpoint.open(options.source)
    contents = checkpoint.load_model()[0].state_dict() if options.weights else checkpoint.read()
    try:
        write = torch.save if options.weights else write_contents
        atomic_write(options.file, lambda file: write(contents, file))
    except OSError as error:
        raise write_error(options.file, error, "give a file elsewhere") from error
    print_lines(f"step {checkpoint.step:,}, {options.file.stat().st_size / 1e6:,.1f} MB: {options.file}")
