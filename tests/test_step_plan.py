"""The step plan follows from the settings, whatever they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data.step_plan import StepPlan, plan_steps
from lit_gpt.errors import UserError

sizes = st.integers(1, 64)
numbers_of_windows = st.integers(0, 10**6)


def test_plan_steps_of_an_ordinary_run() -> None:
    plan = plan_steps(1000, batch_size=4, global_batch_size=24, world_size=2, val_check_interval=250, max_steps=2000)
    assert plan == StepPlan(
        accumulate_grad_batches=3, windows_per_step=24, steps_per_epoch=41, validation_interval=250, last_step=2000
    )


@given(numbers_of_windows, sizes, sizes, sizes)
def test_global_batch_size_decides_the_accumulation(windows: int, batch_size: int, world_size: int, times: int) -> None:
    global_batch_size = batch_size * world_size * times
    plan = plan_steps(windows, batch_size, global_batch_size, world_size)
    assert plan == plan_steps(windows, batch_size, None, world_size, accumulate_grad_batches=times)
    assert plan.accumulate_grad_batches == times
    assert plan.windows_per_step == global_batch_size


@given(sizes, sizes, st.integers(1, 10_000))
def test_global_batch_size_must_divide(batch_size: int, world_size: int, global_batch_size: int) -> None:
    if global_batch_size % (batch_size * world_size):
        with pytest.raises(UserError, match=f"--data.global_batch_size {global_batch_size} is not a multiple of"):
            plan_steps(1000, batch_size, global_batch_size, world_size)
    else:
        assert plan_steps(1000, batch_size, global_batch_size, world_size).windows_per_step == global_batch_size


@given(numbers_of_windows, sizes, sizes, sizes)
def test_epoch_is_the_largest_number_of_whole_steps(windows: int, batch_size: int, world_size: int, times: int) -> None:
    plan = plan_steps(windows, batch_size, None, world_size, times)
    assert plan.steps_per_epoch >= 1
    assert plan.steps_per_epoch * plan.windows_per_step <= max(windows, plan.windows_per_step)
    assert (plan.steps_per_epoch + 1) * plan.windows_per_step > windows


@given(numbers_of_windows, sizes, sizes, st.integers(1, 100))
def test_overfit_batches_shorten_the_epoch(windows: int, batch_size: int, times: int, overfit_batches: int) -> None:
    if overfit_batches % times:
        with pytest.raises(UserError, match=f"--trainer.overfit_batches {overfit_batches} is not a multiple of"):
            plan_steps(windows, batch_size, accumulate_grad_batches=times, overfit_batches=overfit_batches)
        return
    plan = plan_steps(windows, batch_size, accumulate_grad_batches=times, overfit_batches=overfit_batches)
    whole = plan_steps(windows, batch_size, accumulate_grad_batches=times)
    assert plan.steps_per_epoch == min(whole.steps_per_epoch, overfit_batches // times)


@given(numbers_of_windows, sizes, st.integers(1, 10**6), st.floats(0.001, 1.0))
def test_validation_interval_is_steps_or_a_part_of_an_epoch(
    windows: int, batch_size: int, steps: int, part: float
) -> None:
    assert plan_steps(windows, batch_size, val_check_interval=steps).validation_interval == steps
    plan = plan_steps(windows, batch_size, val_check_interval=part)
    assert 1 <= plan.validation_interval <= plan.steps_per_epoch
    assert plan_steps(windows, batch_size, val_check_interval=1.0).validation_interval == plan.steps_per_epoch


@given(numbers_of_windows, sizes, st.integers(-1, 1000), st.integers(-1, 1000) | st.none())
def test_run_ends_at_the_earlier_of_max_steps_and_max_epochs(
    windows: int, batch_size: int, max_steps: int, max_epochs: int | None
) -> None:
    plan = plan_steps(windows, batch_size, max_steps=max_steps, max_epochs=max_epochs)
    endless_epochs = max_epochs in (-1, None)
    if max_steps == -1 and endless_epochs:
        assert plan.last_step is None
    elif endless_epochs:
        assert plan.last_step == max_steps
    else:
        by_epochs = max_epochs * plan.steps_per_epoch  # type: ignore[operator]
        assert plan.last_step == (by_epochs if max_steps == -1 else min(max_steps, by_epochs))


def test_run_validates_after_every_interval_and_after_the_last_step() -> None:
    plan = plan_steps(1000, batch_size=4, val_check_interval=3, max_steps=8)
    assert [step for step in range(1, 9) if plan.validates_after(step)] == [3, 6, 8]
