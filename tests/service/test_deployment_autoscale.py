"""The desired count of replicas, from readings of the load alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from rlorch.service.autoscale import Autoscaler, ScaleLimits, ScaleLoad

LIMITS = ScaleLimits(1, 4, up_after_s=5, down_after_s=60, cooldown_s=30)
TO_ZERO = ScaleLimits(0, 2, idle_timeout_s=100, up_after_s=5, down_after_s=60, cooldown_s=30)


def run(scaler: Autoscaler, limits: ScaleLimits, loads: list[tuple[float, int, int]]) -> list[int]:
    """Decisions for (now, waiting, running), every desired replica ready, 8 requests each."""
    return [
        scaler.decide(now, ScaleLoad(waiting, running, 8, scaler.desired), limits) for now, waiting, running in loads
    ]


def test_a_queue_that_lasts_adds_what_it_fills_and_a_short_one_nothing():
    assert run(Autoscaler(1, 0), LIMITS, [(0, 3, 8), (4, 3, 8), (4.5, 0, 8), (5, 1, 8), (9, 1, 8)]) == [1] * 5
    assert run(Autoscaler(1, 0), LIMITS, [(0, 3, 8), (5, 3, 8)]) == [1, 2]
    assert run(Autoscaler(1, 0), LIMITS, [(0, 20, 8), (5, 20, 8)]) == [1, 4]
    assert run(Autoscaler(1, 0), LIMITS, [(0, 500, 8), (5, 500, 8)]) == [1, 4]


def test_a_replica_that_still_starts_is_waited_for():
    scaler = Autoscaler(2, 0)
    for now in range(0, 100, 5):
        assert scaler.decide(now, ScaleLoad(50, 8, 8, ready=1), LIMITS) == 2


def test_nothing_changes_during_the_cool_down():
    scaler = Autoscaler(1, 0)
    assert run(scaler, LIMITS, [(0, 1, 8), (5, 1, 8)]) == [1, 2]
    assert run(scaler, LIMITS, [(6, 1, 16), (11, 1, 16), (34, 1, 16), (35, 1, 16)]) == [2, 2, 2, 3]


def test_spare_replicas_go_one_by_one_and_only_when_the_rest_has_room():
    scaler = Autoscaler(3, 0)
    assert run(scaler, LIMITS, [(0, 0, 9), (60, 0, 9), (200, 0, 9)]) == [3, 3, 3], "9 fill more than half of two"
    assert run(scaler, LIMITS, [(201, 0, 8), (260, 0, 8), (261, 0, 8), (320, 0, 4), (322, 0, 4)]) == [3, 3, 2, 2, 2]
    assert run(scaler, LIMITS, [(400, 0, 0), (500, 0, 0), (1000, 0, 0)]) == [1, 1, 1], "the minimum stays"


def test_idle_deployments_go_to_zero_and_wake_at_once():
    scaler = Autoscaler(1, 0)
    assert run(scaler, TO_ZERO, [(99, 0, 0), (100, 0, 0), (101, 0, 0), (102, 1, 0)]) == [1, 0, 0, 1]
    assert run(scaler, TO_ZERO, [(150, 0, 1), (249, 0, 0), (250, 0, 0)]) == [1, 1, 0]


def test_without_an_idle_time_or_with_a_minimum_it_never_goes_to_zero():
    for limits in (ScaleLimits(0, 2), ScaleLimits(1, 2, idle_timeout_s=1)):
        assert run(Autoscaler(1, 0), limits, [(0, 0, 0), (1e6, 0, 0), (2e6, 0, 0)]) == [1, 1, 1]


def test_a_hand_is_followed_by_a_request_at_once():
    scaler = Autoscaler(2, 0)
    scaler.set(0, 10)
    assert run(scaler, TO_ZERO, [(11, 0, 0), (11.5, 1, 0)]) == [0, 1]


def test_changed_bounds_hold_at_once():
    assert run(Autoscaler(4, 0), ScaleLimits(1, 2), [(0, 0, 30)]) == [2]
    assert run(Autoscaler(1, 0), ScaleLimits(3, 4), [(0, 0, 0)]) == [3]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.integers(0, 40), st.integers(0, 40), st.integers(0, 5)), max_size=60),
    st.integers(0, 2),
    st.integers(1, 4),
)
def test_any_load_keeps_it_within_bounds_and_changes_apart(readings, low, high):
    limits = ScaleLimits(min(low, high), high, idle_timeout_s=100, up_after_s=5, down_after_s=60, cooldown_s=30)
    scaler, now, changed = Autoscaler(max(limits.min_replicas, 1), 0.0), 0.0, float("-inf")
    for wait, waiting, running, ready in readings:
        now += wait
        before = scaler.desired
        desired = scaler.decide(now, ScaleLoad(waiting, running, 8, ready), limits)
        assert limits.min_replicas <= desired <= limits.max_replicas
        if desired == 0 != before:
            assert waiting == running == 0
        if desired != before:
            assert 0 in (before, desired) or now - changed >= limits.cooldown_s
            changed = now
