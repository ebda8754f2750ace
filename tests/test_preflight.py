"""What is told of a run before it begins: the bytes it takes, what is free, and what some measured steps foretell."""

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Fit, points

import lit_gpt.cli.fit
import lit_gpt.cli.preflight
import lit_gpt.training.profiler
from lit_gpt.device import cgroup_free_memory, free_memory
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.training.memory import activation_bytes
from lit_gpt.training.profiler import RunProfiler, trimmed_mean
from lit_gpt.training.progress import StepProgress, format_duration, format_eta, remaining_validations

RUN = Path("logs/small/version_0")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures for a moment."""
    for name in ("STEP_SECONDS", "VALIDATION_SECONDS", "SLOPE_SECONDS"):
        monkeypatch.setattr(lit_gpt.training.profiler, name, 0.0)


def line(out: str, name: str) -> str:
    (found,) = (text for text in out.splitlines() if text.startswith(f"{name:12}"))
    return found[12:]


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_what_the_optimizer_holds_after_a_step(fit: Fit, optimizer: str) -> None:
    wide = ["--model.config.d_model", 64, "--checkpoint.every_n_steps", 3, "--model.optimizer", optimizer]
    result = fit(*wide)
    saved = torch.load(RUN / "last.ckpt", weights_only=True)
    weights = {value.untyped_storage().data_ptr(): value.nbytes for value in saved["state_dict"].values()}
    states = [value for state in saved["optimizer_states"][0]["state"].values() for value in state.values()]
    held = 2 * sum(weights.values()) + sum(value.nbytes for value in states)  # gradients as weights
    name = {"adamw": "AdamW", "muon": "Muon"}[optimizer]
    told = re.match(rf"(\S+ .B) for weights, gradients and {name}, ", line(result.out, "memory"))
    assert told
    assert in_bytes(told[1]) == pytest.approx(held, abs=0.05e6)
    files = [path.stat().st_size for path in RUN.glob("*.ckpt")]
    disk = re.match(r"(\S+ .B) for (\d) checkpoints of (\S+ .B); \S+ .B free", line(result.out, "disk"))
    assert disk
    assert int(disk[2]) == len(files) == 4
    assert in_bytes(disk[1]) == pytest.approx(sum(files), rel=0.1, abs=0.05e6)


SHAPES: list[dict] = [
    {},
    {"dropout": 0.1},
    {"norm": "layernorm", "mlp": "gelu", "position": "learned", "qk_norm": False},
    {"mlp": "relu2", "num_kv_heads": 1},
    {"norm": "layernorm", "mlp": "relu", "position": "sinusoidal", "bias": True, "context_length": 16},
    {"qk_norm": False, "context_length": 600, "num_blocks": 1},
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_are_those_that_autograd_keeps(shape: dict, precision: str) -> None:
    config = {"vocab_size": 100, "context_length": 64, "d_model": 64, "num_blocks": 3, "num_heads": 4} | shape
    model, windows = GPT(GPTConfig(**config)), 4
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return value

    tokens = torch.zeros(windows, config["context_length"], dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), autocast:
        loss = model.loss(tokens, tokens)
    assert loss.requires_grad
    counted = sum(storage.nbytes() for storage in kept.values())
    assert activation_bytes(model, windows, precision) == pytest.approx(counted, rel=0.1)


def test_a_run_that_cannot_fit_is_warned_of(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in fit("--trainer.max_steps", 1).out
    monkeypatch.setattr(lit_gpt.cli.preflight, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))  # type: ignore[attr-defined]
    result = fit("--trainer.max_steps", 1)
    assert result.status == 0
    memory, disk = (text for text in result.out.splitlines() if text.startswith("warning"))
    assert re.search(r"needs \d.\d MB of memory, and 0.1 MB are free: give a smaller --data.batch_size", memory)
    assert re.search(r"needs \d.\d MB of disk, and 0.1 MB are free at logs/small/version_1: make room there", disk)


@pytest.mark.parametrize("flag", [["--preflight"], ["--preflight", "true"], ["--preflight=true"]], ids=" ".join)
def test_a_preflight_alone_measures_and_leaves_nothing(fit: Fit, quick: None, flag: list[str]) -> None:
    result = fit(*flag, "--generate.num_samples", 2)
    assert (result.status, result.err) == (0, "")
    assert {path.name for path in Path().iterdir()} == {"rows.txt", "small.yaml", "data"}  # the cache of the text
    assert re.fullmatch(r"[\d.]+ .B with 1, [\d.]+ .B with 4 windows in a batch", line(result.out, "measured"))
    needed = re.fullmatch(
        r"(\S+ .B) with 4 of (\S+ .B): fits; the largest batch that fits is of about ([\d,]+)",
        line(result.out, "needed"),
    )
    assert needed
    assert in_bytes(needed[1]) < in_bytes(needed[2])
    time = line(result.out, "time")
    assert re.fullmatch(r"about \S+ \w+: 6 steps of \S+ ms, 2 validations of \S+ ms; [\d,]+ tokens/s", time)


def test_a_preflight_of_a_run_that_goes_on_counts_what_is_left(fit: Fit, quick: None) -> None:
    assert fit().status == 0
    before = {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()}
    result = fit("--preflight", "--ckpt_path", "last", "--trainer.max_steps", 20, "--data.global_batch_size", 12)
    assert result.status == 0
    assert ": 14 steps of " in line(result.out, "time")
    assert ", 5 validations of " in line(result.out, "time")  # at 9, 12, 15, 18 and 20
    assert {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preflight", "maybe"], "--preflight maybe: it stands alone, or give true or false"),
        (
            ["--preflight", "--trainer.fast_dev_run", "true"],
            "--preflight and --trainer.fast_dev_run do not go together",
        ),
        (
            ["validate", "--preflight", "--ckpt_path", RUN / "last.ckpt"],
            "--preflight measures a training run: leave out",
        ),
    ],
    ids=["no truth", "no run", "no training"],
)
def test_a_preflight_that_cannot_be_meant(fit: Fit, flags: list, message: str) -> None:
    assert fit().status == 0
    result = fit(*flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert message in result.err


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine on which a process takes 100 MB, and 10 for every window: the windows of each batch it was given."""
    given = [0]
    cut = RunProfiler._cut

    def count(self: RunProfiler, batch: tuple, index: int) -> tuple:
        x, y = cut(self, batch, index)
        given.append(len(x))
        return x, y

    monkeypatch.setattr(RunProfiler, "_cut", count)
    for name in ("used_memory", "peak_memory"):
        monkeypatch.setattr(lit_gpt.training.profiler, name, lambda device: 10**8 + 10**7 * given[-1])
    return given


