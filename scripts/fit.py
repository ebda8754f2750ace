"""Trains a GPT on a table of text: `python scripts/fit.py --help`."""

import sys
from pathlib import Path

from lit_gpt.cli import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    sys.exit(main(default_config=Path(__file__).resolve().parent.parent / "configs" / "default.yaml"))
