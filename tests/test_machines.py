"""Several machines: ranks started by torchrun or SLURM train together, and none waits forever for a lost one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, at_step, forked, points

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")
TWO_RANKS = [
    "--config",
    "small.yaml",
    "--trainer.devices",
    2,
    "--trainer.strategy",
    "ddp",
    "--data.global_batch_size",
    8,
]
NO_SAMPLES = ["--generate.prompts", "[]"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# a stand-in for srun: starts two tasks, passes SIGTERM on to them, and exits with the highest of their statuses
SRUN = """#!/bin/bash
trap 'kill -TERM $tasks' TERM
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NODEID=0 SLURM_NTASKS=2 SLURM_NODELIST=127.0.0.1 "$@" &
    tasks="$tasks $!"
done
highest=0
for task in $tasks; do
    wait "$task"; while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task"; status=$?
    [ $status -gt $highest ] && highest=$status
done
exit $highest
"""


def pid_of_rank_1() -> int:
    """Return the id of the process that Lightning has started for rank 1."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = path.read_text().rpartition(")")[2].split()
        if int(fields[1]) == os.getpid() and b"LOCAL_RANK=1" in (path.parent / "environ").read_bytes():
            return int(path.parent.name)
    raise AssertionError("no such process")


def test_rank_0_ends_in_one_line_when_rank_1_is_killed(folder: Path) -> None:
    def kill_rank_1(module: LitGPT) -> None:
        os.kill(pid_of_rank_1(), signal.SIGKILL)
        (folder / "killed").write_text(str(time.monotonic()))

    ended = forked(folder, "--config", "small.yaml", *TWO_RANKS, *NO_SAMPLES, prepare=at_step(6, kill_rank_1))
    seconds = time.monotonic() - float((folder / "killed").read_text())
    assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
    assert "rank 0: another process of the run is gone or out of reach (" in ended.err
    assert "; the last good checkpoint is logs/small/version_0/last.ckpt, step 5; the best checkpoint is" in ended.err
    assert ended.err.endswith(" --name small --ckpt_path last\n")
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 5
    assert seconds < 10


def test_exception_on_one_rank_is_reported_once_and_ends_the_other(folder: Path) -> None:
    def fail(module: LitGPT) -> None:
        raise RuntimeError("a bug")

    ended = forked(folder, "--config", "small.yaml", *TWO_RANKS, *NO_SAMPLES, prepare=at_step(6, fail))
    assert ended.status == 1
    assert ended.err.count("Traceback") == ended.err.count("RuntimeError: a bug") == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 5\n" in ended.err


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Create two connected network namespaces, as two machines; skip where this process may not create them."""
    names = [f"lit_gpt_{os.getpid()}_{n}" for n in (0, 1)]
    script = f"""
set -e
ip netns add {names[0]}; ip netns add {names[1]}
ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}
for n in 0 1; do
    ip -n {names[0][:-1]}$n link set lo up; ip -n {names[0][:-1]}$n link set cable up
    ip -n {names[0][:-1]}$n addr add 10.0.0.$((n + 1))/24 dev cable
