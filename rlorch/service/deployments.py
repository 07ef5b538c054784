"""The deployments of a service: create, look at, change, delete, hot-load, sample.

Records are written before what they describe: a service that dies at any instant finds its deployments, what they
serve and a hot load that had begun when it is back, and goes on. Every method is answered from memory or waits with a
deadline.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

from rlorch.aio import deadline
from rlorch.errors import DeadlineError, ReplicaLostError, RlorchError, UserError
from rlorch.service import references
from rlorch.service.base_models import BaseModels, context_length
from rlorch.service.checkpoints import Checkpoints
from rlorch.service.deployment import DeploymentLife
from rlorch.service.deployment_files import DeploymentFiles, snapshot_key
from rlorch.service.deployment_settings import DeploymentRecord, DeploymentSettings, SnapshotRef
from rlorch.service.deployment_specs import resolve
from rlorch.service.hot_load import BASE, Adapter, Target, check_previous
from rlorch.service.layout import Layout
from rlorch.service.ports import Cluster
from rlorch.service.records import Kind, Records
from rlorch.service.replicas import ServingReplica
from rlorch.service.snapshot_source import SnapshotSource
from rlorch.service.tables import JOBS
from rlorch.service.tasks import Tasks
from rlorch.service.types import Deployment, DeploymentConfig, Sampled, TransitionType
from rlorch.shapes import Catalogue
from rlorch.types import Floats, SamplingParams, Tokens

DEPLOYMENTS = Kind("deployment", DeploymentRecord)
END_TIMEOUT_S = 300.0
"""A deployment's replicas end within their drain and the cluster's own time, or something is badly stuck."""

_UPDATABLE = ("min_replicas", "max_replicas", "hot_load_trainer_job", "hot_load_transition_type")

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry:
    """A deployment in this process; `filing` orders what adds files and what deletes them."""

    life: DeploymentLife
    files: DeploymentFiles
    task: "asyncio.Task[None]"
    filing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Deployments:
    """All deployments of a data directory.

    Use between `start` and `close`, in the event loop of `tasks`. `now_s` is Unix time, seconds.
    """

    def __init__(
        self,
        records: Records,
        layout: Layout,
        cluster: Cluster,
        tasks: Tasks,
        checkpoints: Checkpoints,
        base_models: BaseModels,
        catalogue: Catalogue,
        now_s: Callable[[], float],
        settings: DeploymentSettings | None = None,
    ) -> None:
        self._records = records
        self._layout = layout
        self._cluster = cluster
        self._tasks = tasks
        self._base_models = base_models
        self._catalogue = catalogue
        self._now_s = now_s
        self._settings = settings or DeploymentSettings()
        self._source = SnapshotSource(cluster, checkpoints, layout, self._settings.trainer.serve_dtype)
        self._entries: dict[str, _Entry] = {}
        self._changing = asyncio.Lock()
        checkpoints.protect(self._in_use)

    # --- life ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Go on with every deployment that was there: running replicas are found, the others started. Idempotent."""
        for deployment_id, record in self._records.list(DEPLOYMENTS).items():
            if deployment_id in self._entries:
                continue
            if record.deployment.state in ("FAILED", "DELETED"):
                await self._clean(record.deployment)
                continue
            self._open(record)
            if record.moving is not None:
                self._begin(self._entries[deployment_id], record.moving)

    async def close(self) -> None:
        """Let go of the deployments; their replicas go on. Idempotent."""
        entries, self._entries = self._entries, {}
        for entry in entries.values():
            entry.task.cancel()
        if entries:
            await asyncio.wait([entry.task for entry in entries.values()])

    async def create(self, config: DeploymentConfig) -> Deployment:
        """Create a deployment, or get the one of that id unchanged; a failed or deleted one is replaced.

        It starts a replica also where `min_replicas` is 0, so that it can become ready and be loaded.

        Raises:
            UserError: a bad id or setting, or an unknown base model.
        """
        _check(config)
        async with self._changing:
            record = self._records.get(DEPLOYMENTS, config.id)
            if record is not None and self._view(record).state not in ("FAILED", "DELETED"):
                return self._view(record)
            directory = self._base_models.directory(config.base_model)
            config, model_dir = self._resolved(config, directory), str(directory)
            await self._end(config.id, "was replaced")
            now_s = self._now_s()
            deployment = Deployment(config, "CREATING", "", now_s, now_s, model_dir)
            record = DeploymentRecord(deployment, desired=max(config.min_replicas, 1))
            await self._records.put(DEPLOYMENTS, config.id, record)
            self._open(record)
            return self._view(record)

    def _resolved(self, config: DeploymentConfig, model_dir: Path) -> DeploymentConfig:
        shape = None if config.deployment_shape is None else self._catalogue.deployment(config.deployment_shape)
        trainer = config.hot_load_trainer_job
        record = None if trainer is None else self._records.get(JOBS, references.job_id(trainer))
        job = None if record is None else record.job.config
        return resolve(config, shape=shape, model_context=context_length(model_dir), job=job)

    async def get(self, id: str) -> Deployment:  # noqa: A002 - the contract's name
        """A deployment, deleted ones included. Idempotent. Raises `UserError` naming those that there are."""
        return self._view(self._record(id))

    async def list(self) -> tuple[Deployment, ...]:
        """All deployments that are not deleted, by id. Idempotent."""
        views = [self._view(record) for record in self._records.list(DEPLOYMENTS).values()]
        return tuple(view for view in views if view.state != "DELETED")

    async def wait(self, id: str, timeout_s: float) -> Deployment:  # noqa: A002
        """The deployment when it is not CREATING any more. Idempotent. Raises `DeadlineError`."""
        entry = self._entries.get(id)
        if entry is not None:
            what = f"deployment {id} is still being created; look at its replicas and their logs"
            async with deadline(timeout_s, what):
                await entry.life.changed.until(lambda _: entry.life.deployment.state != "CREATING")
        return await self.get(id)

    async def update(self, id: str, fields: Mapping[str, Any]) -> Deployment:  # noqa: A002
        """Change min_replicas, max_replicas, hot_load_trainer_job or hot_load_transition_type. Idempotent.

        Both counts 0 is `scale_to_zero`. Another trainer job means that later hot loads are of its checkpoints; what
        is served stays until then.

        Raises:
            UserError: another field, or a bad value; nothing was changed.
        """
        life = self._entry(id).life
        if unknown := [name for name in fields if name not in _UPDATABLE]:
            raise UserError(f"{unknown[0]!r} of deployment {id} cannot be changed; these can: {', '.join(_UPDATABLE)}")
        to_zero = fields.get("max_replicas") == 0
        if to_zero and fields.get("min_replicas", life.config.min_replicas) != 0:
            raise UserError(f"max_replicas 0 of deployment {id} needs min_replicas 0")
        given = {name: value for name, value in fields.items() if not (to_zero and name == "max_replicas")}
        config = replace(life.config, **given)
        _check(config)
        life.configure(config)
        if to_zero:
            life.set_desired(0)
        await self._save(life)
        return life.view()

    async def scale_to_zero(self, id: str) -> Deployment:  # noqa: A002
        """Stop all replicas when what they run has finished; the next request or hot load starts one again."""
        return await self.update(id, {"min_replicas": 0, "max_replicas": 0})

    async def delete(self, id: str) -> None:  # noqa: A002
        """End a deployment, its requests and replicas, and delete its files. Idempotent. Raises `UserError`."""
        async with self._changing:
            record = self._record(id)
            deleted = replace(self._view(record), state="DELETED", message="deleted", replicas=(),
                              updated_s=self._now_s())  # fmt: skip
            await self._records.put(DEPLOYMENTS, id, DeploymentRecord(deleted, desired=0))
            await self._end(id, "was deleted")

    # --- hot load -----------------------------------------------------------------------------------------

    async def hot_load(
        self,
        id: str,  # noqa: A002
        identity: str,
        *,
        previous: str | None = None,
        reset_prompt_cache: bool = True,
    ) -> Deployment:
        """Begin to serve a checkpoint of the deployment's trainer job; returns at once. Idempotent while it goes on.

        A hot load under way is given up for the new one. Prompt caches are always reset: their keys are of other
        weights.

        Args:
            previous: what the client thinks is served; checked and logged only, for chains come from what was saved.

        Raises:
            UserError: no trainer job, no such checkpoint, or it cannot be served.
        """
        entry = self._entry(id)
        life = entry.life
        if life.config.hot_load_trainer_job is None:
            raise UserError(f"deployment {id} has no trainer job: update its hot_load_trainer_job first")
        job_id = references.job_id(life.config.hot_load_trainer_job)
        checkpoint = await self._source.checkpoint(job_id, identity)
        if checkpoint.parent is not None or previous is not None:
            odd = check_previous(previous, life.identity() or BASE, await self._source.names(checkpoint))
            if odd:
                _log.info("deployment %s, hot load of %s: %s", id, identity, odd)
        if not reset_prompt_cache:
            _log.info("deployment %s: prompt caches are reset with every hot load", id)
        ref = SnapshotRef(job_id, identity)
        if life.wanted != ref:
            self._begin(entry, ref)
            await self._save(life)
        return life.view()

    async def wait_for_snapshot(self, id: str, identity: str, timeout_s: float) -> Deployment:  # noqa: A002
        """The deployment when every ready replica serves `identity` (adapters: has it loaded). Idempotent.

        Raises:
            RlorchError: the hot load failed: replica and cause.
            UserError: another snapshot was loaded instead, or nobody asked for this one.
            DeadlineError: it takes longer.
        """
        life = self._entry(id).life
        what = f"deployment {id}: the hot load of {identity} goes on; look at its replicas"
        async with deadline(timeout_s, what):
            await life.changed.until(lambda _: not _loading(life, identity))
        transition = life.transition.value
        if transition is not None and _serves(transition.good, identity):
            return life.view()
        if transition is not None and transition.failure and transition.failure.identity == identity:
            raise RlorchError(f"deployment {id}: hot load of {identity} failed: {transition.failure.reason}")
        if life.deployment.state == "FAILED":
            raise RlorchError(f"deployment {id} failed: {life.deployment.message}")
        raise UserError(f"deployment {id} serves {_served(life)} and does not load {identity!r}: hot-load it first")

    # --- requests -----------------------------------------------------------------------------------------

    async def sample(
        self,
        id: str,  # noqa: A002
        prompt_T: Tokens,
        params: SamplingParams,
        request_id: str,
        *,
        identity: str | None = None,
        session: str | None = None,
    ) -> Sampled:
        """`params.n` completions of one prompt. A deployment at zero wakes; the request waits for it.

        Args:
            request_id: unique among the deployment's requests alive.
            identity: the checkpoint to sample; one that is being loaded is waited for. None: the newest served.
            session: requests of one session go to the replica that holds their prefix.

        Raises:
            UserError: no such deployment, it failed, or `identity` is not served: the message names what is.
            AbortedError, DeadlineError, ReplicaLostError: it was aborted, took too long, lost two replicas.
        """
        life = self._entry(id).life
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        async with life.requests.alive(request_id):
            num_concurrent = len(life.requests)
            while True:
                adapter = await self._choose(life, params.adapter if identity is None else identity)
                chosen = replace(params, adapter=None if adapter is None else adapter.name)
                try:
                    completions, made = await life.requests.sample(prompt_T, chosen, request_id, session)
                    break
                except UserError:
                    if adapter is None or _holds(life, adapter):
                        raise
                    # The hot load that took the adapter away ended while the request waited for a replica.
        return Sampled(
            completions=completions,
            identities=made.identities,
            digests=made.digests,
            replica=made.replica,
            queue_s=made.began - arrived + max(completion.queue_s for completion in completions),
            latency_s=loop.time() - arrived,
            num_concurrent_requests=num_concurrent,
            adapter=None if adapter is None else adapter.identity,
        )

    async def score(self, id: str, tokens_T: Tokens) -> Floats:  # noqa: A002
        """Log-probabilities of tokens 1..T-1 under the served weights, without an adapter: T - 1 values. Idempotent.

        Raises:
            DeadlineError: no replica in time. ReplicaLostError: two were lost.
        """
        life = self._entry(id).life
        async with life.requests.alive(f"score-{uuid4().hex}"):
            try:
                return await (await self._least_busy(life)).sampler.score(tokens_T)
            except ReplicaLostError:
                return await (await self._least_busy(life)).sampler.score(tokens_T)

    async def abort(self, id: str, request_id: str) -> None:  # noqa: A002
        """End a request with `AbortedError`; unknown requests are ignored. Idempotent."""
        self._entry(id).life.requests.abort(request_id)

    # --- inside -------------------------------------------------------------------------------------------

    def _open(self, record: DeploymentRecord) -> None:
        """Begin a deployment's life from its record."""
        config = record.deployment.config
        files = DeploymentFiles(self._layout.deployment(config.id))
        model_dir = record.deployment.model_dir

        async def prepare() -> Target:
            async with entry.filing:
                if record.snapshot is None:
                    snapshot = await self._source.base(model_dir, files)
                else:
                    snapshot = await files.snapshot(record.snapshot)
            default = next((adapter for adapter in record.adapters if adapter.name == record.default), None)
            return Target(snapshot, record.adapters, default)

        async def save() -> None:
            await self._save(life)

        async def settled() -> None:
            async with entry.filing:
                transition = life.transition.value
                adapters = () if transition is None else (*transition.good.adapters, *transition.target.adapters)
                await files.keep(life.in_use(), adapters)

        life = DeploymentLife(
            record.deployment,
            self._settings.runtime(config, model_dir, str(files.root)),
            self._cluster,
            self._settings,
            desired=record.desired,
            prepare=prepare,
            save=save,
            on_settled=settled,
        )
        entry = _Entry(life, files, self._tasks.spawn(f"deployment {config.id}", life.run()))
        self._entries[config.id] = entry

    def _begin(self, entry: _Entry, ref: SnapshotRef) -> None:
        entry.life.wanted = ref
        entry.life.note()
        self._tasks.spawn(f"hot load {entry.life.id} {ref.identity}", self._move(entry, ref))

    async def _move(self, entry: _Entry, ref: SnapshotRef) -> None:
        """Put the files in place, then let the replicas move."""
        life = entry.life
        life.touch()
        transition = await life.transition.until(lambda transition: transition is not None)
        assert transition is not None, "waited for"
        try:
            async with entry.filing:
                checkpoint = await self._source.checkpoint(ref.job_id, ref.identity)
                model_dir, max_loras = life.deployment.model_dir, life.config.max_loras or 0
                target = await self._source.target(checkpoint, transition.good, model_dir, entry.files, max_loras)
                if life.wanted == ref:
                    life.move_to(target)
        except RlorchError as error:
            await life.refuse(ref, str(error))
        except Exception as bug:
            await life.refuse(ref, f"a bug: {bug!r}")
            raise

    async def _end(self, deployment_id: str, why: str) -> None:
        entry = self._entries.pop(deployment_id, None)
        if entry is None:
            await DeploymentFiles(self._layout.deployment(deployment_id)).delete()
            return
        entry.life.end(UserError(f"deployment {deployment_id} {why}"))
        try:
            async with deadline(END_TIMEOUT_S, f"deployment {deployment_id} does not end; look at its replicas"):
                await asyncio.wait([entry.task])
        except DeadlineError as error:
            _log.warning("%s", error)
            entry.task.cancel()
        await entry.files.delete()

    async def _clean(self, deployment: Deployment) -> None:
        """End what is left of a deployment that had ended when the service died: its files tell that there is."""
        files = DeploymentFiles(self._layout.deployment(deployment.config.id))
        if not files.root.exists():
            return
        try:
            async with deadline(END_TIMEOUT_S, f"replicas of deployment {deployment.config.id} do not end"):
                for index in range(deployment.config.max_replicas):
                    await self._cluster.stop_sampler(f"{deployment.config.id}.{index}")
            await files.delete()
        except RlorchError as error:
            _log.warning("deployment %s is not cleaned up: %s", deployment.config.id, error)

    async def _save(self, life: DeploymentLife) -> None:
        """Write what the deployment is found again by."""
        if self._entries.get(life.id) is None or self._entries[life.id].life is not life:
            return  # it was deleted or replaced meanwhile, and the record is another's
        transition = life.transition.value
        known = self._records.get(DEPLOYMENTS, life.id)
        life.deployment = replace(life.deployment, updated_s=self._now_s())
        record = DeploymentRecord(life.deployment, life.desired, moving=life.wanted)
        if transition is None and known is not None:
            record = replace(record, snapshot=known.snapshot, adapters=known.adapters, default=known.default)
        elif transition is not None:
            good = transition.good
            record = replace(
                record,
                snapshot=None if good.snapshot.job_id is None else snapshot_key(good.snapshot),
                adapters=good.adapters,
                default=None if good.default is None else good.default.name,
            )
        await self._records.put(DEPLOYMENTS, life.id, record)

    async def _choose(self, life: DeploymentLife, identity: str | None) -> Adapter | None:
        """The adapter to sample with; None is the weights themselves. Raises `UserError`: it is not served."""
        await life.changed.until(lambda _: life.transition.value is not None and not _loading(life, identity))
        transition = life.transition.value
        assert transition is not None, "waited for"
        if identity is None:
            adapter = transition.good.default
        elif (adapter := transition.good.adapter(identity)) is None and identity != transition.good.snapshot.identity:
            raise UserError(f"deployment {life.id} serves {_served(life)}, not {identity!r}: hot-load it first")
        if adapter is not None:
            life.used(adapter)
        return adapter

    async def _least_busy(self, life: DeploymentLife) -> ServingReplica:
        what = f"deployment {life.id} has no replica that serves; look at their logs"
        async with deadline(self._settings.wake_timeout_s, what):
            await life.changed.until(lambda _: bool(life.ready()))
        return min(life.ready(), key=lambda replica: (replica.sampler.running, replica.name))

    def _record(self, deployment_id: str) -> DeploymentRecord:
        record = self._records.get(DEPLOYMENTS, deployment_id)
        if record is None:
            known = ", ".join(self._records.list(DEPLOYMENTS)) or "none"
            raise UserError(f"there is no deployment {deployment_id[:200]!r}; there are: {known}")
        return record

    def _view(self, record: DeploymentRecord) -> Deployment:
        entry = self._entries.get(record.deployment.config.id)
        return record.deployment if entry is None else entry.life.view()

    def _entry(self, deployment_id: str) -> _Entry:
        record = self._record(deployment_id)
        view = self._view(record)
        entry = self._entries.get(deployment_id)
        if entry is None or view.state in ("FAILED", "DELETED"):
            raise UserError(f"deployment {deployment_id} is {view.state} ({view.message}): create it again")
        return entry

    def _in_use(self) -> Iterable[tuple[str, str]]:
        """(job, checkpoint) of everything that is served or about to be."""
        for entry in self._entries.values():
            if entry.life.wanted is not None:
                yield entry.life.wanted.job_id, entry.life.wanted.identity
            for snapshot in entry.life.in_use():
                if snapshot.job_id is not None:
                    yield snapshot.job_id, snapshot.identity
            if (transition := entry.life.transition.value) is not None:
                yield from ((adapter.job_id, adapter.identity) for adapter in transition.target.adapters)


