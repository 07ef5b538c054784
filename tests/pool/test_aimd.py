"""The published AIMD: exact numbers, and equality with a form that stores its debt."""

import random

import pytest

from rlorch.pool.aimd import AimdWindow, FixedWindow
from rlorch.pool.strategy import ResponseMetrics


def feed(aimd: AimdWindow, queue_s: float, count: int) -> None:
    for _ in range(count):
        aimd.completed(ResponseMetrics(queue_s), now=0.0)


def test_short_queues_grow_the_window_by_four_and_long_ones_halve_it():
    aimd = AimdWindow(initial_window=16)
    feed(aimd, 0.1, 31)
    assert aimd.window_size == 16
    feed(aimd, 0.1, 1)
    assert aimd.window_size == 20
    feed(aimd, 0.1, 32)
    assert aimd.window_size == 24
    feed(aimd, 5.0, 32)
    assert aimd.ema_prefill_queue == pytest.approx(1.57)
    assert aimd.window_size == 12


def test_growth_shrinks_as_the_queue_nears_its_target():
    aimd = AimdWindow(initial_window=16)
    feed(aimd, 0.4, 32)
    assert aimd._window == pytest.approx(16 + 0.5 / 0.4)
    assert aimd.window_size == 17
    aimd = AimdWindow(initial_window=16)
    feed(aimd, 0.5, 32)
    assert aimd.window_size == 17, "at the target it still grows"
    aimd = AimdWindow(initial_window=16)
    feed(aimd, 0.0, 32)
    assert aimd.window_size == 20, "an empty queue grows by four, not without bound"


def test_refusals_halve_then_quarter_the_window_once_per_second():
    aimd = AimdWindow(initial_window=64)
    refused = ResponseMetrics(status_code=429)
    aimd.completed(refused, now=10.0)
    assert aimd.window_size == 32
    aimd.completed(refused, now=10.9)
    assert aimd.window_size == 32, "within the cooldown"
    aimd.completed(ResponseMetrics(status_code=None, transport_error=True), now=11.0)
    assert aimd.window_size == 16
    aimd.completed(ResponseMetrics(status_code=503, retry_attempt=3), now=12.0)
    assert aimd.window_size == 4
    for _ in range(28):
        aimd.completed(ResponseMetrics(status_code=200), now=13.0)
    assert aimd.window_size == 4, "an interval with congestion does not grow"
    for _ in range(32):
        aimd.completed(ResponseMetrics(status_code=200), now=14.0)
    assert aimd.window_size == 5


def test_a_callers_mistake_is_neither_congestion_nor_evidence_for_growth():
    aimd = AimdWindow(initial_window=8)
    for _ in range(32):
        aimd.completed(ResponseMetrics(status_code=400), now=0.0)
    assert aimd.window_size == 8
    assert "status_responses" not in aimd.step_completed()


def test_prefill_samples_win_over_status_samples_in_one_interval():
    aimd = AimdWindow(initial_window=8, adjustment_interval=0)
    feed(aimd, 0.1, 3)
    aimd.completed(ResponseMetrics(status_code=200), now=0.0)
    aimd.step_completed()
    assert aimd.window_size == 12
    aimd.step_completed()
    assert aimd.window_size == 12, "both buffers were cleared"


def test_releases_without_metrics_count_towards_the_interval():
    aimd = AimdWindow(initial_window=8)
    feed(aimd, 0.1, 1)
    for _ in range(31):
        aimd.released()
    assert aimd.window_size == 12


def test_the_window_stays_within_its_bounds():
    aimd = AimdWindow(initial_window=300, min_window=2, max_window=256)
    assert aimd.window_size == 256
    feed(aimd, 0.1, 32)
    assert aimd.window_size == 256
    for _ in range(20):
        feed(aimd, 60.0, 32)
    assert aimd.window_size == 2
    with pytest.raises(ValueError, match="min_window"):
        AimdWindow(min_window=5, max_window=4)


def test_a_step_is_summed_up_under_the_published_names():
    aimd = AimdWindow(initial_window=16)
    for in_flight in (1, 2, 3, 2):
        aimd.load_changed(in_flight)
    for _ in range(2):
        aimd.completed(ResponseMetrics(0.1, prompt_tokens=10, cached_prompt_tokens=5), now=0.0)
    assert aimd.step_completed() == {
        "window": 16,
        "requests": 2,
        "avg_pq": pytest.approx(0.1),
        "ema_pq": pytest.approx(0.1),
        "pending_decrease": 0,
        "avg_window": 16,
        "max_in_flight": 3,
        "window_after": 20,
        "cache_hit_rate": 0.5,
    }
    aimd.completed(ResponseMetrics(status_code=429, retry_attempt=3), now=0.0)
    aimd.completed(ResponseMetrics(status_code=200), now=0.0)
    aimd.load_changed(9)
    assert aimd.step_completed() == {
        "window": 5,
        "requests": 2,
        "status_responses": 2,
        "congestion_responses": 1,
        "congestion_rate": 0.5,
        "congestion_events": 1,
        "retry_exhaustions": 1,
        "pending_decrease": 4,
        "avg_window": 5,
        "max_in_flight": 9,
        "window_after": 5,
    }
    assert FixedWindow(7).step_completed() == {"window": 7}


def test_pending_decrease_equals_the_published_debt_under_random_programs():
    for seed in range(50):
        rng = random.Random(seed)
        aimd = AimdWindow(initial_window=rng.randint(1, 64), adjustment_interval=rng.choice((1, 3, 32)))
        in_flight, debt, now = 0, 0, 0.0
        for _ in range(400):
            before, now = aimd.window_size, now + rng.random()
            if rng.random() < 0.5 and in_flight < before and debt == 0:
                in_flight += 1
                aimd.load_changed(in_flight)
            elif in_flight:
                in_flight -= 1
                debt = max(0, debt - 1)
                aimd.load_changed(in_flight)
                queue = rng.choice((None, 0.05, 0.4, 3.0))
                aimd.completed(ResponseMetrics(queue, status_code=rng.choice((200, 200, 429))), now)
            change = aimd.window_size - before
            if change > 0:
                debt = max(0, debt - change)
            elif change < 0:
                free = max(0, before - in_flight) if debt == 0 else 0
                debt += max(0, -change - free)
            assert aimd.pending_decrease == debt
            assert (in_flight < aimd.window_size) == (in_flight < aimd.window_size and debt == 0)


def test_metrics_are_read_from_headers_in_any_spelling():
    headers = {"Fireworks-Prefill-Queue-Duration": "0.25", "prompt-tokens": "12", "fireworks-cached-prompt-tokens": 3}
    assert ResponseMetrics.from_headers(headers) == ResponseMetrics(0.25, prompt_tokens=12, cached_prompt_tokens=3)
    assert ResponseMetrics.from_headers({}, status_code=503).congested
    assert not ResponseMetrics.from_headers({}, status_code=404).counted
