"""A call that fails ends a run in one line, and the run can be resumed: a sample of tests/faults.py."""

import errno
from pathlib import Path

import pytest
from faults import Fault, Scenario


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    return Scenario(tmp_path_factory.mktemp("new"), is_resumed=False)


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault("write", 5, errno.ENOSPC, persists=False), 2),  # the token cache
        (Fault("write", 18, errno.EIO, persists=False), 0),  # the summary
        (Fault("write", 70, "short", persists=False), 0),
        (Fault("write", 90, errno.ENOSPC, persists=True), 2),  # a checkpoint
        (Fault("fsync", 20, errno.EIO, persists=False), 2),
        (Fault("rename", 9, errno.EACCES, persists=False), 2),
        (Fault("open", 50, errno.EACCES, persists=False), 2),
    ],
    ids=str,
)
def test_run_with_a_fault_ends_in_one_line_and_equals_an_undisturbed_run_when_resumed(
    new_run: Scenario, fault: Fault, status: int
) -> None:
    assert new_run.check(fault) == (status, "")


def test_resumed_run_with_a_fault_equals_an_undisturbed_run(tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, is_resumed=True)
    for fault in (Fault("rename", 3, errno.EACCES, persists=False), Fault("write", 30, errno.ENOSPC, persists=True)):
        assert scenario.check(fault) == (2, "")
