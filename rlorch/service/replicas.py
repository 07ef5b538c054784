"""One replica of a deployment: what it holds, how it moves to another snapshot, and what its answers were made with.

Invariants:
    it gets requests only while it holds weights that it can name (`held`);
    a whole load happens while nothing runs, so a version number in a completion means one snapshot only;
    a request that has to make room for a load ends in `MovedError` and is sent again by whoever sent it.

Errors of `reach` that are not a loss (`LostError`) leave the replica with the old weights, serving, or with none that
can be named, closed.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlorch.aio import Watched, deadline
from rlorch.errors import (
    AbortedError,
    DeadlineError,
    RetryableError,
    RlorchError,
    SelfTestError,
    StorageError,
    WeightsError,
)
from rlorch.ports import Sampler
from rlorch.service.hot_load import BASE, Adapter, Phase, Snapshot, Target, load_may_help, plan_move
from rlorch.service.types import ReplicaStatus, TransitionType
from rlorch.types import CommitReport, Completion, EngineStats, Floats, Manifest, SamplingParams, Tokens
from rlorch.weights.chain import describe

CONTROL_TIMEOUT_S = 30.0  # an abort or a reading of gauges


class MovedError(AbortedError):
    """The request had to make room for a weight load: send it again."""


class LostError(Exception):
    """The replica cannot be used any more; `cause` is for its owner."""

    def __init__(self, cause: RlorchError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True, slots=True)
class ReplicaTimeouts:
    """Seconds. `drain_s`: for running requests to finish before a load or a SYNC commit; then they are moved."""

    stage_s: float = 1800.0
    commit_s: float = 120.0
    load_s: float = 1800.0
    drain_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a completion was made with, by version; and when its attempt began, on the loop's clock."""

    replica: str
    identities: Mapping[int, str]
    digests: Mapping[int, str]
    began: float


@dataclass(eq=False)
class _Call:
    moved: bool = False


