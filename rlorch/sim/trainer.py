"""A trainer and a reference that take time but no compute: real versions, real deltas, virtual seconds.

The weights are a few small arrays whose bits change at every step by a generator seeded with (seed, version), so two
runs that take the same steps hold the same weights, and a replayed run can be compared bit for bit.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from rlorch.errors import InvariantError, ReplicaLostError
from rlorch.ports import WeightStore
from rlorch.types import (
    AdamParams,
    Datum,
    Floats,
    ForwardResult,
    LossSpec,
    Manifest,
    Normalization,
    StepResult,
)
from rlorch.weights.codec import digest, encode_update

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True)
class TrainerTimes:
    """Virtual seconds of each call."""

    forward_s_per_token: float = 1e-4
    backward_s_per_token: float = 2e-4
    optim_s: float = 0.5
    export_s: float = 0.2
    save_s: float = 2.0
    load_s: float = 2.0


class SimTrainer:
    """The Trainer port. `crash_at_version` makes every call fail once that version is reached, until replaced."""

    def __init__(
        self,
        store: WeightStore,
        *,
        seed: int = 0,
        num_values: int = 512,
        changed_fraction: float = 0.02,
        times: TrainerTimes | None = None,
        crash_at_version: int | None = None,
    ) -> None:
        self._store = store
        self._seed = seed
        self._num_values = num_values
        self._changed_fraction = changed_fraction
        self._times = times or TrainerTimes()
        self._crash_at_version = crash_at_version
        self._lock = asyncio.Lock()
        self._pending_rows = 0
        self.version = 0
        self.trained_rows: list[int] = []
        self._weights = self._weights_of(0, None)
        self._published: tuple[int, dict[str, NDArray[np.uint16]]] | None = None
        self._exported: tuple[int, dict[str, NDArray[np.uint16]]] | None = None

    async def forward(self, datums: Sequence[Datum]) -> ForwardResult:
        """See `Trainer.forward`."""
        async with self._lock:
            await self._work(self._times.forward_s_per_token * _tokens(datums))
            return ForwardResult(_logprobs(datums), {})

    async def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """See `Trainer.forward_backward`."""
        async with self._lock:
            per_token = self._times.forward_s_per_token + self._times.backward_s_per_token
            await self._work(per_token * _tokens(datums))
            self._pending_rows += len(datums)
            return ForwardResult(_logprobs(datums), {"loss:sum": 0.0, "num_loss_tokens:sum": float(_tokens(datums))})

    async def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """See `Trainer.optim_step`."""
        async with self._lock:
            await self._work(self._times.optim_s)
            self.trained_rows.append(self._pending_rows)
            self._pending_rows = 0
            self.version += 1
            self._weights = self._weights_of(self.version, self._weights)
            return StepResult(self.version, {"grad_norm:last": 1.0})

    async def export(self, kind: str) -> Manifest:
        """See `Trainer.export`."""
        async with self._lock:
            await self._work(self._times.export_s)
            base_version, base = self._published or (None, None)
            anchor = kind == "anchor" or base is None
            manifest, payload = encode_update(
                version=self.version,
                kind="anchor" if anchor else "delta",
                base_version=None if anchor else base_version,
                base=None if anchor else base,
                new=self._weights,
                dtypes=dict.fromkeys(self._weights, "BF16"),
            )
            self._exported = (self.version, self._weights)
        await self._store.put(manifest.payload, payload)
        return manifest

    async def published(self, version: int) -> None:
        """See `Trainer.published`."""
        if self._published is not None and self._published[0] == version:
            return
        exported = self._exported and self._exported[0]
        if exported != version:
            raise InvariantError(f"published({version}), but the last export was version {exported}")
        self._published = self._exported

    async def save(self, path: str) -> Mapping[str, str]:
        """See `Trainer.save`."""
        async with self._lock:
            await self._work(self._times.save_s)
            body = orjson.dumps({"version": self.version})
            await asyncio.to_thread((Path(path) / STATE_FILE).write_bytes, body)
            return {STATE_FILE: digest(body)}

    async def load(self, path: str) -> int:
        """See `Trainer.load`."""
        async with self._lock:
            await self._work(self._times.load_s)
            state = orjson.loads(await asyncio.to_thread((Path(path) / STATE_FILE).read_bytes))
            self._pending_rows = 0
            self.version, self._weights = 0, self._weights_of(0, None)
            for version in range(1, state["version"] + 1):
                self._weights = self._weights_of(version, self._weights)
            self.version = state["version"]
            self._published = None
            return self.version

    async def save_pretrained(self, path: str) -> None:
        """See `Trainer.save_pretrained`: what a simulated model is, is its version."""
        await self.save(path)

    async def _work(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self._crash_at_version is not None and self.version >= self._crash_at_version:
            raise ReplicaLostError("trainer: the actor is gone (simulated)")

    def _weights_of(
        self, version: int, before: Mapping[str, NDArray[np.uint16]] | None
    ) -> dict[str, NDArray[np.uint16]]:
        rng = np.random.default_rng((self._seed, version))
        if before is None:
            return {name: rng.integers(0, 2**16, self._num_values, dtype=np.uint16) for name in ("embed", "layer.0")}
        after = {name: array.copy() for name, array in before.items()}
        for array in after.values():
            flips = rng.random(array.size) < self._changed_fraction
            array[flips] ^= 1
        return after


class SimReference:
    """The Reference port."""

    def __init__(self, times: TrainerTimes | None = None) -> None:
        self._times = times or TrainerTimes()

    async def logprobs(self, datums: Sequence[Datum]) -> tuple[Floats, ...]:
        """See `Reference.logprobs`."""
        await asyncio.sleep(self._times.forward_s_per_token * _tokens(datums))
        return _logprobs(datums)


def _tokens(datums: Sequence[Datum]) -> int:
    return sum(len(datum.tokens_T) for datum in datums)


def _logprobs(datums: Sequence[Datum]) -> tuple[Floats, ...]:
    return tuple(np.full(len(datum.tokens_T), -1.0, dtype=np.float32) for datum in datums)
