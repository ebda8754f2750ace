"""What a device can do: number formats, peak speed, free and used memory."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Dense bfloat16 FLOP/s from the data sheets. The first key that occurs in the name of the device applies.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the peak dense bfloat16 FLOP/s of a device, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------- memory


def used_memory(device: torch.device) -> int:
    """Return the bytes this process uses on the device; for a CPU, its resident set size."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _process_status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the highest `used_memory` since `reset_peak_memory`, or since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_status("VmHWM")


def _process_status(field: str) -> int:
    """Return a field of /proc/self/status in bytes; on other systems, the peak resident set size, or 0 if unknown."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines[field].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            import resource  # does not exist on Windows
        except ImportError:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start again from the memory in use now; without effect where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)  # give freed memory back to the system, so that it does not count
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets VmHWM, see proc(5)


def free_memory(device: torch.device) -> int | None:
    """Return the bytes this process can still allocate on the device.

    For a CPU this is the least of what the system and the memory limits of its control groups (containers) leave.
    Systems without /proc/meminfo do not report it: the result is then all memory of the machine, or None if that is
    unknown too.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows
            return None
    return min([free, *cgroup_free_memory()])


def cgroup_free_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield the bytes that each Linux control group of this process leaves below its limit, see cgroups(7).

    Page cache that can be reclaimed counts as free. Groups without a limit yield nothing.

    Args:
        root: Where the control group file systems are mounted, version 1 or 2.
        membership: The file that lists the groups of this process.
    """
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for hierarchy, controllers, group in groups:
        if hierarchy == "0":  # version 2
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit_file, usage_file, cache_key = names
        folder = mount / group.lstrip("/")
        for ancestor in (folder, *folder.parents):  # the limits of all ancestors apply
            if not ancestor.is_relative_to(mount):
                break
            try:
                limit = (ancestor / limit_file).read_text().strip()
                usage = int((ancestor / usage_file).read_text())
                statistics = dict(line.split() for line in (ancestor / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # the root group has no limit; others may not be readable
                continue
            if limit.isdecimal() and int(limit) < 2**60:  # version 1 writes a huge number for "no limit"
                yield max(0, int(limit) - usage + int(statistics.get(cache_key, 0)))


def configure_malloc() -> None:
    """Configure glibc's malloc to keep freed blocks of up to 32 MiB instead of returning them to the system.

    Otherwise every step maps and clears the gradients of a large embedding again, which takes a third of the step.
    """
    if sys.platform == "linux":
        library, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        if hasattr(library, "mallopt"):
            library.mallopt(mmap_threshold, 2**25)
            library.mallopt(trim_threshold, 2**29)
