"""Seeded random programs over the pool: crashes, hangs, overloads, cancellations, joins and leaves, weight commits.

Conservation, whatever the interleaving: every request gets exactly one outcome, no slot stays taken, no engine holds
anything, and a replica never has more in flight than its largest window allows.
"""

import asyncio
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from rlorch.errors import DeadlineError, OverloadedError, ReplicaLostError
from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.pool.strategy import StrategyName
from rlorch.sim.loop import run_virtual
from rlorch.sim.queueing import EngineModel
from rlorch.sim.sampler import Fault, SimSampler, SimSamplerConfig
from rlorch.types import SamplingParams

REQUESTS = 60
ALLOWED = (DeadlineError, OverloadedError, ReplicaLostError)
SEEDS = 60


class World:
    """A pool, its replicas past and present, and a supervisor that restarts lost ones."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        strategies: tuple[StrategyName, ...] = ("adaptive", "knee", "fixed")
        self.config = PoolConfig(
            strategy=strategies[seed % 3],
            initial_window=self.rng.randint(1, 12),
            max_window=16,
            stats_period_s=0.2,
            request_timeout_s=self.rng.choice((2.0, 60.0)),
            no_replica_timeout_s=20.0,
            admission_timeout_s=120.0,
            stall_timeout_s=3.0,
            max_retries=2,
        )
        self.pool = SamplerPool({}, self.config)
        self.samplers: list[SimSampler] = []
        self.outcomes: dict[str, str] = {}
        for name in "abc"[: self.rng.randint(1, 3)]:
            self.start(name)

    def start(self, name: str) -> None:
        now = asyncio.get_running_loop().time()
        faults: list[Fault] = []
        if self.rng.random() < 0.5:
            faults.append(Fault(self.rng.choice(("crash", "hang")), now + self.rng.uniform(0.05, 4)))
        if self.rng.random() < 0.4:
            faults.append(Fault("overload", now + self.rng.uniform(0, 2), seconds=self.rng.uniform(0.1, 3)))
        if self.rng.random() < 0.3:
            faults.append(Fault("slow", now, seconds=2.0, factor=self.rng.uniform(2, 30)))
        engine = EngineModel(max_num_seqs=self.rng.randint(2, 16), kv_tokens=self.rng.choice((600, 60_000)))
        config = SimSamplerConfig(
            engine, faults=tuple(faults), max_waiting=self.rng.choice((None, 8)), tokens_per_step=4
        )
        sampler = SimSampler(name, config, version=0)
        self.samplers.append(sampler)
        self.pool.add(name, sampler, kv_tokens=self.rng.choice((None, engine.kv_tokens)))

    async def request(self, number: int) -> None:
        request_id = f"r{number}"
        params = SamplingParams(n=self.rng.choice((1, 1, 4, 8, 20)), max_tokens=self.rng.randint(1, 64))
        session = self.rng.choice((None, f"s{number % 5}"))
        try:
            done = await self.pool.sample(
                np.full(16, number % 7, np.int32), params, request_id, session=session, priority=self.rng.randint(0, 2)
            )
            assert len(done) == params.n
            outcome = "completed"
        except ALLOWED as error:
            outcome = type(error).__name__
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            assert request_id not in self.outcomes, "one outcome each"
            self.outcomes[request_id] = outcome  # pyright: ignore[reportPossiblyUnboundVariable]

    async def supervise(self) -> None:
        while True:
            lost = await self.pool.lost.until(bool)
            await asyncio.sleep(self.rng.uniform(0, 2))
            for name in sorted(lost & self.pool.lost.value):
                self.start(name)

    async def disturb(self, requests: list[asyncio.Task[None]]) -> None:
        """Twenty random acts while requests run."""
        for act in range(20):
            await asyncio.sleep(self.rng.choice((0, 0, 0.05, 0.3)))
            names = [view.name for view in self.pool.view().replicas]
            name = self.rng.choice(names) if names else "a"
            match self.rng.randrange(7):
                case 0 | 1:
                    self.rng.choice(requests).cancel()
                case 2:
                    if names:
                        self.pool.routable(name, self.rng.random() < 0.5)
                case 3:
                    self.pool.remove(name)
                case 4:
                    self.start(self.rng.choice("abcd"))
                case 5:
                    self.pool.commit_happened(name)
                case _:
                    self.pool.step_completed()
            view = self.pool.view()
            assert view.in_flight >= 0, act
            assert all(r.in_flight <= max(self.config.max_window, 20) for r in view.replicas)
        self.start("e")  # somebody can serve what is left

    async def run(self) -> None:
        async with asyncio.TaskGroup() as services:
            helpers = [services.create_task(self.pool.run()), services.create_task(self.supervise())]
            async with asyncio.TaskGroup() as group:
                requests: list[asyncio.Task[None]] = []
                for number in range(REQUESTS):
                    requests.append(group.create_task(self.request(number)))
                    if self.rng.random() < 0.3:
                        await asyncio.sleep(self.rng.uniform(0, 0.1))
                group.create_task(self.disturb(requests))
            for helper in helpers:
                helper.cancel()


@cache
def outcomes_of(seed: int) -> Counter[str]:
    """Run a program, check conservation, count its outcomes."""

    async def scenario() -> Counter[str]:
        world = World(seed)
        await world.run()
        started = {f"r{number}" for number in range(REQUESTS)}
        missing = started - set(world.outcomes)  # cancelled before their first step
        assert set(world.outcomes) <= started
        assert len(missing) <= 20
        view = world.pool.view()
        assert (view.in_flight, view.queued) == (0, 0), view
        for sampler in world.samplers:
            engine = sampler.engine
            assert (sampler.held, engine.running, engine.waiting, engine.kv_usage) == ((), 0, 0, 0.0), sampler.name
        counts = Counter(world.outcomes.values())
        assert view.counts.get("completed", 0) == counts["completed"]
        counts["moved"] = view.counts.get("moved", 0)
        return counts

    return run_virtual(scenario(), limit_s=3600)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_request_has_one_outcome_and_nothing_is_left_behind(seed: int):
    assert outcomes_of(seed).total() > 0


def test_the_programs_reach_every_kind_of_outcome():
    """Programs without faults could not fail: these healed something, and most requests came through."""
    counts = sum((outcomes_of(seed) for seed in range(SEEDS)), Counter[str]())
    assert {"completed", "cancelled", "DeadlineError", "OverloadedError", "ReplicaLostError", "moved"} <= set(counts)
    assert counts["completed"] > 0.3 * counts.total()
