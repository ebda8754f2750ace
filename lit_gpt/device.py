"""What a device can do: number formats, peak speed, free and used memory."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# dense bfloat16 operations a second, as the makers state them
PEAK_FLOPS = {  # of the first that is in a device's name
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The most bfloat16 operations a second `device` can do, where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def synchronize(device: torch.device) -> None:
    """Waits for what `device` was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the device, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes this process can still take on `device`: of the CPU's, what the system and a container's limit leave.

    Where the system does not tell what is free, all of the machine's; None: it tells nothing.
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
    return min([free, *left_to_groups()])


def left_to_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group around this process leaves of its limit, where it has one (Linux, cgroups(7))."""
    names = "memory.max memory.current inactive_file", "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file"
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for number, controllers, place in groups:
        if number != "0" and "memory" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "memory"
        limit, usage, cached = names[number != "0"].split()
        folder = top / place.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            try:
                most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                statistic = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # it has no limit, or is another's
                continue
            if most.isdecimal() and int(most) < 2**60:
                yield max(0, int(most) - used + int(statistic.get(cached, 0)))


def own_memory(device: torch.device, peak: bool = False) -> int:
    """Bytes this process holds on `device`, or has held at most since `forget_peak`, where the system can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        return peak_memory(device)


def forget_peak(device: torch.device) -> None:
    """Counts the peak of `own_memory` anew, where the system lets us, without what is free and only kept."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # proc(5)


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies in bfloat16, and not by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def keep_freed_memory() -> None:
    """Has glibc keep tensors of up to 32 MiB that are freed, for the next step.

    To give them back and take them anew is a third of a step where the gradients of the embedding are of that size.
    """
    if sys.platform == "linux":
        library, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1  # as in its malloc.h
        if hasattr(library, "mallopt"):
            library.mallopt(mmap_threshold, 2**25)
            library.mallopt(trim_threshold, 2**29)
