"""Window controllers against the best fixed window, on one simulated vLLM replica and the same trace.

    python -m benchmarks.concurrency_sim [--seconds 60] [--n 1]

The engine is `rlorch.sim`'s queueing model, fitted to a measured vLLM (CPU, max_num_seqs 32). W* is the fixed window
with the most tokens per second. Times are virtual seconds. This says how the controllers compare on this model, not
how fast any real engine is.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass

import numpy as np

from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.sim.loop import run_virtual
from rlorch.sim.sampler import SimSampler, SimSamplerConfig
from rlorch.types import SamplingParams

FIXED_WINDOWS = (2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64)
PROMPT_TOKENS = 64
MAX_TOKENS = 192


@dataclass(frozen=True)
class Result:
    tokens_per_s: float
    late_tokens_per_s: float
    rates: tuple[float, ...]
    queue_p95_s: float
    window: float
    mean_in_flight: float
    preemptions: int

    def seconds_to(self, rate: float) -> float:
        """Virtual seconds until the mean over 2 s first reaches `rate`."""
        for second in range(2, len(self.rates)):
            if sum(self.rates[second - 2 : second]) / 2 >= rate:
                return float(second)
        return float("inf")


async def simulate(config: PoolConfig, seconds: int, n: int, sim: SimSamplerConfig) -> Result:
    """Keep the pool saturated for `seconds` virtual seconds."""
    sampler = SimSampler("r0", sim, version=0)
    pool = SamplerPool({"r0": sampler}, config)
    queue_s: list[float] = []
    rates: list[float] = []
    in_flight: list[int] = []
    windows: list[int] = []

    async def client(number: int) -> None:
        prompt_T = np.full(PROMPT_TOKENS, number, dtype=np.int32)
        draw = 0
        while True:
            completions = await pool.sample(prompt_T, SamplingParams(n=n, max_tokens=MAX_TOKENS), f"{number}/{draw}")
            queue_s.extend(completion.queue_s for completion in completions)
            draw += 1

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pool.run())]
        tasks += [group.create_task(client(i)) for i in range(256 // n)]
        before = 0
        for _ in range(seconds):
            await asyncio.sleep(1.0)
            rates.append(sampler.engine.generated_tokens - before)
            before = sampler.engine.generated_tokens
            in_flight.append(pool.view().in_flight)
            windows.append(pool.window)
        total, preemptions = sampler.engine.generated_tokens, sampler.engine.preemptions
        for task in tasks:
            task.cancel()
    half = len(rates) // 2
    return Result(
        total / seconds,
        sum(rates[half:]) / (len(rates) - half),
        tuple(rates),
        sorted(queue_s)[int(0.95 * (len(queue_s) - 1))],
        sum(windows[half:]) / (len(windows) - half),
        sum(in_flight[half:]) / (len(in_flight) - half),
        preemptions,
    )


def compare(seconds: int, n: int, sim: SimSamplerConfig) -> dict[str, Result]:
    """Every fixed window, then both controllers."""
    results: dict[str, Result] = {}
    for window in FIXED_WINDOWS:
        config = PoolConfig(strategy="fixed", initial_window=window, stats_period_s=0.1)
        results[f"fixed {window}"] = run_virtual(simulate(config, seconds, n, sim))
    for name in ("adaptive", "knee"):
        config = PoolConfig(strategy=name, stats_period_s=0.1)
        results[name] = run_virtual(simulate(config, seconds, n, sim))
    return results


def report(results: dict[str, Result]) -> None:
    best = max((result.tokens_per_s, name) for name, result in results.items() if name.startswith("fixed"))
    print(f"W* = {best[1].split()[1]} with {best[0]:.0f} tok/s")
    print("controller  tok/s/W*  2nd half  to 95% s  p95 queue ms  window  in flight / tok/s ms  preempted")
    for name, result in results.items():
        print(
            f"{name:10s} {result.tokens_per_s / best[0]:9.3f} {result.late_tokens_per_s / best[0]:9.3f} "
            f"{result.seconds_to(0.95 * best[0]):9.0f} {1e3 * result.queue_p95_s:13.0f} {result.window:7.1f} "
            f"{1e3 * result.mean_in_flight / result.late_tokens_per_s:21.2f} {result.preemptions:10d}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="virtual seconds per run")
    parser.add_argument("--n", type=int, default=1, help="completions per request")
    options = parser.parse_args()
    started = time.perf_counter()
    report(compare(options.seconds, options.n, SimSamplerConfig()))
    print(f"({time.perf_counter() - started:.1f} real s)")


if __name__ == "__main__":
    main()
