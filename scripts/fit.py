"""Train a GPT on a table of text: `python scripts/fit.py --help`."""

import gc
import os
import signal
import sys
import time
from pathlib import Path

import lit_gpt

if __name__ == "__main__":
    # When the process began, as far as its CPU time tells: --budget counts from there.
    start = time.perf_counter() - time.process_time()
    if sys.argv[1:] == ["--version"]:  # before the imports below, which take seconds
        print(f"lit_gpt {lit_gpt.__version__}")  # noqa: T201
        sys.exit(0)
    from lit_gpt.cli.interrupts import exit_on_signals

    # Until `main` handles signals. A process that Lightning started for another device ignores them: the first process
    # ends it.
    if os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)
    else:
        exit_on_signals(signal.SIGINT, signal.SIGTERM)
    gc.disable()  # imports create hardly any garbage, and each collection traverses all that has been imported so far
    from lit_gpt.cli.messages import prepare_console

    prepare_console()  # before the other imports, which may fail or warn
    from lit_gpt.cli.main import main

    gc.enable()

    sys.exit(main(default_config=Path(__file__).resolve().parent.parent / "configs" / "default.yaml", start=start))
