"""The knee finder: each rule on a hand-fed engine, then the whole on the simulated replica."""

import asyncio
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from rlorch.pool.config import PoolConfig
from rlorch.pool.knee import EMERGENCY_FACTOR, KV_ADMIT_FRACTION, KneeWindow, Phase
from rlorch.pool.pool import SamplerPool
from rlorch.pool.strategy import Observation, ResponseMetrics, StrategyName
from rlorch.sim.loop import run_virtual
from rlorch.sim.queueing import EngineModel
from rlorch.sim.sampler import SimSampler, SimSamplerConfig
from rlorch.types import SamplingParams

LENGTH = 50  # tokens per sequence of the hand-fed engine


class Bench:
    """A saturated engine of known throughput curve, read once per second: what a strategy sees, without the engine."""

    def __init__(self, rate: Callable[[int], float], capacity: int = 10**6, **options: int) -> None:
        self.knee = KneeWindow(**options, period_s=1.0)  # pyright: ignore[reportArgumentType]
        self.rate, self.capacity = rate, capacity
        self.now, self.tokens, self.preemptions, self.version = 0.0, 0.0, 0, 0
        self.kv_usage, self.load_fraction, self.completed = 0.1, 1.0, 0.0

    def second(self) -> int:
        """One more second; the window after it."""
        in_flight = int(self.load_fraction * self.knee.window)
        running = min(in_flight, self.capacity)
        self.knee.load_changed(in_flight)
        self.now += 1.0
        self.tokens += self.rate(running)
        self.completed += self.rate(running) / LENGTH
        for _ in range(int(self.completed)):
            self.knee.completed(ResponseMetrics(0.0), self.now)
        self.completed %= 1.0
        demand = self.load_fraction >= 1.0
        reading = Observation(
            self.now, self.version, running, in_flight - running, self.kv_usage, int(self.tokens), self.preemptions,
            in_flight, demand,
        )  # fmt: skip
        self.knee.observe(reading)
        return self.knee.window

    def seconds(self, count: int) -> int:
        for _ in range(count):
            self.second()
        return self.knee.window

    def cruise(self, count: int) -> int:
        """`count` seconds, then on until no probe is under way; the window that is kept."""
        self.seconds(count)
        while self.knee.phase is not Phase.CRUISE:
            self.second()
        return self.knee.window


def linear(running: int) -> float:
    return 25.0 * running


def saturating(running: int) -> float:
    return 25.0 * min(running, 40)


def test_slow_start_doubles_each_turnover():
    bench = Bench(linear)
    seen: list[int] = []
    while bench.knee.phase is Phase.SLOW_START:
        seen.append(bench.second())
    assert sorted(set(seen)) == [8, 16, 32, 64, 128, 256]
    assert seen == sorted(seen)
    assert len(seen) < 40


def test_slow_start_ends_when_a_doubling_gains_nothing_and_goes_back():
    bench = Bench(lambda running: 25.0 * min(running, 16))
    while bench.knee.phase is Phase.SLOW_START:
        bench.second()
    assert bench.knee.window == 16


def test_slow_start_ends_at_what_runs_when_something_waits():
    bench = Bench(linear, capacity=24)
    while bench.knee.phase is Phase.SLOW_START:
        bench.second()
    assert bench.knee.window in (23, 24)


def test_slow_start_ends_when_the_kv_cache_fills():
    bench = Bench(linear)
    bench.kv_usage = 0.7
    while bench.knee.phase is Phase.SLOW_START:
        bench.second()
    assert bench.knee.window == 8


def test_probing_finds_the_smallest_window_that_keeps_the_rate():
    bench = Bench(saturating)
    window = bench.cruise(400)
    assert saturating(window) >= 0.97 * saturating(10**6)
    assert window <= 44


def test_a_knee_that_moves_up_is_followed_by_a_new_slow_start():
    bench = Bench(saturating)
    bench.cruise(200)
    bench.rate = lambda running: 25.0 * min(running, 200)
    assert 190 <= bench.cruise(300) <= 256


def test_a_window_that_does_not_bind_does_not_grow():
    bench = Bench(linear)
    bench.load_fraction = 0.5
    assert bench.seconds(100) == 8
    bench.load_fraction = 1.0
    assert bench.seconds(40) > 64


def test_a_gap_in_the_readings_is_not_evidence():
    bench = Bench(linear)
    for _ in range(30):
        bench.now += 10.0
        bench.second()
    assert bench.knee.window == 8


def test_preemptions_cut_once_until_the_excess_has_drained():
    bench = Bench(linear)
    while bench.knee.window < 32:
        bench.second()
    window = bench.knee.window
    for _ in range(3):  # in flight stays above the window: the cut has not drained
        bench.preemptions += 5
        bench.load_fraction = 2.0
        bench.second()
    assert bench.knee.window == int(window * EMERGENCY_FACTOR)
    bench.load_fraction = 1.0
    bench.seconds(2)
    bench.preemptions += 1
    assert bench.second() == int(window * EMERGENCY_FACTOR * EMERGENCY_FACTOR)


