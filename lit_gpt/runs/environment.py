"""On what a run was made: the computer, the versions of libraries, the state of this package's git checkout."""

import contextlib
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import lit_gpt
from lit_gpt.device import available_cores

LIBRARIES = ("torch", "lightning", "numpy", "tiktoken", "pyarrow", "tensorboard")  # as far as they are imported
GIT_SECONDS = 5.0  # after which the state of a checkout stays unknown, for example on a slow network


def describe_machine(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what computes a run: cpu, cores, memory in bytes, devices and system.

    Args:
        device: The device of this process.
        world_size: The number of devices of the run.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory": _total_memory(),
        "devices": f"{world_size} x {name}",
        "system": f"{platform.system()} {platform.release()}",
    }


def library_versions() -> dict[str, str]:
    """Return the version of Python, of this package and of the libraries that are imported in this process."""
    modules = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    versions = {name: str(getattr(module, "__version__", "unknown")) for name, module in modules.items()}
    return {"python": platform.python_version(), "lit_gpt": lit_gpt.__version__, **versions}


@functools.cache
def git_state() -> dict[str, Any]:
    """Return the commit of this package's checkout and whether its tracked files are changed; {} if it is none.

    It is asked once in a process, because git takes some milliseconds.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():  # installed, or unpacked without git
        return {}
    # the paths are given because the environment may name another checkout, as in a hook
    command = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", "--no-optional-locks", "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        # in a session of its own, because Ctrl-C goes to all processes of a terminal
        ended = subprocess.run(
            command, capture_output=True, timeout=GIT_SECONDS, start_new_session=True, cwd=root, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = ended.stdout.decode("utf-8", "replace").splitlines()
    commits = [line.split()[-1] for line in lines if line.startswith("# branch.oid ")]
    return {"commit": commits[0], "changed": any(not line.startswith("#") for line in lines)} if commits else {}


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _total_memory() -> int | None:
    """Return the bytes of memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
