"""Trains a GPT on a table of text: `python scripts/fit.py --help`."""

import os
import signal
import sys
from pathlib import Path

import lit_gpt

if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:  # at once, where the rest imports for seconds
        print(f"lit_gpt {lit_gpt.__version__}")
        sys.exit(0)
    # until main hears signals: no traceback out of an import; a process for another device is ended by the first one
    helps = os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN if helps else signal.SIG_DFL)
    from lit_gpt.cli.main import main

    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it may be closed
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    sys.exit(main(default_config=Path(__file__).resolve().parent.parent / "configs" / "default.yaml"))
