"""The roles of an RL run, started and wired to each other."""

import asyncio
from dataclasses import dataclass
from functools import partial

from rlorch.coordinator.fleet import Fleet
from rlorch.observe.trace import Tracer
from rlorch.pool.pool import SamplerPool
from rlorch.ports import Reference, Runtime, Trainer
from rlorch.recipes.rl.config import RLConfig, runtime_spec
from rlorch.scoring.pool import RewardPool, call_timeout_s
from rlorch.weights.group import SyncGroup
from rlorch.weights.publisher import Publisher


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """The started roles of a run."""

    trainer: Trainer
    reference: Reference | None
    fleet: Fleet
    rewards: RewardPool | None
    publisher: Publisher


async def start_roles(config: RLConfig, runtime: Runtime, tracer: Tracer) -> Roles:
    """All roles at once; the first failure ends the others' start."""
    wants_reference = "reference" in runtime_spec(config).roles
    with tracer.span("coordinator", "start roles"):
        async with asyncio.TaskGroup() as tasks:
            trainer = tasks.create_task(runtime.trainer(), name="start trainer")
            reference = tasks.create_task(runtime.reference(), name="start reference") if wants_reference else None
            samplers = {
                name: tasks.create_task(runtime.sampler(name), name=f"start {name}")
                for name in (f"sampler-{index}" for index in range(config.sampler.replicas))
            }
            workers = {
                name: tasks.create_task(runtime.reward_worker(name), name=f"start {name}")
                for name in (f"reward-{index}" for index in range(config.rewards.workers if config.rewards else 0))
            }
    store = runtime.weight_store()
    publisher = Publisher(trainer.result(), store, config.weights)
    syncs = SyncGroup(store, config.weights, publisher.head, gate_timeout_s=config.evaluation.timeout_s)
    started = {name: task.result() for name, task in samplers.items()}
    pool = SamplerPool({}, config.concurrency, span=lambda name: tracer.span(name, "generate"))
    return Roles(
        trainer=trainer.result(),
        reference=reference.result() if reference else None,
        fleet=Fleet(runtime, started, pool, syncs),
        rewards=RewardPool(
            {name: task.result() for name, task in workers.items()},
            call_timeout_s=partial(call_timeout_s, config.rewards),
            restart=runtime.reward_worker,
        )
        if config.rewards
        else None,
        publisher=publisher,
    )