def test_refusals_are_congestion_and_other_failures_are_not():
    bench = Bench(linear)
    bench.seconds(6)
    window = bench.knee.window
    bench.knee.completed(ResponseMetrics(status_code=400), bench.now)
    assert bench.knee.window == window
    for _ in range(10):
        bench.knee.completed(ResponseMetrics(status_code=429), bench.now)
    assert bench.knee.window == int(window * EMERGENCY_FACTOR)


def test_preemptions_and_stalls_around_a_commit_are_not_congestion():
    bench = Bench(saturating)
    window = bench.cruise(200)
    bench.knee.commit_happened(bench.now)
    bench.rate, bench.preemptions = (lambda _: 0.0), 100
    bench.second()
    assert bench.knee.window == window
    bench.rate = saturating
    assert abs(bench.cruise(100) - window) <= 0.1 * window + 1
    assert bench.knee.step_completed()["emergencies"] == 0


def test_commits_that_come_more_often_than_answers_do_not_freeze_the_controller():
    bench = Bench(linear)
    for _ in range(120):
        bench.version += 1
        bench.knee.commit_happened(bench.now + 0.5)
        bench.second()
        bench.second()
    assert bench.knee.window > 64


def test_feed_forward_admits_up_to_its_share_of_the_kv_tokens():
    knee = KneeWindow(kv_tokens=1000)
    assert knee.admits(KV_ADMIT_FRACTION * 1000 - 100, 100)
    assert not knee.admits(KV_ADMIT_FRACTION * 1000 - 100, 101)
    assert KneeWindow().admits(1e12, 1e12)


# --- on the simulated replica -----------------------------------------------------------------------------

SECONDS = 40


async def saturate(strategy: StrategyName, window: int, n: int, seconds: int) -> tuple[float, float, float]:
    """Tokens per second over the whole run and over its second half, and the mean window over its second half."""
    sampler = SimSampler("r0", version=0)
    config = PoolConfig(strategy=strategy, initial_window=window, stats_period_s=0.1)
    pool = SamplerPool({"r0": sampler}, config)
    windows: list[int] = []

    async def client(number: int) -> None:
        for draw in range(10**6):
            await pool.sample(np.full(64, number, np.int32), SamplingParams(n=n, max_tokens=192), f"{number}/{draw}")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pool.run())]
        tasks += [group.create_task(client(i)) for i in range(128 // n)]
        await asyncio.sleep(seconds / 2)
        half = sampler.engine.generated_tokens
        for _ in range(seconds // 2):
            await asyncio.sleep(1)
            windows.append(pool.window)
        total = sampler.engine.generated_tokens
        for task in tasks:
            task.cancel()
    assert sampler.held == ()
    assert pool.view().in_flight == 0
    return total / seconds, 2 * (total - half) / seconds, sum(windows) / len(windows)


@cache
def best_fixed(n: int) -> tuple[float, int]:
    """The highest tokens per second of any fixed window, and the smallest window within 3% of it."""
    windows = (20, 24, 28, 32) if n == 1 else (32, 40, 48, 56)
    rates = {window: run_virtual(saturate("fixed", window, n, SECONDS // 2))[0] for window in windows}
    best = max(rates.values())
    assert best > max(rates[windows[0]], rates[windows[-1]]), "the best window lies inside the sweep"
    return best, min(window for window, rate in rates.items() if rate >= 0.97 * best)


@pytest.mark.parametrize("n", [1, 4])
def test_the_knee_is_within_three_percent_of_the_best_fixed_window_and_not_far_above_the_smallest(n: int):
    best, smallest = best_fixed(n)
    whole, late, window = run_virtual(saturate("knee", 8, n, SECONDS))
    assert late >= 0.97 * best
    assert whole >= 0.94 * best, "ramp included"
    assert window <= smallest + max(4, 2 * n)


def test_the_knee_beats_the_published_aimd_on_the_same_trace():
    knee, _, window = run_virtual(saturate("knee", 8, 1, SECONDS))
    aimd, _, aimd_window = run_virtual(saturate("adaptive", 8, 1, SECONDS))
    assert knee > 1.1 * aimd
    assert window < aimd_window


def test_a_commit_every_two_turnovers_leaves_the_knee_where_it_is():
    async def scenario() -> tuple[float, float]:
        sampler = SimSampler("r0", SimSamplerConfig(EngineModel(), commit_pause_s=0.02), version=0)
        pool = SamplerPool({"r0": sampler}, PoolConfig(strategy="knee", stats_period_s=0.1))
        windows: list[int] = []

        async def client(number: int) -> None:
            for draw in range(10**6):
                await pool.sample(np.full(64, number, np.int32), SamplingParams(max_tokens=192), f"{number}/{draw}")

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(pool.run())] + [group.create_task(client(i)) for i in range(96)]
            for step in range(50):
                await asyncio.sleep(0.7)
                pool.commit_happened("r0")
                sampler.engine.commit(step + 1)
                pool.commit_happened("r0")
                if step >= 25:
                    windows.append(pool.window)
            total = sampler.engine.generated_tokens
            for task in tasks:
                task.cancel()
        return total / 35, sum(windows) / len(windows)

    rate, window = run_virtual(scenario())
    best, smallest = best_fixed(1)
    assert rate >= 0.95 * best
    assert window <= smallest + 6
