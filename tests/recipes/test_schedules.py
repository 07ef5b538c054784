import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rlorch.recipes.schedules import ScheduleSpec, lr_at


@st.composite
def runs(draw):
    total = draw(st.integers(1, 300))
    kind = draw(st.sampled_from(["constant", "linear", "cosine", "wsd"]))
    options = {"kind": kind, "warmup_steps": draw(st.integers(0, total)), "min_ratio": draw(st.floats(0, 1))}
    if kind == "wsd":
        options |= {
            "decay_ratio": draw(st.floats(0.01, 1)),
            "decay_type": draw(st.sampled_from(["linear", "cosine", "sqrt"])),
        }
    return ScheduleSpec(**options), total, draw(st.floats(1e-7, 1.0))


@given(runs())
def test_a_schedule_rises_to_its_peak_and_then_never_rises_again(run):
    spec, total, peak = run
    rates = [lr_at(step, peak=peak, total_steps=total, spec=spec) for step in range(total)]
    warm, rest = rates[: spec.warmup_steps], rates[spec.warmup_steps :]
    assert warm == sorted(warm)
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(rest))
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    if warm:
        assert warm[-1] == peak


@given(runs())
def test_a_decaying_schedule_ends_at_its_minimum_and_stays_there(run):
    spec, total, peak = run
    last = lr_at(total - 1, peak=peak, total_steps=total, spec=spec)
    if spec.kind != "constant" and spec.warmup_steps < total:
        assert math.isclose(last, peak * spec.min_ratio, rel_tol=1e-9, abs_tol=peak * 1e-12)
        assert lr_at(total + 7, peak=peak, total_steps=total, spec=spec) == last


@given(runs())
def test_wsd_is_stable_before_its_decay(run):
    spec, total, peak = run
    if spec.kind == "wsd":
        for step in range(spec.warmup_steps, total - math.ceil(spec.decay_ratio * total)):
            assert lr_at(step, peak=peak, total_steps=total, spec=spec) == peak


def test_the_shapes_are_what_they_are_called():
    def halfway(**options):
        return lr_at(4, peak=1.0, total_steps=10, spec=ScheduleSpec(**options))

    assert halfway(kind="linear") == 0.5
    assert halfway(kind="cosine") == pytest.approx(0.5)
    assert halfway(kind="cosine", min_ratio=0.2) == pytest.approx(0.6)
    assert halfway(kind="wsd", decay_ratio=1.0, decay_type="sqrt") == pytest.approx(1 - math.sqrt(0.5))
    assert lr_at(0, peak=1.0, total_steps=10, spec=ScheduleSpec(warmup_steps=4)) == 0.25


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="warmup_steps is 11"):
        lr_at(0, peak=1.0, total_steps=10, spec=ScheduleSpec(warmup_steps=11))
    with pytest.raises(ValueError, match="step -1"):
        lr_at(-1, peak=1.0, total_steps=10, spec=ScheduleSpec())
    with pytest.raises(ValidationError, match="belong to kind wsd"):
        ScheduleSpec(kind="linear", decay_ratio=0.5)
    with pytest.raises(ValidationError):
        ScheduleSpec.model_validate({"kind": "cosine", "warm_up": 3})
