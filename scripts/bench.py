"""Measure the speed of lit_gpt and of other projects at the same work: `python scripts/bench.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    from lit_gpt.cli.interrupts import exit_on_signals

    exit_on_signals()  # before the other imports, which take seconds
    from lit_gpt.cli.messages import prepare_console

    prepare_console()  # before the other imports, which may fail or warn
    from lit_gpt.benchmark.benchmark import main

    sys.exit(main(sys.argv[1:], default_config=Path(__file__).resolve().parent.parent / "configs" / "default.yaml"))
