"""Makes one ordinary checkpoint file of a folder of slices, which training with configs/fsdp.yaml writes.

python scripts/consolidate.py logs/gpt2/version_0/best.ckpt gpt2.ckpt
"""

import sys
from pathlib import Path

from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser
from lit_gpt.errors import UserError


def consolidate(words: list[str]) -> None:
    parser = LineParser(__doc__)
    parser.add_argument("folder", type=Path, help="of slices")
    parser.add_argument("file", type=Path, help="to be written")
    options = parser.parse_args(words)
    if options.file.exists():
        raise UserError(f"{options.file} is there already: give another name, or take it away")
    checkpoint = Checkpoint.open(options.folder, verify=False).read()
    save_checkpoint(checkpoint, options.file)
    print(f"step {checkpoint['global_step']:,}, {options.file.stat().st_size / 1e6:,.1f} MB: {options.file}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: consolidate(sys.argv[1:])))
