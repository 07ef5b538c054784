"""The config-file end of the ladder: one client that provisions its trainer, its reference and its deployment.

    with ServiceClient.from_firetitan_config(base_model="./model", training_shape_id="qwen3-tiny-cpu") as client:
        policy = client.create_training_client()                       # the trainer and the deployment start here
        path = policy.save_weights_for_sampler("step-1").result().path
        sampler = client.create_deployment_sampler(path, tokenizer=tokenizer)

Nothing is started before it is needed, everything that is needed starts at once, and `close` ends only what was created
here and only where the config says so.
"""

import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from rlorch.errors import ConfigError, RlorchError, UserError
from rlorch.sdk.connection import connect
from rlorch.sdk.deployments import DeploymentConfig, DeploymentInfo, DeploymentManager
from rlorch.sdk.job_config import TrainerJobConfig, TrainerServiceEndpoint
from rlorch.sdk.jobs import TrainerJobManager
from rlorch.sdk.sampler import DeploymentSampler
from rlorch.sdk.service_client import ServiceClient
from rlorch.sdk.training_client import TrainingClient
from rlorch.shapes import TrainingShapeProfile


@dataclass(frozen=True)
class FiretitanProvisioningConfig:
    """What a managed client starts. Seconds where a name ends in `_s`.

    `trainer_job_id` and `deployment_id` name what exists already or is to be called so. `max_lora_rank` gives the
    trainer room for adapters up to it; else `lora_rank` is all it has. `reference_required` starts a reference: the
    base of an adapter's own trainer, or a forward-only trainer beside one that trains all weights.
    """

    base_model: str
    lora_rank: int = 0
    lora_alpha: float = 32
    max_lora_rank: int | None = None
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    training_shape_id: str | None = None
    reference_training_shape_id: str | None = None
    reference_trainer_job_id: str | None = None
    reference_required: bool = False
    trainer_job_id: str | None = None
    deployment_id: str | None = None
    deployment_shape: str | None = None
    create_deployment: bool = True
    max_context_length: int | None = None
    learning_rate: float = 1e-5
    replica_count: int = 1
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    max_model_len: int | None = None
    display_name: str | None = None
    trainer_timeout_s: float = 3600.0
    trainer_pending_timeout_s: float = 172800.0
    deployment_timeout_s: float = 5400.0
    hotload_timeout_s: float = 600.0
    cleanup_trainer_on_close: bool = False
    cleanup_reference_trainer_on_close: bool = True
    cleanup_deployment_on_close: Literal["delete", "scale_to_zero"] | None = None

    def __post_init__(self) -> None:
        if self.max_lora_rank is not None and self.lora_rank:
            raise ConfigError("lora_rank and max_lora_rank exclude each other: keep one")
        if self.replica_count < 0:
            raise ConfigError(f"replica_count is {self.replica_count}; 1 or more")

    @property
    def trainer_rank(self) -> int:
        """The largest adapter that the trainer has room for; 0 trains all weights."""
        return self.max_lora_rank or self.lora_rank


@dataclass(frozen=True, slots=True)
class _Provisioned:
    endpoint: TrainerServiceEndpoint
    reference: TrainerServiceEndpoint | None
    deployment: DeploymentInfo | None
    profile: TrainingShapeProfile | None
    created_trainer: bool
    created_reference: bool
    created_deployment: bool


