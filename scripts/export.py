"""Write a model for Hugging Face, llama.cpp or a browser: `python scripts/export.py --help`."""

import sys

if __name__ == "__main__":
    from lit_gpt.cli.interrupts import exit_on_signals

    exit_on_signals()  # before the other imports, which take seconds
    from lit_gpt.cli.messages import prepare_console

    prepare_console()  # before the other imports, which may fail or warn
    from lit_gpt.cli.export import main

    sys.exit(main(sys.argv[1:]))