done
"""
    try:
        if shutil.which("ip") is None or subprocess.run(["sh", "-c", script], capture_output=True).returncode != 0:
            pytest.skip("network namespaces cannot be created here")
        yield names
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host: str, rank: int, *flags: object) -> subprocess.Popen[str]:
    """Start the README's torchrun command on one of two machines."""
    rendezvous = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank, "--master-addr", "10.0.0.1"]
    machines = ["--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp"]
    script = [ROOT / "scripts" / "fit.py", "--config", "small.yaml", *NO_SAMPLES, *machines, *flags]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *map(str, [*TORCHRUN, *rendezvous, *script])],
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "cable"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_machines_equal_one_and_both_end_when_the_connection_is_lost(fit: Fit, hosts: list[str]) -> None:
    shared = ["--data.global_batch_size", 8, "--trainer.max_steps", 20]
    assert fit(*NO_SAMPLES, *shared, "--name", "one").status == 0
    both = [start(host, rank, *shared, "--name", "two") for rank, host in enumerate(hosts)]
    printed = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert (printed[0][0].count("parameters"), printed[1][0]) == (1, "")  # only rank 0 prints
    assert [path.name for path in Path("logs/two").iterdir()] == ["version_0"]
    one, two = (points(Path(f"logs/{name}/version_0")) for name in ("one", "two"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(two[tag], one[tag], rtol=0, atol=1e-5)

    endless = ["--data.global_batch_size", 8, "--trainer.max_steps", 10**6, "--trainer.val_check_interval", 10**6]
    flags = [*endless, "--checkpoint.every_n_steps", 10, "--timeout", 2, "--name", "cut"]
    both = [start(host, rank, *flags) for rank, host in enumerate(hosts)]
    while not list(Path("logs").glob("cut/version_0/step_*.ckpt")) and both[0].poll() is None:
        time.sleep(0.05)
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable", "down"], check=True)
    time_of_cut = time.monotonic()
    printed = [process.communicate(timeout=60) for process in both]
    assert 1 < time.monotonic() - time_of_cut < 15
    assert [process.returncode for process in both] == [1, 1]
    for rank, (_, err) in enumerate(printed):
        (line,) = [line for line in err.splitlines() if line.startswith(f"rank {rank}: ")]
        assert "another process of the run is gone or out of reach (Timed out waiting 2000ms" in line
        assert "resume it with: start on every machine, as before: " in line
        assert ("the last good checkpoint is logs/cut/version_0/last.ckpt" in line) == (rank == 0)


def test_ranks_that_read_different_text_are_refused(folder: Path) -> None:
    """Two ranks of one torchrun, each in a folder of its own, read different files of the same name."""
    for rank in (0, 1):
        Path(f"rank{rank}").mkdir()
        Path(f"rank{rank}/rows.txt").write_text(f"row {rank} of a text\n" * 50)
    program = Path("apart.py")
    program.write_text(
        "import os, sys, pathlib; from lit_gpt.cli.main import main\n"
        f"os.chdir('rank' + os.environ['RANK']); sys.exit(main(pathlib.Path({str(ROOT / 'configs/default.yaml')!r})))\n"
    )
    words = ["--nproc-per-node", "2", "--master-port", "29617", str(program), "--config", str(folder / "small.yaml")]
    flags = [*NO_SAMPLES, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ended = subprocess.run([*TORCHRUN, *words, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.count("error: the processes of this run do not all find the same text") == 1
    assert "Traceback" not in ended.stderr.partition("torch/distributed")[0]
    assert not Path("rank0/logs").exists()


def test_slurm_job_saves_is_requeued_and_resumes_until_it_is_complete(folder: Path) -> None:
    """Run scripts/slurm.sh with stand-ins for srun and scontrol."""
    Path("bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": '#!/bin/sh\necho "$@" >> requeued\n'}.items():
        Path("bin", name).write_text(text)
        Path("bin", name).chmod(0o755)
    Path("scripts").symlink_to(ROOT / "scripts")
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NAME": "lit_gpt",
    }
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [
        "bash",
        str(ROOT / "scripts" / "slurm.sh"),
        "--config",
        "small.yaml",
        *NO_SAMPLES,
        "--data.global_batch_size",
        "8",
    ]

    def submit(steps: int, signum: int | None) -> tuple[int, str, str]:
        """Run the job; send `signum` to it when it has saved a checkpoint."""
        flags = ["--trainer.max_steps", str(steps), "--checkpoint.every_n_steps", "10", "--trainer.val_check_interval"]
        with subprocess.Popen(
            [*words, *flags, "1000"],
            env={**ENVIRONMENT, **job, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            while signum is not None and not list(RUN.glob("step_*.ckpt")) and process.poll() is None:
                time.sleep(0.05)
            if signum is not None:
                process.send_signal(signum)
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    status, out, err = submit(10**6, signal.SIGUSR1)
    assert status == 143, err
    assert out.startswith("no checkpoint of 'small' under logs: starting from the beginning\n")
    assert err.splitlines()[-1].startswith("stopped at step ")
    assert "resume it with: start on every machine, as before: scripts/fit.py " in err
    assert Path("requeued").read_text() == "requeue 4711\n"
    step = Checkpoint.open(RUN / "last.ckpt").step
    status, out, err = submit(step + 5, None)
    assert (status, err) == (0, "")
    assert f"resumed     logs/small/version_0/last.ckpt, step {step:,}" in out
    assert [path.name for path in Path("logs/small").iterdir()] == ["version_0"]
    assert [at for at, _ in points(RUN)["loss/train"]] == list(range(1, step + 6))
    assert Path("requeued").read_text() == "requeue 4711\n"  # a complete job is not requeued
