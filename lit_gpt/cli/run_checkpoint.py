"""Find the checkpoint of a command that names a run, or nothing, instead of a file."""

from pathlib import Path

from lit_gpt.checkpoint.runs import newest_checkpoint, run_names
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.messages import print_lines
from lit_gpt.errors import UserError, did_you_mean

# The values of `--ckpt_path` that are no path. `best` is the best checkpoint of the newest run, or its newest one if it
# has none; `last` is the newest checkpoint. `auto` is the same as `last` for fit, which starts a run if there is none,
# and the same as `best` for every command that does not train.
CHOICES = ("last", "best", "auto")

# What to do where there is no checkpoint: for fit, and for the other commands.
START = "give --ckpt_path auto to start a run where there is none"
TRAIN = "train one with scripts/fit.py, or give the path of one as --ckpt_path"

MAX_NAMES = 5  # runs that an error lists


def find_checkpoint(choice: str, logs: Path, name: str | None) -> Checkpoint | None:
    """Open the checkpoint that a command uses; warn of damaged ones that are skipped.

    Args:
        choice: `last` or `best`.
        logs: The folder of all runs.
        name: The name of the run; None: of any run.

    Returns:
        The checkpoint, verified; None if there is none.

    Raises:
        UserError: All of them are damaged.
    """
    checkpoint, warning = newest_checkpoint(logs, name, prefer_best=choice == "best")
    if warning:
        print_lines(f"warning: {warning}", to_stderr=True)
    return checkpoint


def no_checkpoint_error(logs: Path, name: str | None, remedy: str) -> UserError:
    """Return the error that a run has no checkpoint. It lists the runs that have one, the newest first.

    Args:
        logs: The folder of all runs.
        name: The name of the run; None: of any run.
        remedy: What to do besides giving the name of another run.
    """
    names = run_names(logs)
    if not names:
        return UserError(f"there is no checkpoint {'' if name is None else f'of {name!r} '}under {logs}: {remedy}")
    listed = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
    return UserError(
        f"there is no checkpoint of {name!r} under {logs}{did_you_mean(str(name), names)}: give --name with a run that "
        f"has one (newest first: {listed}), or {remedy}"
    )
