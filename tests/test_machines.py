"""Several machines: processes started by torchrun or SLURM train as one, and none waits for one that is gone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, forked, points

from lit_gpt.checkpoint.store import open_checkpoint
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")
PAIR = ["--config", "small.yaml", "--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]
QUIET = ["--generate.prompts", "[]"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

# what srun does of what scripts/slurm.sh asks: starts the tasks, passes SIGTERM on, ends with the highest status
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


def at_step(step: int, rank: int, act: Callable[[], object]) -> Callable[[], None]:
    """Has the processes Lightning starts do `act` at that step, from 1, in the one of that rank."""

    def prepare() -> None:
        training_step = LitGPT.training_step

        def instead(module: LitGPT, *args: object) -> torch.Tensor:
            if (module.trainer.global_step, module.global_rank) == (step - 1, rank):
                act()
            return training_step(module, *args)  # type: ignore[arg-type]

        LitGPT.training_step = instead  # type: ignore[method-assign, assignment]

    return prepare


def other_rank() -> int:
    """The process that Lightning has started beside this one."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = path.read_text().rpartition(")")[2].split()
        if int(fields[1]) == os.getpid() and b"LOCAL_RANK=1" in (path.parent / "environ").read_bytes():
            return int(path.parent.name)
    raise AssertionError("there is none")


def test_a_rank_that_is_killed_ends_the_other_at_once_in_a_line(folder: Path) -> None:
    def kill() -> None:
        os.kill(other_rank(), signal.SIGKILL)
        (folder / "killed").write_text(str(time.monotonic()))

    ended = forked(folder, *PAIR, *QUIET, prepare=at_step(6, 0, kill))
    after = time.monotonic() - float((folder / "killed").read_text())
    assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
    assert "rank 0: another process of the run is gone or out of reach (" in ended.err
    assert "; the last good checkpoint is logs/small/version_0/last.ckpt, step 5; the best checkpoint is" in ended.err
    assert ended.err.endswith(" --name small --ckpt_path last\n")
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 5
    assert after < 10


def test_a_rank_that_raises_says_why_and_ends_the_other(folder: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    ended = forked(folder, *PAIR, *QUIET, prepare=at_step(6, 0, fail))
    assert ended.status == 1
    assert ended.err.count("Traceback") == ended.err.count("RuntimeError: a bug") == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 5\n" in ended.err


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, as two machines; skipped where this process may not make them."""
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
            pytest.skip("network namespaces cannot be made here")
        yield names
    finally:
        for name in names if shutil.which("ip") else []:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(host: str, rank: int, *words: object) -> subprocess.Popen[str]:
    """torchrun's line of the README on one of two machines."""
    where = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank, "--master-addr", "10.0.0.1"]
    words = ("--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp", *words)
    line = [*TORCHRUN, *where, ROOT / "scripts" / "fit.py", "--config", "small.yaml", *QUIET, *words]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *map(str, line)],
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "cable"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_machines_train_as_one_and_neither_waits_for_a_cable_that_is_cut(fit: Fit, hosts: list[str]) -> None:
    shared = ["--data.global_batch_size", 8, "--trainer.max_steps", 20]
    assert fit(*QUIET, *shared, "--name", "one").status == 0
    both = [start(host, rank, *shared, "--name", "two") for rank, host in enumerate(hosts)]
    told = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert (told[0][0].count("parameters"), told[1][0]) == (1, "")  # one preflight, by the first
    assert [path.name for path in Path("logs/two").iterdir()] == ["version_0"]
    one, two = (points(Path(f"logs/{name}/version_0")) for name in ("one", "two"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(two[tag], one[tag], rtol=0, atol=1e-5)

    endless = ["--data.global_batch_size", 8, "--trainer.max_steps", 10**6, "--trainer.val_check_interval", 10**6]
    words = [*endless, "--checkpoint.every_n_steps", 10, "--timeout", 2, "--name", "cut"]
    both = [start(host, rank, *words) for rank, host in enumerate(hosts)]
    while not list(Path("logs").glob("cut/version_0/step_*.ckpt")) and both[0].poll() is None:
        time.sleep(0.05)
    subprocess.run(["ip", "-n", hosts[1], "link", "set", "cable", "down"], check=True)
    cut = time.monotonic()
    told = [process.communicate(timeout=60) for process in both]
    assert 1 < time.monotonic() - cut < 15
    assert [process.returncode for process in both] == [1, 1]
    for rank, (_, err) in enumerate(told):
        (line,) = [line for line in err.splitlines() if line.startswith(f"rank {rank}: ")]
        assert "another process of the run is gone or out of reach (Timed out waiting 2000ms" in line
        assert "resume it with: start on every machine, as before: " in line
        assert ("the last good checkpoint is logs/cut/version_0/last.ckpt" in line) == (rank == 0)


def test_machines_that_see_different_text_are_refused(folder: Path) -> None:
    """Two processes of one torchrun that read, each in a folder of its own, a file of the same name."""
    for rank in (0, 1):
        Path(f"rank{rank}").mkdir()
        Path(f"rank{rank}/rows.txt").write_text(f"row {rank} of a text\n" * 50)
    program = Path("apart.py")
    program.write_text(
        "import os, sys, pathlib; from lit_gpt.cli.main import main\n"
        f"os.chdir('rank' + os.environ['RANK']); sys.exit(main(pathlib.Path({str(ROOT / 'configs/default.yaml')!r})))\n"
    )
    words = ["--nproc-per-node", "2", "--master-port", "29617", str(program), "--config", str(folder / "small.yaml")]
    flags = [*QUIET, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ended = subprocess.run([*TORCHRUN, *words, *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.count("error: the processes of this run do not all find the same text") == 1
    assert "Traceback" not in ended.stderr.partition("torch/distributed")[0]
    assert not Path("rank0/logs").exists()


def test_a_slurm_job_saves_queues_again_and_goes_on_until_it_is_done(folder: Path) -> None:
    """The script itself, with stand-ins for srun and scontrol."""
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
        *QUIET,
        "--data.global_batch_size",
        "8",
    ]

    def submitted(steps: int, signum: int | None) -> tuple[int, str, str]:
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

    status, out, err = submitted(10**6, signal.SIGUSR1)
    assert status == 143, err
    assert out.startswith("no checkpoint of 'small' under logs: starting from the beginning\n")
    assert err.splitlines()[-1].startswith("stopped at step ")
    assert "resume it with: start on every machine, as before: scripts/fit.py " in err
    assert Path("requeued").read_text() == "requeue 4711\n"
    step = open_checkpoint(RUN / "last.ckpt")["global_step"]
    status, out, err = submitted(step + 5, None)
    assert (status, err) == (0, "")
    assert f"resumed     logs/small/version_0/last.ckpt, step {step:,}" in out
    assert [path.name for path in Path("logs/small").iterdir()] == ["version_0"]
    assert [at for at, _ in points(RUN)["loss/train"]] == list(range(1, step + 6))
    assert Path("requeued").read_text() == "requeue 4711\n"  # not again
