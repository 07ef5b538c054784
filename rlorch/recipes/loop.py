"""What recipes that train step by step share: batches, resuming, sinks, held-out evaluation, checkpoints, the export.

restore -> [step -> evaluate, now and then -> write metrics -> checkpoint, when due] * -> checkpoint -> export
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from rlorch.journal.journal import LOCK_NAME
from rlorch.journal.lock import RunLock
from rlorch.ports import Trainer
from rlorch.recipes.checkpoints import Checkpoints
from rlorch.recipes.run_dir import RunDir
from rlorch.recipes.sections import CheckpointSpec, ObserveSpec
from rlorch.specs import Spec

EVALUATE_EVERY = 50
"""Steps between evaluations; the last step is always evaluated."""

Item = TypeVar("Item")
Step = Callable[[int], Awaitable[Mapping[str, float]]]
"""Trains the step that starts from a version; its metrics."""


class LoopConfig(Protocol):
    """What the loop reads of a recipe's config."""

    @property
    def name(self) -> str:
        """Of the run."""
        ...

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        ...

    @property
    def checkpoint(self) -> CheckpointSpec:
        """When to save."""
        ...

    @property
    def observe(self) -> ObserveSpec:
        """Where metrics go."""
        ...


class Loop:
    """The optimizer steps of one run of one process. `version` counts them."""

    def __init__(self, config: LoopConfig, run_dir: RunDir, trainer: Trainer) -> None:
        self._config = config
        self._run_dir = run_dir
        self._trainer = trainer
        self._checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint)
        self.version = 0

    async def restore(self) -> int:
        """Load the newest intact checkpoint, if there is one; the version to go on from."""
        if (latest := await self._checkpoints.latest()) is not None:
            self.version = await self._trainer.load(latest.path)
        return self.version

    async def run(
        self, step: Step, *, evaluate: Callable[[], Awaitable[Mapping[str, float]]] | None = None, stop: asyncio.Event
    ) -> dict[str, float]:
        """Train to `config.steps` and export the model; returns the last step's metrics. With `stop` set, ends after
        the running step, with a checkpoint.

        Raises:
            ResumeError: another driver is at work in the run directory.
        """
        config, trainer = self._config, self._trainer
        assert isinstance(config, Spec), "recipe configs are Specs"
        lock = RunLock(self._run_dir.path / LOCK_NAME)
        sink = self._run_dir.sinks(config.observe, config.name, config)
        metrics: dict[str, float] = {}
        try:
            while self.version < config.steps and not stop.is_set():
                metrics = dict(await step(self.version))
                self.version += 1
                if evaluate and (self.version % EVALUATE_EVERY == 0 or self.version == config.steps):
                    metrics |= await evaluate()
                sink.write(self.version, metrics)
                if self._checkpoints.due(self.version):
                    await self._checkpoints.save(trainer, self.version)
            await self._checkpoints.save(trainer, self.version)
            if self.version >= config.steps:
                await self._run_dir.export(trainer)
        finally:
            sink.close()
            lock.release()
        return metrics


def batch_of(items: Sequence[Item], batch_size: int, step: int, seed: int) -> list[Item]:
    """The items of one step: epochs of all of them, each in its own order, cut end to end into batches.

    A function of its arguments alone: a resumed run takes exactly what an uninterrupted one would have.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // len(items) for position in positions}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(items)) for epoch in epochs}
    return [items[int(orders[position // len(items)][position % len(items)])] for position in positions]
