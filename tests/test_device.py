"""Queries about a device: free memory."""

from pathlib import Path

import torch

from lit_gpt.device import cgroup_free_memory, free_memory


def test_cgroup_free_memory_is_the_limit_minus_the_usage(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "groups"
    own.write_text("4:memory,x:/a/b\n1:cpu:/a\n0::/u/v\n")
    for group, names, limit, usage in (
        ("memory/a", ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), "1000", 300),
        ("memory/a/b", ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), str(2**63 - 4096), 200),
        ("u", ("max", "current", "inactive_file"), "max", 300),
        ("u/v", ("max", "current", "inactive_file"), "500", 600),
    ):
        (root / group).mkdir(parents=True)
        (root / group / f"memory.{names[0]}").write_text(limit + "\n")
        (root / group / f"memory.{names[1]}").write_text(f"{usage}\n")
        (root / group / "memory.stat").write_text(f"anon 1\n{names[2]} 50\n")
    assert list(cgroup_free_memory(root, own)) == [750, 0]
    assert list(cgroup_free_memory(root, tmp_path / "none")) == []


def test_free_memory_of_cpu_is_plausible() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 10**7 < free < 2**50
