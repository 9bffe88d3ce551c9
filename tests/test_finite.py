"""When NaN and infinity are reported."""

import pytest
import torch

from mmdit_lib.engine.finite import FiniteCheck

STEPS = torch.linspace(1000.0, 40.0, 5)
FINE, BAD = torch.zeros(2, 3), torch.tensor([[0.0, float("inf")]])


def at(step: int, steps: torch.Tensor = STEPS) -> torch.Tensor:
    """As a pipeline of diffusers gives it to its transformer."""
    return steps[step].expand(2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_at_once(value):
    check = FiniteCheck(late=False)
    for step in range(3):
        assert check({"x": FINE, "output": FINE}, at(step), STEPS) == []
        assert check({"x": FINE, "output": torch.tensor([0.0, value])}, at(step), STEPS) == ["output"]


def test_one_step_late():
    check = FiniteCheck(late=True)
    assert check({"x": FINE, "output": BAD}, at(0), STEPS) == []
    assert check({"x": BAD, "output": BAD}, at(1), STEPS) == ["output"], "the step in which it began"


def test_two_calls_in_a_step():
    """As with skip-layer guidance."""
    check = FiniteCheck(late=True)
    assert check({"output": FINE}, at(0), STEPS) == []
    assert check({"output": BAD}, at(0), STEPS) == ["output"]
    assert check({"output": BAD}, at(1), STEPS) == []
    assert check({"output": FINE}, at(1), STEPS) == ["output"]


def test_the_last_step_is_not_late():
    check = FiniteCheck(late=True)
    for step in range(4):
        assert check({"output": FINE}, at(step), STEPS) == []
    assert check({"output": BAD}, at(4), STEPS) == ["output"]


@pytest.mark.parametrize(
    ("timestep", "timesteps"),
    [(at(0), None), (at(0).clone(), STEPS), (at(0, STEPS.clone()), STEPS), (STEPS[:2], STEPS)],
    ids=["no schedule", "a copy", "of another schedule", "several timesteps"],
)
def test_what_may_be_the_last_step_is_not_late(timestep, timesteps):
    assert FiniteCheck(late=True)({"output": BAD}, timestep, timesteps) == ["output"]


def test_steps_that_do_not_follow_each_other_are_not_late():
    """One step of many images, or steps in descending order."""
    for places in ((2, 2, 2), (4, 3, 2, 1, 0), (0, 2, 4)):
        check = FiniteCheck(late=True)
        check({"output": FINE}, at(places[0]), STEPS)
        for place in places[1:]:
            assert check({"output": BAD}, at(place), STEPS) == ["output"], places
            assert check({"output": FINE}, at(place), STEPS) == []


def test_image_to_image():
    """It starts in the middle of the schedule."""
    check = FiniteCheck(late=True)
    assert check({"output": FINE}, at(2), STEPS) == []
    assert check({"output": BAD}, at(3), STEPS) == []
    assert check({"output": BAD}, at(4), STEPS) == ["output"]


@pytest.mark.parametrize(
    ("step", "steps"), [(0, STEPS), (0, STEPS.clone()), (3, STEPS.clone())], ids=["again", "anew", "another"]
)
def test_an_interrupted_image_does_not_fail_the_next(step, steps, caplog):
    check = FiniteCheck(late=True)
    assert check({"output": FINE}, at(0), STEPS) == []
    assert check({"x": FINE, "output": BAD}, at(1), STEPS) == []
    assert check({"x": FINE, "output": FINE}, at(step, steps), steps) == []
    assert caplog.messages == ["output of an image that was not finished: NaN or infinity"]
    assert check({"output": FINE}, at(4, steps), steps) == []


def test_the_same_schedule_for_the_next_image():
    check = FiniteCheck(late=True)
    for _ in range(2):
        assert check({"output": FINE}, at(0), STEPS) == []
        assert check({"output": BAD}, at(1), STEPS) == []
        assert check({"output": BAD}, at(2), STEPS) == ["output"]
        for step in (3, 4):
            assert check({"output": FINE}, at(step), STEPS) == []