class ManagedServiceClient:
    """A `ServiceClient` with a trainer and a deployment of its own; see the module.

    Args:
        config: what to start.
        api_key, base_url: see `rlorch.sdk.connection.connect`.
        user_metadata: kept with the session.
    """

    def __init__(
        self,
        config: FiretitanProvisioningConfig,
        api_key: str | None = None,
        base_url: str | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> None:
        connection = connect(base_url, api_key)
        self.config = config
        self.jobs = TrainerJobManager(connection=connection)
        self.deployments = DeploymentManager(connection=connection)
        self._user_metadata = user_metadata
        self._lock = threading.Lock()
        self._provisioned: _Provisioned | None = None
        self._service: ServiceClient | None = None
        self._reference_service: ServiceClient | None = None

    # --- what was started ---------------------------------------------------------------------------------

    @property
    def trainer_job_id(self) -> str:
        """The trainer's job."""
        return self._provision().endpoint.job_id

    @property
    def deployment_id(self) -> str | None:
        """The deployment; None where none was asked for."""
        deployment = self._provision().deployment
        return None if deployment is None else deployment.deployment_id

    @property
    def reference_job_id(self) -> str | None:
        """The job of a separate reference trainer."""
        reference = self._provision().reference
        return None if reference is None else reference.job_id

    @property
    def max_context_length(self) -> int | None:
        """Tokens of a row that the trainer takes."""
        return self._provision().endpoint.max_context_length

    @property
    def training_profile(self) -> TrainingShapeProfile | None:
        """The resolved shape; None where it is selected by the service."""
        return self._provision().profile

    # --- clients ------------------------------------------------------------------------------------------

    def create_training_client(self, base_model: str | None = None, lora_rank: int | None = None) -> TrainingClient:
        """The model in training, as the config says; see `ServiceClient.create_training_client`."""
        config = self.config
        rank = config.trainer_rank if lora_rank is None else lora_rank
        return self._policy().create_training_client(
            base_model or config.base_model,
            rank,
            config.seed,
            config.train_mlp,
            config.train_attn,
            config.train_unembed,
            config.lora_alpha,
        )

    def create_reference_client(self, base_model: str | None = None) -> TrainingClient:
        """The frozen initial model: the adapter's base, or the forward-only trainer. Raises `UserError`: the config
        asked for no reference beside a trainer of all weights."""
        base_model = base_model or self.config.base_model
        reference = self._provision().reference
        if reference is not None:
            self._reference_service = self._reference_service or ServiceClient(reference)
            return self._reference_service.create_base_training_client(base_model)
        if not self.config.trainer_rank:
            raise UserError("a trainer of all weights keeps no copy of its base: set reference_required=True")
        return self._policy().create_base_training_client(base_model)

    def create_deployment_sampler(self, model_path: str | None = None, **options: Any) -> DeploymentSampler:
        """A sampler of the deployment, after a hot load of `model_path` where it is given. `options` are its own."""
        if model_path is not None:
            self.hotload_sampler_snapshot(model_path)
        return DeploymentSampler(self.deployments, self._deployment().name, **options)

    def create_sampling_client(self, model_path: str | None = None, **options: Any) -> Any:
        """`create_deployment_sampler` in tinker's shape."""
        from rlorch.sdk.sampling_client import SamplingClient

        return SamplingClient(self.create_deployment_sampler(model_path, **options), self.config.base_model, model_path)

    def hotload_sampler_snapshot(self, path: str) -> None:
        """Serve a snapshot, by its name or resource name. Raises `RlorchError`: it was not loaded."""
        deployment = self._deployment()
        identity, timeout_s = path.rpartition("/")[2], self.config.hotload_timeout_s
        loaded = self.deployments.hotload_and_wait(
            deployment.deployment_id, deployment.base_model, identity, timeout_seconds=timeout_s
        )
        if not loaded:
            raise RlorchError(f"snapshot {identity} was not loaded: {self.deployments.last_hotload_error_message}")

    def requires_initial_sampler_sync(self) -> bool:
        """Whether the deployment serves a snapshot of somebody else, so that the first one must be a base."""
        found = self.deployments.get(self._deployment().deployment_id)
        return found is not None and not self._provision().created_deployment and found.snapshot_identity is not None

    # --- checkpoints and the end --------------------------------------------------------------------------

    def list_checkpoints(self, job_id: str | None = None) -> list[dict[str, Any]]:
        """See `TrainerJobManager.list_checkpoints`."""
        return self.jobs.list_checkpoints(job_id or self.trainer_job_id)

    def promote_checkpoint(self, name: str, output_model_id: str) -> dict[str, Any]:
        """See `TrainerJobManager.promote_checkpoint`."""
        return self.jobs.promote_checkpoint(name=name, output_model_id=output_model_id)

    def close(self) -> None:
        """End the session, and what was created here where the config says so. Idempotent."""
        with self._lock:
            done, self._provisioned = self._provisioned, None
        for service in (self._service, self._reference_service):
            if service is not None:
                service.close()
        if done is None:
            return
        config = self.config
        if done.deployment is not None and done.created_deployment and config.cleanup_deployment_on_close is not None:
            end = {"delete": self.deployments.delete, "scale_to_zero": self.deployments.scale_to_zero}
            end[config.cleanup_deployment_on_close](done.deployment.deployment_id)
        if done.reference is not None and done.created_reference and config.cleanup_reference_trainer_on_close:
            self.jobs.delete(done.reference.job_id)
        if done.created_trainer and config.cleanup_trainer_on_close:
            self.jobs.delete(done.endpoint.job_id)

    def __enter__(self) -> "ManagedServiceClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- provisioning -------------------------------------------------------------------------------------

    def _policy(self) -> ServiceClient:
        endpoint = self._provision().endpoint
        self._service = self._service or ServiceClient(endpoint, user_metadata=self._user_metadata)
        return self._service

    def _deployment(self) -> DeploymentInfo:
        deployment = self._provision().deployment
        if deployment is None:
            raise UserError("this client has no deployment: set create_deployment=True, or deployment_id")
        return deployment

    def _provision(self) -> _Provisioned:
        """Start everything, once; trainer, reference and deployment side by side."""
        with self._lock:
            if self._provisioned is None:
                self._provisioned = self._start()
            return self._provisioned

    def _start(self) -> _Provisioned:
        config = self.config
        profile = self.jobs.resolve_training_profile(config.training_shape_id) if config.training_shape_id else None
        existing = config.trainer_job_id is not None and self.jobs.try_get(config.trainer_job_id) is not None
        job_id = config.trainer_job_id if existing else self.jobs.create(self._trainer_config(profile)).job_id
        assert job_id is not None, "created or given"
        known = config.reference_trainer_job_id
        separate = known is not None or (config.reference_required and not config.trainer_rank)
        with ThreadPoolExecutor(max_workers=3) as pool:
            ready = pool.submit(self._wait_for_trainer, job_id, resume=existing)
            reference = pool.submit(self._start_reference, known) if separate else None
            deployment = pool.submit(self._start_deployment, job_id, profile)
            info, created_deployment = deployment.result()
            return _Provisioned(
                endpoint=ready.result(),
                reference=None if reference is None else reference.result(),
                deployment=info,
                profile=profile,
                created_trainer=not existing,
                created_reference=separate and known is None,
                created_deployment=created_deployment,
            )

    def _wait_for_trainer(self, job_id: str, *, resume: bool) -> TrainerServiceEndpoint:
        """`resume`: it was there before, and may have been paused or lost since."""
        timeout_s, pending_timeout_s = self.config.trainer_timeout_s, self.config.trainer_pending_timeout_s
        wait = self.jobs.reconnect_and_wait if resume else self.jobs.wait_for_ready
        return wait(job_id, timeout_s=timeout_s, pending_timeout_s=pending_timeout_s)

    def _trainer_config(self, profile: TrainingShapeProfile | None) -> TrainerJobConfig:
        config = self.config
        return TrainerJobConfig(
            config.base_model,
            lora_rank=config.trainer_rank,
            max_context_length=config.max_context_length,
            learning_rate=config.learning_rate,
            training_shape_ref=profile.training_shape_version if profile else None,
            auto_select_training_shape=profile is None,
            display_name=config.display_name,
            requested_job_id=config.trainer_job_id,
        )

    def _start_reference(self, job_id: str | None) -> TrainerServiceEndpoint:
        config = self.config
        if job_id is not None:
            return self.jobs.reconnect_and_wait(job_id, timeout_s=config.trainer_timeout_s)
        shape = config.reference_training_shape_id
        profile = self.jobs.resolve_training_profile(shape) if shape else None
        wanted = TrainerJobConfig(
            config.base_model,
            max_context_length=config.max_context_length,
            training_shape_ref=profile.training_shape_version if profile else None,
            auto_select_training_shape=profile is None,
            forward_only=True,
        )
        return self.jobs.create_and_wait(wanted, timeout_s=config.trainer_timeout_s)

    def _start_deployment(
        self, job_id: str, profile: TrainingShapeProfile | None
    ) -> tuple[DeploymentInfo | None, bool]:
        """The deployment, attached to the trainer, and whether it was created here."""
        config = self.config
        if not config.create_deployment and config.deployment_id is None:
            return None, False
        deployment_id = config.deployment_id or _deployment_name(config.base_model)
        found = self.deployments.get(deployment_id)
        if found is not None:
            info = self.deployments.reattach_trainer(
                found, base_model=config.base_model, trainer_job_name=job_id, timeout_s=config.deployment_timeout_s
            )
            return info, False
        replicas = max(config.replica_count, 1)
        wanted = DeploymentConfig(
            deployment_id,
            config.base_model,
            deployment_shape=config.deployment_shape or (profile.deployment_shape if profile else None),
            min_replica_count=replicas,
            max_replica_count=replicas,
            hot_load_trainer_job=job_id,
            engine=config.engine,
            max_model_len=config.max_model_len,
        )
        self.deployments.create_or_get(wanted)
        return self.deployments.wait_for_ready(deployment_id, config.deployment_timeout_s), True


def managed_client(
    given: Mapping[str, Any], api_key: str | None, base_url: str | None, user_metadata: Mapping[str, str] | None
) -> ManagedServiceClient:
    """`ServiceClient.from_firetitan_config`."""
    known = [field.name for field in fields(FiretitanProvisioningConfig)]
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"from_firetitan_config knows no field {name!r}; {hint}")
    if "base_model" not in given:
        raise ConfigError("from_firetitan_config needs base_model")
    return ManagedServiceClient(FiretitanProvisioningConfig(**given), api_key, base_url, user_metadata)


def _deployment_name(base_model: str) -> str:
    """A new DNS label that shows the model."""
    letters = "".join(letter if letter.isalnum() else "-" for letter in Path(base_model).name.lower()[:40])
    return f"{letters.strip('-')}-{secrets.token_hex(4)}".lstrip("-")
