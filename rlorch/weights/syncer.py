"""Keeping one replica at the head of the weight store, without ever letting it serve weights it cannot name.

    head moves --> stage the next version while serving --> gate --> commit --> `committed`
                        |                                              |
                        +--- wrong weights: stop routing --------------+
                                    v
                    load anchor + chain (bounded tries) --> catch up with the head --> gate --> routable
                                    |
                                    +--> out of tries, or silent: `lost`, and `run` returns

Invariants:
    routable implies that the replica proved it holds `committed`;
    a replica becomes routable only at the head, so the minimum over routable replicas never goes back;
    a step is one version: a head that moves meanwhile only makes the way longer.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from rlorch.aio import Watched, deadline
from rlorch.errors import (
    DeadlineError,
    ReplicaLostError,
    RetryableError,
    RlorchError,
    SelfTestError,
    StorageError,
    WeightsError,
)
from rlorch.ports import Sampler, WeightStore
from rlorch.specs import WeightsSpec
from rlorch.types import CommitReport, Manifest
from rlorch.weights.chain import describe, steps_from
from rlorch.weights.gate import Gate

RESEED_ATTEMPTS = 3
"""Loads of anchor + chain before a replica counts as lost; a fault that survives two fresh loads is not passing."""
RESEED_BACKOFF_S = 2.0
"""Wait before the second load, doubled for each further one: a store that comes back needs seconds, not minutes."""
GATE_TIMEOUT_S = 3600.0
"""Longest evaluation that may hold a version in place."""


@dataclass(slots=True)
class SyncCounters:
    """Since the syncer started. `pause_s` is the time in which the engine stood still for commits."""

    commits: int = 0
    loads: int = 0
    reseeds: int = 0
    payload_bytes: int = 0
    stage_s: float = 0.0
    pause_s: float = 0.0


class Syncer:
    """Drives one replica.

    `committed` is the version that the replica proved to hold (None: unknown), `routable` whether it may get
    requests, `lost` the error that ended its syncing, `last` the newest commit report.
    """

    def __init__(
        self,
        name: str,
        sampler: Sampler,
        store: WeightStore,
        gate: Gate,
        spec: WeightsSpec,
        head: Watched[Manifest | None],
        *,
        on_change: Callable[[], None] | None = None,
        gate_timeout_s: float = GATE_TIMEOUT_S,
    ) -> None:
        self.name = name
        self.committed: Watched[int | None] = Watched(None)
        self.routable: Watched[bool] = Watched(False)
        self.lost: Watched[RlorchError | None] = Watched(None)
        self.last: CommitReport | None = None
        self.counters = SyncCounters()
        self._sampler = sampler
        self._store = store
        self._gate = gate
        self._spec = spec
        self._head = head
        self._on_change = on_change or (lambda: None)
        self._gate_timeout_s = gate_timeout_s
        self._held: Manifest | None = None

    async def run(self) -> None:
        """Follow the head until the replica is lost (returns) or the task is cancelled.

        Consumes: versions, as the head moves. Waits for: the head (no bound: training sets the pace), then store,
        replica and gate, each with a deadline. Unblocked by: `Publisher.publish`. Produces: `committed`, `routable`,
        `lost`. Errors that are not the replica's fault, such as a gate held too long, are raised.
        """
        try:
            while True:
                await self._head.until(lambda head: head is not None and not self._is_current(head))
                await self._catch_up()
        except _LostError as lost:
            self._close()
            self.lost.set(lost.cause)
            self._on_change()
        except BaseException:
            self._close()  # nobody keeps this replica current any more
            raise

    def _is_current(self, head: Manifest) -> bool:
        return self.routable.value and self._holds(head)

    def _holds(self, manifest: Manifest) -> bool:
        held = self._held
        return held is not None and (held.version, held.digest) == (manifest.version, manifest.digest)

    async def _catch_up(self) -> None:
        """Step to the head, as it is when each step starts, and become routable there."""
        while (head := self._head.value) is not None and not self._is_current(head):
            try:
                if self._held is None:
                    await self._load()
                elif steps := await self._steps(head):
                    await self._step(steps[0])
                else:
                    await self._open()
            except (WeightsError, StorageError) as error:
                await self._reseed(error)

    async def _steps(self, head: Manifest) -> tuple[Manifest, ...]:
        """The versions still to stage, in order; none at the head."""
        held = self._held
        if held is not None and head.base_version == held.version:
            return (head,)
        if self._holds(head):
            return ()
        async with self._asking_store(head.version):
            return steps_from(held, await self._store.chain(head.version))

    async def _step(self, manifest: Manifest) -> None:
        """Stage one version beside serving, then commit it behind the gate."""
        spec, version = self._spec, manifest.version
        async with self._asking_replica("stage", version, spec.stage_timeout_s):
            await self._sampler.stage(manifest)
        async with self._gate.commit(f"{self.name}, commit of version {version}", self._gate_timeout_s):
            async with self._asking_replica("commit", version, spec.commit_timeout_s):
                report = await self._sampler.commit(version)
            self._accept(report, manifest)
        self.counters.commits += 1

    async def _load(self) -> None:
        """Replace whatever the replica holds by the newest anchor and its chain. It is not routable meanwhile."""
        assert self._head.value is not None, "load before anything was published"
        version, spec = self._head.value.version, self._spec
        async with self._asking_store(version):
            chain = await self._store.chain(version)
        async with self._asking_replica("load", version, spec.stage_timeout_s + spec.commit_timeout_s):
            report = await self._sampler.load(chain)
        self._accept(report, chain[-1])
        self.counters.loads += 1

    async def _open(self) -> None:
        """Let requests in, unless an evaluation pins the versions of the others: then after it."""
        async with self._gate.commit(f"{self.name}, joining at version {self.committed.value}", self._gate_timeout_s):
            if self._head.value is not None and self._holds(self._head.value):
                self.routable.set(True)
                self._on_change()

    async def _reseed(self, error: WeightsError | StorageError) -> None:
        """The replica's weights are not what they should be: stop routing to it and load until it has good ones."""
        self._close()
        self.counters.reseeds += 1
        for attempt in range(RESEED_ATTEMPTS):
            if attempt:
                await asyncio.sleep(RESEED_BACKOFF_S * 2 ** (attempt - 1))
            try:
                return await self._load()
            except (WeightsError, StorageError) as again:
                error = again
        raise _LostError(
            ReplicaLostError(
                f"{self.name}: gave up after {RESEED_ATTEMPTS} loads of {describe(self._head.value)}: {error}; "
                "look at its log and at the weight store, then restart it"
            )
        ) from error

    def _accept(self, report: CommitReport, manifest: Manifest) -> None:
        if report.version != manifest.version:
            raise SelfTestError(f"{self.name}: holds version {report.version} after committing {manifest.version}")
        self._held, self.last = manifest, report
        self.counters.payload_bytes += report.payload_bytes
        self.counters.stage_s += report.stage_s
        self.counters.pause_s += report.pause_s
        self.committed.set(manifest.version)
        self._on_change()

    def _close(self) -> None:
        """What the replica holds is unknown: no requests, no version."""
        self._held = None
        self.routable.set(False)
        self.committed.set(None)
        self._on_change()

    def _asking_store(self, version: int) -> AbstractAsyncContextManager[None]:
        what = f"{self.name}: the weight store does not give the chain of version {version}; is its disk up?"
        return deadline(self._spec.stage_timeout_s, what)

    @asynccontextmanager
    async def _asking_replica(self, phase: str, version: int, timeout_s: float) -> AsyncGenerator[None]:
        """Silence and loss of the replica end its syncing; wrong weights do not."""
        try:
            async with deadline(timeout_s, f"{self.name}: {phase} of version {version}: read its log and restart it"):
                yield
        except (DeadlineError, RetryableError) as error:
            raise _LostError(error) from error


class _LostError(Exception):
    """The replica cannot be kept in sync; `cause` is for its owner."""

    def __init__(self, cause: RlorchError) -> None:
        super().__init__(str(cause))
        self.cause = cause
