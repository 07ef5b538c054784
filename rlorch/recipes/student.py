"""The policy in training as something to sample from: strictly on-policy, its newest weights on every replica.

    trainer at version v -> publish -> every replica serves v -> sample -> train to v + 1 -> ...

The pieces are those of an RL run (publisher, syncers, fleet, pool), without its overlap: sampling and training take
turns.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlorch.aio import deadline
from rlorch.coordinator.fleet import Fleet
from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.ports import Runtime, Sampler, Tokenizer, Trainer
from rlorch.rollout.single_turn import rollout_group
from rlorch.specs import SamplerSpec, WeightsSpec
from rlorch.types import Prompt, Rollout, SamplingParams
from rlorch.weights.group import SyncGroup
from rlorch.weights.publisher import Publisher


class Student:
    """Replicas that follow a trainer. `run` keeps them alive; nothing is sampled before the first `serve`."""

    def __init__(
        self,
        runtime: Runtime,
        trainer: Trainer,
        samplers: Mapping[str, Sampler],
        sampler: SamplerSpec,
        weights: WeightsSpec,
        concurrency: PoolConfig,
    ) -> None:
        store = runtime.weight_store()
        self._publisher = Publisher(trainer, store, weights)
        self._syncs = SyncGroup(store, weights, self._publisher.head)
        self._pool = SamplerPool({}, concurrency)
        self._fleet = Fleet(runtime, samplers, self._pool, self._syncs)
        self._tokenizer = runtime.tokenizer()
        self._wait_s = sampler.start_timeout_s + weights.stage_timeout_s + weights.commit_timeout_s
        self._serves: int | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's."""
        return self._tokenizer

    async def run(self) -> None:
        """Keep the replicas in service until cancelled. Raises `ReplicaLostError` when none is left."""
        await self._fleet.run()

    async def serve(self, version: int) -> None:
        """Publish the trainer's weights, which are `version`, and wait until every routable replica serves them.

        Raises:
            DeadlineError: no replica got there in time.
        """
        if version == self._serves:
            return
        await self._publisher.publish()
        what = f"samplers: version {version} is not served; logs/sampler-*.log say how far they came"
        async with deadline(self._wait_s, what):
            await self._syncs.committed_everywhere.until(lambda served: served >= version)
        self._serves = version

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int], name: str
    ) -> tuple[Rollout, ...]:
        """`params.n` rollouts of each prompt, in order, from the weights that are served. The first error cancels the
        others.

        Args:
            prompts: what to answer.
            params: the same for all but the seed.
            seeds: one per prompt.
            name: begins the request ids; must not be that of a call that runs.
        """
        async with asyncio.TaskGroup() as tasks:
            groups = [
                tasks.create_task(
                    rollout_group(
                        prompt,
                        group_id=index,
                        params=replace(params, seed=seed),
                        sample=self._pool.sample,
                        tokenizer=self._tokenizer,
                        request_prefix=name,
                    )
                )
                for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
        return tuple(rollout for group in groups for rollout in group.result())
