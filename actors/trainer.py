"""The policy trainer and the reference as Ray actors, and the ports in front of them. Each may have several ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from rlorch.local import LocalReference, LocalTrainer
from rlorch.specs import Ranks, RuntimeSpec
from rlorch.types import AdamParams, Datum, Floats, ForwardResult, LossSpec, Manifest, Normalization, StepResult
from rlorch.weights.store import FileWeightStore

from .process import prepare
from .ranks import RemoteRanks, meeting_point
from .remote import Remote

CALL_TIMEOUT_S = 3600.0  # one call on a large model with a long batch; the coordinator's own deadlines are tighter
FILE_TIMEOUT_S = 1800.0  # export, save and load, to a network file system


@ray.remote
class TrainerActor:
    """Hosts a `LocalTrainer`, or one rank of it."""

    async def meeting_point(self) -> str:
        """Where the ranks can meet when this one is rank 0."""
        return meeting_point()

    async def start(self, name: str, spec: RuntimeSpec, threads: int, ranks: Ranks) -> None:
        """Load the model."""
        prepare(name, spec.run_dir, threads)
        store = FileWeightStore(Path(spec.run_dir) / "weights", spec.weights)
        self._role = await LocalTrainer.start(spec.model, spec.trainer, spec.weights, store, ranks)

    async def forward(self, datums: Sequence[Datum]) -> ForwardResult:
        """One hop."""
        return await self._role.forward(datums)

    async def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """One hop."""
        return await self._role.forward_backward(datums, loss)

    async def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """One hop."""
        return await self._role.optim_step(adam, normalization)

    async def export(self, kind: str) -> Manifest:
        """One hop."""
        return await self._role.export(kind)

    async def published(self, version: int) -> None:
        """One hop."""
        await self._role.published(version)

    async def save(self, path: str) -> Mapping[str, str]:
        """One hop."""
        return await self._role.save(path)

    async def load(self, path: str) -> int:
        """One hop."""
        return await self._role.load(path)

    async def save_pretrained(self, path: str) -> None:
        """One hop."""
        await self._role.save_pretrained(path)


@ray.remote
class ReferenceActor:
    """Hosts a `LocalReference`, or one rank of it."""

    async def meeting_point(self) -> str:
        """Where the ranks can meet when this one is rank 0."""
        return meeting_point()

    async def start(self, name: str, spec: RuntimeSpec, threads: int, ranks: Ranks) -> None:
        """Load the model."""
        prepare(name, spec.run_dir, threads)
        self._role = await LocalReference.start(spec.reference_model or spec.model, spec.trainer, ranks)

    async def logprobs(self, datums: Sequence[Datum]) -> tuple[Floats, ...]:
        """One hop."""
        return await self._role.logprobs(datums)

    async def top_k(self, datums: Sequence[Datum], k: int) -> ForwardResult:
        """One hop."""
        return await self._role.top_k(datums, k)


class RayTrainer:
    """The Trainer port over a `TrainerActor`, or over one per rank. Its calls run in the order they were made."""

    def __init__(self, remote: Remote | RemoteRanks) -> None:
        self._remote = remote.ordered()

    async def forward(self, datums: Sequence[Datum]) -> ForwardResult:
        """See `Trainer.forward`."""
        return await self._remote.call("forward", datums, timeout_s=CALL_TIMEOUT_S)

    async def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """See `Trainer.forward_backward`."""
        return await self._remote.call("forward_backward", datums, loss, timeout_s=CALL_TIMEOUT_S)

    async def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """See `Trainer.optim_step`."""
        return await self._remote.call("optim_step", adam, normalization, timeout_s=CALL_TIMEOUT_S)

    async def export(self, kind: str) -> Manifest:
        """See `Trainer.export`."""
        return await self._remote.call("export", kind, timeout_s=FILE_TIMEOUT_S)

    async def published(self, version: int) -> None:
        """See `Trainer.published`."""
        await self._remote.call("published", version, timeout_s=CALL_TIMEOUT_S)

    async def save(self, path: str) -> Mapping[str, str]:
        """See `Trainer.save`."""
        return await self._remote.call("save", path, timeout_s=FILE_TIMEOUT_S)

    async def load(self, path: str) -> int:
        """See `Trainer.load`."""
        return await self._remote.call("load", path, timeout_s=FILE_TIMEOUT_S)

    async def save_pretrained(self, path: str) -> None:
        """See `Trainer.save_pretrained`."""
        await self._remote.call("save_pretrained", path, timeout_s=FILE_TIMEOUT_S)


class RayReference:
    """The Reference port over a `ReferenceActor`, or over one per rank."""

    def __init__(self, remote: Remote | RemoteRanks) -> None:
        self._remote = remote

    async def logprobs(self, datums: Sequence[Datum]) -> tuple[Floats, ...]:
        """See `Reference.logprobs`."""
        return await self._remote.call("logprobs", datums, timeout_s=CALL_TIMEOUT_S)

    async def top_k(self, datums: Sequence[Datum], k: int) -> ForwardResult:
        """See `Reference.top_k`."""
        return await self._remote.call("top_k", datums, k, timeout_s=CALL_TIMEOUT_S)
