"""The work of a step, counted by hand and by torch; seconds predicted from it; calibration."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import newton_schulz, parameter_groups
from lit_gpt.planning.speed import (
    SECONDS,
    TRAINER_SECONDS,
    SpeedModel,
    Workload,
    gpu_seconds,
    measure_machine,
    measure_step,
)
from lit_gpt.planning.work import newton_schulz_flops, pass_work, update_work

CPU = torch.device("cpu")
PLANNED: dict[str, Any] = {"norm": "layernorm", "mlp": "relu2", "tie_embeddings": False, "previous_tokens": 2}
SMALL = GPTConfig(100, context_length=32, d_model=64, num_blocks=3, num_heads=2, **PLANNED)
WORKLOADS = [
    Workload(replace(SMALL, d_model=width, num_blocks=blocks), windows, optimizer, precision)
    for width, blocks, windows in ((64, 2, 4), (256, 2, 16), (128, 8, 8))
    for optimizer, precision in (("muon", "32-true"), ("adamw", "bf16-mixed"))
]


@pytest.mark.parametrize("change", [{}, {"mlp": "swiglu", "tie_embeddings": True}, {"num_blocks": 1}], ids=str)
def test_products_of_a_pass_are_those_that_torch_counts(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        GPT(config).loss(tokens, tokens)
    assert pass_work(config, 4, "bf16-mixed")["products"] == counter.get_total_flops()


@pytest.mark.parametrize("shape", [(48, 48), (48, 64), (48, 192), (192, 48)], ids=str)
def test_flops_of_newton_schulz_are_those_that_torch_counts(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        newton_schulz([matrix[None]])
    assert newton_schulz_flops(matrix) == counter.get_total_flops()


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_numbers_of_an_update_are_those_of_the_parameter_groups(position: Any) -> None:
    config = replace(SMALL, position=position)
    groups = {group["name"]: group["params"] for group in parameter_groups(GPT(config), 0.0, 0.0)}
    everything = [p for group in groups.values() for p in group]
    muon, adamw = update_work(config, "muon"), update_work(config, "adamw")
    assert muon["momenta"] == sum(p.numel() for p in groups["blocks"])
    assert muon["matrices"] == len(groups["blocks"])
    assert muon["adamw"] == sum(p.numel() for name, group in groups.items() if name != "blocks" for p in group)
    assert adamw["adamw"] == sum(p.numel() for p in everything)
    assert muon["parameters"] == adamw["parameters"] == len(everything)
    assert adamw["muon"] == adamw["momenta"] == adamw["newton_schulz"] == 0


@pytest.mark.parametrize("field", ["d_model", "num_blocks", "vocab_size", "context_length"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_larger_models_take_longer(device: str, field: str) -> None:
    model = SpeedModel(device, SECONDS if device == "cpu" else gpu_seconds(CPU))
    base = replace(SMALL, d_model=512, num_blocks=4, vocab_size=4096)
    sizes = [replace(base, **{field: factor * getattr(base, field)}) for factor in (1, 2, 4, 8)]
    for precision in ("32-true", "bf16-mixed"):
        steps = [model.step_seconds(Workload(config, 64, precision=precision)) for config in sizes]
        assert all(shorter < longer for shorter, longer in itertools.pairwise(steps))
        evaluations = [model.evaluation_seconds(config, 2**20, precision, 512) for config in sizes]
        if field != "context_length":  # a larger batch of the same number of tokens may be faster
            assert all(shorter < longer for shorter, longer in itertools.pairwise(evaluations))


def test_accumulation_repeats_the_passes_and_not_the_update() -> None:
    model, one = SpeedModel(), Workload(SMALL, 8)
    seconds = [model.step_seconds(replace(one, accumulate=count)) for count in (1, 2, 3)]
    assert seconds[2] - seconds[1] == pytest.approx(seconds[1] - seconds[0])
    assert seconds[1] < 2 * seconds[0]


def test_activation_checkpointing_takes_longer_and_compiled_blocks_take_less_time() -> None:
    for model in (SpeedModel(), SpeedModel("cuda", gpu_seconds(CPU))):
        workload = Workload(replace(SMALL, d_model=256), 64, "adamw", "bf16-mixed")
        seconds = model.step_seconds(workload)
        assert seconds < model.step_seconds(replace(workload, activation_checkpointing=True)) < 1.4 * seconds
        assert 0.7 * seconds < model.step_seconds(replace(workload, compile=True)) < 0.95 * seconds


def test_predicted_speed_of_an_h200_is_the_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.planning.speed.peak_flops", lambda device: 989e12)
    gpt2 = GPTConfig(50257, 1024, 768, 12, 12, norm="layernorm", mlp="gelu", position="learned", qk_norm=False)
    workload = Workload(gpt2, 64, "adamw", "bf16-mixed", accumulate=8, compile=True)
    seconds = SpeedModel("cuda", gpu_seconds(CPU)).step_seconds(workload)
    assert 512 * 1024 / seconds == pytest.approx(553_400, rel=0.1)  # docs/performance.md, "On a GPU"


def test_evaluation_takes_time_in_proportion_to_its_tokens() -> None:
    model = SpeedModel()
    assert model.evaluation_seconds(SMALL, 6000, "32-true") == pytest.approx(
        6 * model.evaluation_seconds(SMALL, 1000, "32-true")
    )
    dropout = replace(SMALL, dropout=0.5)  # without effect in an evaluation
    assert model.evaluation_seconds(dropout, 1000, "32-true") == model.evaluation_seconds(SMALL, 1000, "32-true")


def without_trainer(model: SpeedModel, workload: Workload) -> float:
    """What `measure_step` would return on a machine that the model describes."""
    return model.step_seconds(workload) - TRAINER_SECONDS * model.factors["calls"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_calibration_finds_the_factors_of_a_machine(device: str) -> None:
    factors = {"calls": 1.5, "numbers": 0.9, "products float32": 2.5, "products bfloat16": 1.2}
    tables = SECONDS if device == "cpu" else gpu_seconds(CPU)
    machine = SpeedModel(device, tables, factors)
    model = SpeedModel(device, tables).calibrated(
        (workload, without_trainer(machine, workload)) for workload in WORKLOADS
    )
    for workload in WORKLOADS:
        assert model.step_seconds(workload) == pytest.approx(machine.step_seconds(workload), rel=0.05)
    again = model.calibrated([(WORKLOADS[0], 3 * without_trainer(model, WORKLOADS[0]))])
    assert again.step_seconds(WORKLOADS[0]) == pytest.approx(3 * model.step_seconds(WORKLOADS[0]), rel=0.1)


def test_one_measurement_changes_all_factors_alike() -> None:
    workload, model = WORKLOADS[0], SpeedModel()
    slower = model.calibrated([(workload, 10 * without_trainer(model, workload))])
    for other in WORKLOADS:
        assert slower.step_seconds(other) == pytest.approx(10 * model.step_seconds(other), rel=0.15)


def test_measuring_leaves_random_states_and_counts_at_least_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before, ticks = torch.get_rng_state(), itertools.count()
    monkeypatch.setattr("lit_gpt.planning.speed.time.perf_counter", lambda: next(ticks))
    tiny = Workload(replace(SMALL, d_model=16, num_blocks=1), 1)
    assert measure_step(tiny, CPU, seconds=0) == 1  # the clock is read at the start and the end of each step
    assert torch.equal(torch.get_rng_state(), before)


def test_measured_machine_agrees_with_its_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SpeedModel(factors={"calls": 3.0, "numbers": 3.0, "products float32": 4.0, "products bfloat16": 4.0})
    asked: list[Workload] = []

    def measure(workload: Workload, device: torch.device, seconds: float) -> float:
        asked.append(workload)
        return without_trainer(machine, workload)

    monkeypatch.setattr("lit_gpt.planning.speed.measure_step", measure)
    model = measure_machine(CPU, 1.0)
    for workload in asked:
        assert model.step_seconds(workload) == pytest.approx(machine.step_seconds(workload), rel=0.05)
    for workload in WORKLOADS:
        assert model.step_seconds(workload) == pytest.approx(machine.step_seconds(workload), rel=0.15)