def _check(config: DeploymentConfig) -> None:
    references.check_id("the id of a deployment", config.id)
    if not 0 <= config.min_replicas <= config.max_replicas or config.max_replicas < 1:
        raise UserError(
            f"deployment {config.id}: min_replicas {config.min_replicas} and max_replicas {config.max_replicas} must "
            "be 0 <= min <= max, and max at least 1"
        )
    if config.hot_load_transition_type not in get_args(TransitionType):
        raise UserError(f"hot_load_transition_type {config.hot_load_transition_type!r} must be ASYNC or SYNC")
    if config.hot_load_trainer_job is not None:
        references.job_id(config.hot_load_trainer_job)
    if (config.max_loras or 0) < 0 or config.max_num_seqs < 1:
        raise UserError(f"deployment {config.id}: max_loras must be at least 0 and max_num_seqs at least 1")


def _serves(target: Target, identity: str) -> bool:
    return target.adapter(identity) is not None or identity == target.snapshot.identity


def _holds(life: DeploymentLife, adapter: Adapter) -> bool:
    transition = life.transition.value
    return transition is None or adapter in transition.good.adapters


def _loading(life: DeploymentLife, identity: str | None) -> bool:
    if identity is None or life.wanted is None or life.deployment.state in ("FAILED", "DELETED"):
        return False
    return life.wanted.identity == identity


def _served(life: DeploymentLife) -> str:
    transition = life.transition.value
    if transition is None:
        return "nothing yet"
    adapters = [adapter.identity for adapter in transition.good.adapters]
    weights = transition.good.snapshot.identity or "the base model"
    return f"{weights} with the adapters {', '.join(adapters)}" if adapters else weights