def test_batches_grow_no_further_than_what_fits(
    fit: Fit, quick: None, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_gpt.training.profiler, "free_memory", lambda device: 10**8)  # for 100 MB and 9.5 windows
    result = fit("--preflight", "--data.batch_size", 16)
    assert result.status == 0
    assert list(dict.fromkeys(memory)) == [0, 1, 2, 4, 8]
    assert line(result.out, "measured") == (
        "110.0 MB with 1, 120.0 MB with 2, 140.0 MB with 4, 180.0 MB with 8 windows in a batch"
    )
    assert line(result.out, "needed") == (
        "260.0 MB with 16 of 195.0 MB: does not fit; the largest batch that fits is of about 9"
    )
    assert line(result.out, "time") == "not measured, since the batch does not fit"


def test_a_batch_that_runs_out_of_memory_is_told_of(
    fit: Fit, quick: None, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = RunProfiler._cut

    def fail(self: RunProfiler, batch: tuple, index: int) -> tuple:
        if self._windows > 1:
            raise torch.OutOfMemoryError("out of memory")
        return cut(self, batch, index)

    monkeypatch.setattr(RunProfiler, "_cut", fail)
    result = fit("--preflight")
    assert (result.status, result.err) == (0, "")
    assert line(result.out, "measured") == "110.0 MB with 1 window in a batch"
    assert line(result.out, "needed").endswith("of 110.0 MB: does not fit; the largest batch that fits is of about 1")


def test_what_does_not_fit_at_all_is_not_tried(fit: Fit, memory: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lit_gpt.cli.preflight, lit_gpt.cli.fit):
        monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    result = fit("--preflight")
    assert (result.status, memory) == (0, [0])
    assert line(result.out, "measured") == "nothing, since not even one window fits"


def test_a_container_leaves_what_its_limit_says(tmp_path: Path) -> None:
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


def test_the_free_memory_of_a_cpu_is_no_more_than_there_is() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 10**7 < free < 2**50


def test_times_are_told_in_units_a_person_can_use() -> None:
    assert [format_duration(s) for s in (0.0331, 1.26, 119, 121, 7300, 200_000)] == [
        *("33.1 ms", "1.3 s", "119.0 s", "2.0 min", "2.0 h", "2.3 days")
    ]
    assert format_eta(1000, 0.033, 5, 0.4) == "about 35.0 s: 1,000 steps of 33 ms, 5 validations of 400 ms"
    assert format_eta(10, 3.0, 0, 0.0, 30.0) == "about 60.0 s: 10 steps of 3.0 s"
    assert trimmed_mean([1.0] * 30 + [2.0] * 10 + [50.0]) == pytest.approx(46 / 37)  # but for two at either end


def test_validations_that_are_left_are_counted() -> None:
    for step, end, interval in itertools.product(range(10), range(1, 9), range(1, 5)):
        at = [s for s in range(step + 1, end + 1) if s % interval == 0 or s == end]
        assert remaining_validations(step, end, interval) == len(at)


def test_a_long_run_says_once_what_time_is_left(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    long = ["--trainer.max_steps", 30, "--trainer.val_check_interval", 12, "--data.global_batch_size", 8]
    assert not [text for text in fit(*long).out.splitlines() if text.startswith("time")]
    monkeypatch.setattr(StepProgress, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(StepProgress, "LEAST_REMAINING_SECONDS", 0.0)
    told = line(fit(*long).out, "time")
    assert re.fullmatch(r"about \S+ \w+: 24 steps of \S+ ms, 3 validations of \S+ ms", told)
    one, other = (points(Path(f"logs/small/version_{n}"))["loss/train"] for n in (0, 1))
    assert one == other


def test_a_vocabulary_of_which_little_is_used_is_told_of_and_rows_that_cannot_be_read_are(fit: Fit) -> None:
    Path("t.csv").write_text("a,b\n" + "x,some words\n" * 300 + "x\n", encoding="utf-8")
    words = ["--data.files", "t.csv", "--data.columns", "b", "--data.tokenizer", "gpt2", "--trainer.max_steps", 1]
    out = fit(*words, "--data.vocab", "full").out
    (warning,) = (text for text in out.splitlines() if text.startswith("warning     of"))
    assert re.search(
        r"of 50,257 different tokens 3 occur, and 804,112 of [\d,]+ parameters .* --data.vocab pruned", warning
    )
    assert re.search(r"1 rows that cannot be read: see data/cache/\w+/rejected.jsonl", line(out, "text"))
    assert "warning     of" not in fit(*words).out