class TrackedSampler:
    """The Sampler port over another one, with a count of what runs and a book of what each version is."""

    def __init__(self, name: str, sampler: Sampler, on_answer: Callable[[str, Provenance], None]) -> None:
        self.name = name
        self.book: dict[int, tuple[str, str]] = {}
        self._sampler = sampler
        self._on_answer = on_answer
        self._calls: dict[str, _Call] = {}
        self._scores = 0
        self._running: Watched[int] = Watched(0)

    @property
    def running(self) -> int:
        """Calls that run."""
        return self._running.value

    async def sample(self, prompt_T: Tokens, params: SamplingParams, request_id: str) -> tuple[Completion, ...]:
        """See `Sampler.sample`. Raises `MovedError` when it had to make room for a load."""
        began = asyncio.get_running_loop().time()
        call = self._calls[request_id] = _Call()
        self._count()
        try:
            completions = await self._sampler.sample(prompt_T, params, request_id)
        except AbortedError as error:
            if call.moved:
                raise MovedError(f"request {request_id} made room for a load on {self.name}") from error
            raise
        finally:
            del self._calls[request_id]
            self._count()
        versions = {span.version for completion in completions for span in completion.spans}
        known = {version: self.book.get(version, ("unknown", "")) for version in sorted(versions)}
        identities = {version: identity for version, (identity, _) in known.items()}
        digests = {version: digest for version, (_, digest) in known.items()}
        self._on_answer(request_id, Provenance(self.name, identities, digests, began))
        return completions

    async def score(self, tokens_T: Tokens) -> Floats:
        """See `Sampler.score`."""
        self._scores += 1
        self._count()
        try:
            return await self._sampler.score(tokens_T)
        finally:
            self._scores -= 1
            self._count()

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing runs; after `timeout_s` move what still does. Close the replica to new requests first.

        Raises:
            DeadlineError: the engine does not let go of a request.
        """
        try:
            async with deadline(timeout_s, f"{self.name}: {self.running} requests still run"):
                await self._running.until(lambda running: running == 0)
        except DeadlineError:
            what = f"{self.name}: requests {list(self._calls)[:4]} do not end after an abort: restart the replica"
            async with deadline(CONTROL_TIMEOUT_S, what):
                for request_id, call in list(self._calls.items()):
                    call.moved = True
                    await self._sampler.abort(request_id)
                await self._running.until(lambda running: running == 0)

    async def abort(self, request_id: str) -> None:
        """See `Sampler.abort`."""
        await self._sampler.abort(request_id)

    async def load(self, chain: Sequence[Manifest]) -> CommitReport:
        """See `Sampler.load`."""
        return await self._sampler.load(chain)

    async def stage(self, manifest: Manifest) -> None:
        """See `Sampler.stage`."""
        await self._sampler.stage(manifest)

    async def commit(self, version: int) -> CommitReport:
        """See `Sampler.commit`."""
        return await self._sampler.commit(version)

    async def stats(self) -> EngineStats:
        """See `Sampler.stats`."""
        return await self._sampler.stats()

    async def add_adapter(self, name: str, path: str) -> None:
        """See `Sampler.add_adapter`."""
        await self._sampler.add_adapter(name, path)

    async def remove_adapter(self, name: str) -> None:
        """See `Sampler.remove_adapter`."""
        await self._sampler.remove_adapter(name)

    def _count(self) -> None:
        self._running.set(len(self._calls) + self._scores)


class ServingReplica:
    """A started sampler on its way between snapshots.

    `on_route` opens and closes it for requests, `on_pause` hears of commits, `on_change` of a new status.
    """

    def __init__(
        self,
        sampler: TrackedSampler,
        timeouts: ReplicaTimeouts,
        *,
        on_route: Callable[[bool], None],
        on_pause: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self.sampler = sampler
        self.held: Snapshot | None = None
        self.target: Snapshot | None = None
        self.adapters: dict[str, Adapter] = {}
        self.open = False
        self._timeouts = timeouts
        self._on_route, self._on_pause, self._on_change = on_route, on_pause, on_change
        self._phase: Phase = "load"
        self._reported = ReplicaStatus(sampler.name, False, "starting", None, None, None)

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.sampler.name

    def status(self) -> ReplicaStatus:
        """For people and clients."""
        return self._reported

    async def reach(self, target: Target, transition: TransitionType) -> None:
        """Hold the target and serve it. Idempotent.

        Raises:
            WeightsError, StorageError, UserError: it cannot; the module docstring says what is held then.
            LostError: the replica is silent, gone or does not compute.
        """
        self.target = target.snapshot
        self._report("loading", target.identity)
        try:
            await self._reach_weights(target.snapshot, transition)
            for adapter in target.adapters:
                await self._add(adapter)
        except LostError:
            self._route(False)
            raise
        except RlorchError as error:
            await self._name_what_is_held()
            self._report("error", target.identity, str(error))
            raise
        self._route(True)
        self._report("ready", target.identity)

    async def forget_adapters(self, kept: Sequence[Adapter]) -> None:
        """Unload every adapter but these, when their last requests have ended. Raises `LostError`."""
        names = {adapter.name for adapter in kept}
        for name in [name for name in self.adapters if name not in names]:
            async with self._asking(f"unload adapter {name}", self._timeouts.load_s):
                await self.sampler.remove_adapter(name)
            self.adapters.pop(name, None)
            self._report(self._reported.stage, self._reported.target_snapshot_identity, self._reported.error)

    # --- weights ------------------------------------------------------------------------------------------

    async def _reach_weights(self, target: Snapshot, transition: TransitionType) -> None:
        move = plan_move(self.held, target)
        if move.way == "in_flight":
            try:
                await self._update(move.steps, target, transition)
            except (WeightsError, StorageError) as error:
                if not load_may_help(self._phase, error):
                    raise
                await self._load(target)
        elif move.way == "load":
            await self._load(target)
        self._holds(target)

    async def _update(self, steps: Sequence[Manifest], target: Snapshot, transition: TransitionType) -> None:
        names = dict(zip((link.version for link in target.chain), target.names, strict=True))
        for position, step in enumerate(steps):
            self._phase = "stage"
            async with self._asking(f"stage {describe(step)}", self._timeouts.stage_s):
                await self.sampler.stage(step)
            if transition == "SYNC" and position == 0:
                await self._empty()
            self._phase = "commit"
            self.sampler.book[step.version] = (names[step.version], step.digest)
            self._on_pause()
            async with self._asking(f"commit {describe(step)}", self._timeouts.commit_s):
                report = await self.sampler.commit(step.version)
            self._check(report, step)
            self._on_pause()
            links = target.chain[: target.chain.index(step) + 1]
            self._holds(Snapshot(target.job_id, links, target.names[: len(links)]))

    async def _load(self, target: Snapshot) -> None:
        await self._empty()
        self._phase = "load"
        async with self._asking(f"load {describe(target.head)}", self._timeouts.load_s):
            report = await self.sampler.load(target.chain)
        self._check(report, target.head)
        self.sampler.book.clear()
        self._holds(target)

    async def _empty(self) -> None:
        self._route(False)
        try:
            await self.sampler.drain(self._timeouts.drain_s)
        except (DeadlineError, RetryableError) as error:
            raise LostError(error) from error

    def _check(self, report: CommitReport, manifest: Manifest) -> None:
        if report.version != manifest.version:
            raise LostError(SelfTestError(f"{self.name} holds version {report.version}, not {manifest.version}"))

    def _holds(self, snapshot: Snapshot) -> None:
        self.held = snapshot
        self.sampler.book[snapshot.head.version] = (snapshot.identity, snapshot.head.digest)

    async def _name_what_is_held(self) -> None:
        """After an error: the old weights, or none that can be named."""
        async with self._asking("read its version", CONTROL_TIMEOUT_S):
            stats = await self.sampler.stats()
        if self.held is not None and stats.version != self.held.head.version:
            self.held = None
        self._route(self.held is not None)

    async def _add(self, adapter: Adapter) -> None:
        if adapter.name in self.adapters:
            return
        self._phase = "adapter"
        async with self._asking(f"load adapter {adapter.name}", self._timeouts.load_s):
            await self.sampler.add_adapter(adapter.name, adapter.path)
        self.adapters[adapter.name] = adapter

    # --- around -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _asking(self, what: str, timeout_s: float) -> AsyncGenerator[None]:
        """Silence, loss and a failed self-test end the replica; wrong weights do not."""
        try:
            async with deadline(timeout_s, f"{self.name}: {what}: read its log and restart it"):
                yield
        except (DeadlineError, RetryableError, SelfTestError) as error:
            raise LostError(error) from error

    def _route(self, on: bool) -> None:
        if on != self.open:
            self.open = on
            self._on_route(on)

    def _report(self, stage: str, target: str | None, error: str = "") -> None:
        held = self.held
        self._reported = ReplicaStatus(
            name=self.name,
            readiness=self.open,
            stage=stage,
            current_snapshot_identity=None if held is None or held.identity == BASE else held.identity,
            target_snapshot_identity=target or None,
            digest=None if held is None else held.head.digest,
            loaded_adapters=tuple(adapter.identity for adapter in self.adapters.values()),
            error=error,
        )
        self._on_change()
