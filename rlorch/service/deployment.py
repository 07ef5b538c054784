"""One deployment, from its creation to its end: replicas that follow its snapshot, as many as its requests need.

    scale: load -> Autoscaler -> desired count -> slots 0..n-1
    slot:  start a sampler -> reach the target -> routable -> follow the target --lost--> start again
    hot load: prepare files -> Transition.begin -> every replica reaches it or fails -> served, or the old one again

Everything runs in one TaskGroup under `run`. Cancelling `run` leaves the samplers as they are: whoever opens the
deployment again finds them. `end` stops them.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from rlorch.aio import Watched, deadline
from rlorch.errors import DeadlineError, InvariantError, ReplicaLostError, RetryableError, RlorchError, UserError
from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.ports import Sampler
from rlorch.service.autoscale import Autoscaler, ScaleLimits, ScaleLoad
from rlorch.service.deployment_requests import DeploymentRequests
from rlorch.service.hot_load import BASE, Adapter, Failure, Snapshot, Target, Transition, used
from rlorch.service.ports import Cluster
from rlorch.service.replicas import LostError, ReplicaTimeouts, ServingReplica, TrackedSampler
from rlorch.service.types import Deployment, DeploymentConfig, DeploymentState, ReplicaStatus
from rlorch.specs import RuntimeSpec, SamplerSpec, TrainerSpec

MAX_RESTARTS = 5  # of one replica without a stable time between: more is a cause that restarting does not cure
STABLE_S = 300.0  # a replica that lived as long has earned all its restarts again
RESTART_BACKOFF_S = 1.0  # before the second start in a row, doubled for each further one
MAX_BACKOFF_S = 60.0
STOP_TIMEOUT_S = 60.0  # the cluster ends a process

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeploymentSettings:
    """What all deployments of a service share; seconds.

    `sampler` and `trainer` (its serve dtype) are those that deployments add to. `start_timeout_s` bounds the start of
    a replica, waiting for room included; `wake_timeout_s` a request's wait while there is none; `request_timeout_s` a
    request in all.
    """

    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    trainer: TrainerSpec = field(default_factory=TrainerSpec)
    timeouts: ReplicaTimeouts = field(default_factory=ReplicaTimeouts)
    start_timeout_s: float = 1800.0
    wake_timeout_s: float = 1800.0
    attempt_timeout_s: float = 1800.0
    request_timeout_s: float = 7200.0
    stall_timeout_s: float = 120.0
    stop_drain_s: float = 60.0
    scale_period_s: float = 1.0
    up_after_s: float = 5.0
    down_after_s: float = 120.0
    cooldown_s: float = 30.0

    def runtime(self, config: DeploymentConfig, model_dir: str, run_dir: str) -> RuntimeSpec:
        """How a deployment's replicas are started. One adapter more than are kept fits: a new one loads beside them."""
        sampler = self.sampler.model_copy(
            update={
                "engine": config.engine,
                "max_model_len": config.max_model_len or self.sampler.max_model_len,
                "max_num_seqs": config.max_num_seqs,
                "tensor_parallel": config.tensor_parallel,
                "max_loras": config.max_loras + 1 if config.max_loras else 0,
                "max_lora_rank": config.max_lora_rank,
            }
        )
        return RuntimeSpec(model=model_dir, run_dir=run_dir, trainer=self.trainer, sampler=sampler, roles=("sampler",))

    def pool(self, config: DeploymentConfig) -> PoolConfig:
        """As many sequences at a replica as it decodes at once: clients have windows of their own, and what the
        engine measures of its queue must reach them."""
        return PoolConfig(
            strategy="fixed",
            initial_window=config.max_num_seqs,
            max_window=config.max_num_seqs,
            request_timeout_s=self.attempt_timeout_s,
            admission_timeout_s=self.request_timeout_s,
            no_replica_timeout_s=self.wake_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class SnapshotRef:
    """A checkpoint that was asked for."""

    job_id: str
    identity: str


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """What a deployment is found again by. `snapshot` is the key of the one that is served (None: the base model),
    `moving` a hot load that had not ended."""

    deployment: Deployment
    desired: int
    snapshot: str | None = None
    adapters: tuple[Adapter, ...] = ()
    default: str | None = None
    moving: SnapshotRef | None = None


@dataclass(eq=False)
class _Slot:
    """A place for a replica, over the lives of its processes."""

    index: int
    name: str
    stopping: Watched[bool] = field(default_factory=lambda: Watched(False))
    replica: ServingReplica | None = None
    strikes: int = 0
    error: str = ""


class _FatalError(Exception):
    """The deployment cannot serve."""

    def __init__(self, cause: RlorchError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class DeploymentLife:
    """A deployment that runs.

    `changed` counts what `view` may show differently; `wanted` is the hot load under way; `transition` is None until
    `prepare` has found what to serve first. `save` writes its record, `on_settled` hears that a hot load ended.
    """

    def __init__(
        self,
        deployment: Deployment,
        spec: RuntimeSpec,
        cluster: Cluster,
        settings: DeploymentSettings,
        *,
        desired: int,
        prepare: Callable[[], Awaitable[Target]],
        save: Callable[[], Awaitable[None]],
        on_settled: Callable[[], Awaitable[None]],
    ) -> None:
        self.deployment = deployment
        self.transition: Watched[Transition | None] = Watched(None)
        self.wanted: SnapshotRef | None = None
        self.changed: Watched[int] = Watched(0)
        self.pool = SamplerPool({}, settings.pool(deployment.config))
        self.requests = DeploymentRequests(self.id, self.pool, settings.request_timeout_s, self._load_changed)
        self._spec = spec
        self._cluster = cluster
        self._settings = settings
        self._prepare = prepare
        self._save = save
        self._on_settled = on_settled
        self._scaler = Autoscaler(desired, asyncio.get_running_loop().time())
        self._kicks: Watched[int] = Watched(0)
        self._ending: Watched[bool] = Watched(False)
        self._slots: dict[int, _Slot] = {}
        self._ceiling: int | None = None  # replicas that there is room for, once one more was refused
        self._found: frozenset[int] = frozenset()
        self._turn: Watched[int] = Watched(0)

    @property
    def id(self) -> str:
        """The deployment's id."""
        return self.deployment.config.id

    @property
    def config(self) -> DeploymentConfig:
        """As it was created and updated."""
        return self.deployment.config

    @property
    def desired(self) -> int:
        """Replicas that there should be."""
        return self._scaler.desired

    # --- what it shows ------------------------------------------------------------------------------------

    def view(self) -> Deployment:
        """As of now."""
        failure = self.transition.value.failure if self.transition.value else None
        replicas = tuple(self._status(slot, failure) for _, slot in sorted(self._slots.items()))
        return replace(self.deployment, state=self._state(), replicas=replicas, snapshot_identity=self.identity())

    def identity(self) -> str | None:
        """The checkpoint that requests get which name none."""
        transition = self.transition.value
        return None if transition is None else transition.good.identity or None

    def ready(self) -> list[ServingReplica]:
        """The replicas that get requests."""
        return [slot.replica for slot in self._slots.values() if slot.replica is not None and slot.replica.open]

    def in_use(self) -> list[Snapshot]:
        """Snapshots that a replica may have to load now."""
        transition = self.transition.value
        targets = [] if transition is None else [transition.good.snapshot, transition.target.snapshot]
        held = [slot.replica.target for slot in self._slots.values() if slot.replica is not None]
        return targets + [snapshot for snapshot in held if snapshot is not None]

    def note(self, state: DeploymentState | None = None, message: str | None = None) -> None:
        """Something changed."""
        self.deployment = replace(
            self.deployment,
            state=self.deployment.state if state is None else state,
            message=self.deployment.message if message is None else message,
        )
        self.changed.set(self.changed.value + 1)

    def _state(self) -> DeploymentState:
        state = self.deployment.state
        return "UPDATING" if state == "READY" and self.wanted is not None else state

    def _status(self, slot: _Slot, failure: Failure | None) -> ReplicaStatus:
        if slot.replica is None:
            stage = "error" if slot.error else "starting"
            return ReplicaStatus(slot.name, False, stage, None, None, None, error=slot.error)
        status = slot.replica.status()
        if failure is not None and status.stage in ("ready", "error"):
            return replace(
                status, stage="error", target_snapshot_identity=failure.identity or None, error=failure.reason
            )
        return status

    # --- what it is told ----------------------------------------------------------------------------------

    def configure(self, config: DeploymentConfig) -> None:
        """Take new settings; replicas that there was no room for get another chance."""
        self.deployment = replace(self.deployment, config=config)
        self._ceiling = None
        self._load_changed()
        self.note()

    def set_desired(self, desired: int) -> None:
        """Scale by hand."""
        self._scaler.set(desired, asyncio.get_running_loop().time())
        self._load_changed()

    def touch(self) -> None:
        """Somebody needs a replica that is not asked for anything yet: one starts where there is none."""
        now = asyncio.get_running_loop().time()
        self._scaler.touch(now)
        if self._scaler.desired == 0:
            self._scaler.set(1, now)
        self._load_changed()

    def move_to(self, target: Target) -> None:
        """Begin a hot load whose files are in place."""
        transition = self._transition()
        transition.begin(target, [replica.name for replica in self.ready()])
        self._turned()

    async def refuse(self, ref: SnapshotRef, reason: str) -> None:
        """A hot load failed before it reached a replica."""
        if self.wanted == ref:
            self.wanted = None
            self._transition().failure = Failure(ref.identity, reason)
            _log.warning("deployment %s: hot load of %s failed: %s", self.id, ref.identity, reason)
            self.note()
            await self._save()

    def used(self, adapter: Adapter) -> None:
        """A request names an adapter."""
        transition = self._transition()
        transition.good = used(transition.good, adapter)

    def end(self, error: RlorchError) -> None:
        """Stop the replicas; `run` then returns. Requests end with `error`."""
        self.note("DELETED", str(error))
        self.requests.end_all(error)
        self._ending.set(True)

    # --- running ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `end`, a fatal error (state FAILED) or cancellation."""
        try:
            await self._run()
        except Exception as error:
            await self.fail(InvariantError(f"deployment {self.id} stopped on a bug: {error!r}"))
            raise

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(self.pool.run(), name=f"{self.id} pool"),
                    tasks.create_task(self._scale(tasks), name=f"{self.id} scale"),
                ]
                await self._ending.until(bool)
                background[1].cancel()
                for slot in self._slots.values():
                    slot.stopping.set(True)
                while self._slots:
                    turn = self._turn.value
                    await self._turn.until(lambda now, turn=turn: now != turn or not self._slots)
                background[0].cancel()
        except* _FatalError as group:
            fatal = _first(group)
            await self.fail(fatal.cause)

    async def fail(self, cause: RlorchError) -> None:
        """The deployment cannot serve: it says why, and its replicas are stopped."""
        _log.error("deployment %s failed: %s", self.id, cause)
        self.note("FAILED", str(cause))
        self.requests.end_all(type(cause)(f"deployment {self.id} failed: {cause}"))
        await self._save()
        for index in range(max(self.config.max_replicas, self.desired, *self._slots, 1) + 1):
            await self._stop(f"{self.id}.{index}")
        self._slots.clear()
        self.note()

    # --- how many -----------------------------------------------------------------------------------------

    async def _scale(self, tasks: asyncio.TaskGroup) -> None:
        """Keep as many slots as are desired: looks at each arrival and end of a request and each `scale_period_s`."""
        try:
            self.transition.set(Transition(await self._prepare()))
        except RlorchError as error:
            raise _FatalError(error) from error
        self.note()
        await self._find()
        while True:
            kicks, before = self._kicks.value, self.desired
            self._scaler.decide(asyncio.get_running_loop().time(), self._load(), self._limits())
            if self.desired != before:
                _log.info("deployment %s: %d replicas, were %d", self.id, self.desired, before)
                self._ceiling = None
            self._fit(tasks)
            if self.desired != before:
                await self._save()
            try:
                async with asyncio.timeout(self._settings.scale_period_s):
                    await self._kicks.until(lambda now, kicks=kicks: now != kicks)
            except TimeoutError:
                continue

    async def _find(self) -> None:
        """See which replicas run already; end those that are too many."""
        found: list[int] = []
        for index in range(max(self.config.max_replicas, self.desired)):
            name = f"{self.id}.{index}"
            try:
                async with deadline(STOP_TIMEOUT_S, f"replica {name} was not looked up"):
                    if await self._cluster.find_sampler(name) is not None:
                        found.append(index)
            except RlorchError as error:
                _log.warning("%s", error)
        for index in found[self.desired :]:
            await self._stop(f"{self.id}.{index}")
        self._found = frozenset(found[: self.desired])

    def _fit(self, tasks: asyncio.TaskGroup) -> None:
        wanted = self.desired if self._ceiling is None else min(self.desired, self._ceiling)
        staying = [slot for _, slot in sorted(self._slots.items()) if not slot.stopping.value]
        for slot in staying[wanted:]:
            slot.stopping.set(True)
        free = sorted({*range(self.config.max_replicas), *range(self.desired)} - self._slots.keys(),
                      key=lambda index: (index not in self._found, index))  # fmt: skip
        for index in free[: max(wanted - len(staying), 0)]:
            slot = self._slots[index] = _Slot(index, f"{self.id}.{index}")
            tasks.create_task(self._keep(slot), name=slot.name)

    def _load(self) -> ScaleLoad:
        ready = self.ready()
        running = sum(replica.sampler.running for replica in ready)
        return ScaleLoad(max(len(self.requests) - running, 0), running, self.config.max_num_seqs, len(ready))

    def _limits(self) -> ScaleLimits:
        return ScaleLimits(
            min_replicas=self.config.min_replicas,
            max_replicas=max(self.config.max_replicas, 1),
            idle_timeout_s=None if self.wanted is not None else self.config.idle_timeout_s,
            up_after_s=self._settings.up_after_s,
            down_after_s=self._settings.down_after_s,
            cooldown_s=self._settings.cooldown_s,
        )

    def _load_changed(self) -> None:
        self._kicks.set(self._kicks.value + 1)

    # --- one replica --------------------------------------------------------------------------------------

    async def _keep(self, slot: _Slot) -> None:
        """A slot's replica, started again whenever it is lost, until the slot is told to stop or given up."""
        try:
            while not slot.stopping.value:
                began = asyncio.get_running_loop().time()
                cause = await self._live(slot)
                self.pool.remove(slot.name)
                slot.replica, slot.error = None, str(cause or "")
                await self._left(slot, cause)
                await self._stop(slot.name)
                if cause is None or not await self._again(slot, cause, began):
                    return
        finally:
            self._slots.pop(slot.index, None)
            self._turned()
            self._load_changed()
            self.note()

    async def _again(self, slot: _Slot, cause: RlorchError, began: float) -> bool:
        """Whether to start the replica once more, after a pause that grows."""
        loop = asyncio.get_running_loop()
        slot.strikes = 1 if loop.time() - began >= STABLE_S else slot.strikes + 1
        if isinstance(cause, UserError) or slot.strikes > MAX_RESTARTS:
            others = sum(other is not slot and not other.stopping.value for other in self._slots.values())
            if not others:
                raise _FatalError(cause)
            self._ceiling = others
            _log.error("replica %s is given up, the others go on: %s", slot.name, cause)
            return False
        _log.warning("replica %s is lost and starts again (%d): %s", slot.name, slot.strikes, cause)
        pause_s = min(RESTART_BACKOFF_S * 2 ** (slot.strikes - 1), MAX_BACKOFF_S)
        try:
            async with asyncio.timeout(pause_s):
                await slot.stopping.until(bool)
        except TimeoutError:
            return True
        return False

    async def _live(self, slot: _Slot) -> RlorchError | None:
        """One process of a replica; why it was lost, None when it was told to stop."""
        what = f"replica {slot.name} did not start: is there room for it? See its log"
        try:
            async with deadline(self._settings.start_timeout_s, what):
                sampler = await self._cluster.start_sampler(slot.name, self._spec)
        except RlorchError as error:
            return error
        replica = self._join(slot, sampler)
        causes: list[RlorchError | None] = []

        def end(cause: RlorchError | None) -> None:
            causes.append(cause)
            for task in tasks:
                task.cancel()

        async def follow() -> None:
            try:
                await self._follow(slot, replica)
            except LostError as lost:
                end(lost.cause)

        async def watch_pool() -> None:
            await self.pool.lost.until(lambda lost: slot.name in lost)
            state = next((view.state for view in self.pool.view().replicas if view.name == slot.name), "lost")
            end(ReplicaLostError(f"{slot.name}: {state}"))

        async def watch_stop() -> None:
            await slot.stopping.until(bool)
            end(None)

        async with asyncio.TaskGroup() as life:
            tasks = [life.create_task(work, name=slot.name) for work in (follow(), watch_pool(), watch_stop())]
        if causes[0] is None:
            await self._empty(slot, replica)
        return causes[0]

    def _join(self, slot: _Slot, sampler: Sampler) -> ServingReplica:
        def route(on: bool) -> None:
            if slot.name not in self.pool.lost.value:
                self.pool.routable(slot.name, on)

        tracked = TrackedSampler(slot.name, sampler, self.requests.answered)
        self.pool.add(slot.name, tracked, routable=False)
        slot.error = ""
        slot.replica = ServingReplica(
            tracked,
            self._settings.timeouts,
            on_route=route,
            on_pause=lambda: self.pool.commit_happened(slot.name),
            on_change=self.note,
        )
        self.note()
        return slot.replica

    async def _follow(self, slot: _Slot, replica: ServingReplica) -> None:
        """Reach every target in turn. Raises `LostError` when the replica is, or cannot serve what others do."""
        while True:
            transition = self._transition()
            generation, target = transition.generation, transition.target
            try:
                await replica.reach(target, self.config.hot_load_transition_type)
            except RlorchError as error:
                _log.warning("replica %s did not reach %s: %s", slot.name, target.identity or "the base model", error)
                tried = transition.moving is target and generation == transition.generation
                if transition.failed(slot.name, generation, str(error)):
                    await self._settled()
                elif not tried and generation == transition.generation:
                    raise LostError(error) from error  # others serve it, or it served it before
            else:
                if self.deployment.state == "CREATING":
                    self.note("READY", "")
                    await self._save()
                if transition.reached(slot.name, generation):
                    await self._settled()
                await replica.forget_adapters(target.adapters)
            await self._next_target(slot, generation)

    async def _next_target(self, slot: _Slot, generation: int) -> None:
        transition = self._transition()
        await self._turn.until(lambda _: transition.generation != generation or slot.name in transition.bad)
        if slot.name in transition.bad:
            transition.bad -= {slot.name}
            raise LostError(RlorchError(f"{slot.name} did not reach {transition.good.identity}, which others serve"))

    async def _left(self, slot: _Slot, cause: RlorchError | None) -> None:
        transition = self.transition.value
        if transition is not None and transition.gone(slot.name, None if cause is None else str(cause)):
            await self._settled()
        self.note()

    async def _empty(self, slot: _Slot, replica: ServingReplica) -> None:
        """Let what runs finish, then move it."""
        self.pool.remove(slot.name)
        try:
            await replica.sampler.drain(self._settings.stop_drain_s)
        except (DeadlineError, RetryableError) as error:
            _log.warning("replica %s is stopped with requests in it: %s", slot.name, error)

    async def _stop(self, name: str) -> None:
        try:
            async with deadline(STOP_TIMEOUT_S, f"replica {name} does not end"):
                await self._cluster.stop_sampler(name)
        except RlorchError as error:
            _log.warning("%s", error)

    # --- transitions --------------------------------------------------------------------------------------

    async def _settled(self) -> None:
        """A hot load ended, one way or the other."""
        transition = self._transition()
        self.wanted = None
        if transition.failure is not None:
            _log.warning("deployment %s: hot load of %s failed: %s", self.id, *_parts(transition.failure))
        else:
            _log.info("deployment %s serves %s", self.id, transition.good.identity or BASE)
        self._turned()
        self.note()
        await self._save()
        await self._on_settled()

    def _turned(self) -> None:
        self._turn.set(self._turn.value + 1)
        self.note()

    def _transition(self) -> Transition:
        transition = self.transition.value
        assert transition is not None, f"deployment {self.id} does not know what to serve yet"
        return transition


def _parts(failure: Failure) -> tuple[str, str]:
    return failure.identity, failure.reason


def _first(group: BaseExceptionGroup[_FatalError]) -> _FatalError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group holds an exception")
