"""Generate text with a trained model: `python scripts/generate.py --help`."""

import sys

if __name__ == "__main__":
    from lit_gpt.cli.generate import main

    if sys.stdout is not None:  # it may be closed
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    sys.exit(main(sys.argv[1:]))
