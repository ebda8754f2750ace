"""The step plan follows from the settings, whatever they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data.step_plan import StepPlan, plan_steps

sizes = st.integers(1, 64)
numbers_of_windows = st.integers(0, 10**6)


def test_plan_steps_of_an_ordinary_run() -> None:
    plan = plan_steps(1000, batch_size=4, world_size=2, accumulate_grad_batches=3, val_check_interval=30, max_steps=99)
    assert plan == StepPlan(
        accumulate_grad_batches=3,
        windows_per_step=24,
        num_batches=123,
        steps_per_epoch=41,
        validation_interval=10,
        last_step=99,
    )


@given(numbers_of_windows, sizes, sizes, sizes)
def test_pass_is_the_largest_number_of_whole_steps(windows: int, batch_size: int, world_size: int, times: int) -> None:
    plan = plan_steps(windows, batch_size, world_size, times)
    assert plan.windows_per_step == batch_size * world_size * times
    assert plan.num_batches == plan.steps_per_epoch * times
    assert plan.steps_per_epoch >= 1
    assert plan.steps_per_epoch * plan.windows_per_step <= max(windows, plan.windows_per_step)
    assert (plan.steps_per_epoch + 1) * plan.windows_per_step > windows


@given(numbers_of_windows, sizes, sizes, st.integers(1, 100) | st.floats(0.01, 1.0))
def test_limit_train_batches_shortens_the_epoch(windows: int, batch_size: int, times: int, limit: int | float) -> None:
    plan = plan_steps(windows, batch_size, accumulate_grad_batches=times, limit_train_batches=limit)
    whole = plan_steps(windows, batch_size, accumulate_grad_batches=times)
    assert plan.num_batches == whole.num_batches
    batches = min(limit, whole.num_batches) if isinstance(limit, int) else int(limit * whole.num_batches)
    full_steps, rest = divmod(batches, times)
    assert plan.steps_per_epoch == max(1, full_steps + (rest > 0))


@pytest.mark.parametrize(
    ("interval", "epochs", "expected"),
    [
        (20, None, 10),
        (21, None, 10),
        (10_000, None, 5_000),
        (20, 1, 10),
        (60, 1, 50),  # once in an epoch, after 60 of its 100 batches
        (20, 3, 30),  # 5 times in every third epoch
        (1.0, 1, 50),
        (1.0, 2, 100),
        (0.5, 1, 25),
        (0.001, 1, 1),  # after every batch: more often than after every step
        (None, 1, None),
    ],
)
def test_validation_interval_in_optimizer_steps(
    interval: int | float | None, epochs: int | None, expected: int | None
) -> None:
    plan = plan_steps(400, 4, 1, 2, val_check_interval=interval, check_val_every_n_epoch=epochs)  # 100 batches
    assert plan.validation_interval == expected


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
