"""The roles of a run in this process, as the Runtime port."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from rlorch.aio import deadline
from rlorch.local.roles import LocalReference, LocalSampler, LocalTrainer
from rlorch.ports import RewardWorker, Tokenizer, WeightStore
from rlorch.scoring.worker import ProcessRewardWorker
from rlorch.specs import RuntimeSpec
from rlorch.weights.store import FileWeightStore

log = logging.getLogger(__name__)

R = TypeVar("R", bound="LocalTrainer | LocalReference | LocalSampler | ProcessRewardWorker")


class LocalRuntime:
    """The Runtime port in this process. Reward workers are child processes here as everywhere.

    Engines load one at a time: transformers builds a model under a default dtype that holds for the whole process, and
    a model that another thread builds meanwhile gets some of its tensors in it.
    """

    def __init__(self, spec: RuntimeSpec) -> None:
        self._spec = spec
        self._loading = asyncio.Lock()
        self._store = FileWeightStore(Path(spec.run_dir) / "weights", spec.weights)
        self._roles: dict[str, LocalTrainer | LocalReference | LocalSampler | ProcessRewardWorker] = {}

    def tokenizer(self) -> Tokenizer:
        """See `Runtime.tokenizer`."""
        from rlorch.engine.tokenizer import load_tokenizer

        return load_tokenizer(self._spec.model)

    def weight_store(self) -> WeightStore:
        """See `Runtime.weight_store`."""
        return self._store

    async def trainer(self) -> LocalTrainer:
        """See `Runtime.trainer`."""
        spec = self._spec

        async def start() -> LocalTrainer:
            async with self._loading:
                return await LocalTrainer.start(spec.model, spec.trainer, spec.weights, self._store)

        return await self._start("trainer", start)

    async def reference(self) -> LocalReference:
        """See `Runtime.reference`."""

        async def start() -> LocalReference:
            async with self._loading:
                return await LocalReference.start(self._spec.reference_model or self._spec.model, self._spec.trainer)

        return await self._start("reference", start)

    async def sampler(self, name: str) -> LocalSampler:
        """See `Runtime.sampler`."""

        async def start() -> LocalSampler:
            async with self._loading:
                return await LocalSampler.start(self._spec, self._store)

        return await self._start(name, start)

    async def reward_worker(self, name: str) -> RewardWorker:
        """See `Runtime.reward_worker`."""
        rewards = self._spec.rewards
        if rewards is None:
            raise ValueError("this runtime was given no rewards")

        async def start() -> ProcessRewardWorker:
            worker = ProcessRewardWorker(rewards)
            await worker.start()
            return worker

        return await self._start(name, start)

    async def release(self, name: str) -> None:
        """See `Runtime.release`."""
        if (role := self._roles.pop(name, None)) is not None:
            await role.close()

    async def stop(self) -> None:
        """See `Runtime.stop`."""
        roles, self._roles = self._roles, {}
        for name, role in roles.items():
            try:
                async with deadline(30.0, f"{name}: did not close"):
                    await role.close()
            except TimeoutError as error:
                log.warning("%s", error)

    async def _start(self, name: str, start: Callable[[], Awaitable[R]]) -> R:
        await self.release(name)
        self._roles[name] = role = await start()
        return role
