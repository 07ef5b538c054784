"""From a step of the trainer to the weights that a deployment serves: save a snapshot, hot-load it, warm up.

The bookkeeping of Fireworks' `WeightSyncer`. The kind of a snapshot is decided when it is saved (base first, delta
after it); what it is loaded on top of is the snapshot that was last loaded *successfully*. The two part when a load
fails. That is harmless here: the service records what each delta was made against and walks back to what a replica
holds, so a snapshot after a failed load brings the missed ones with it.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from rlorch.errors import DeadlineError, RlorchError, UserError
from rlorch.sdk.deployments import DeploymentManager
from rlorch.sdk.training_client import TrainingClient

REPLICA_TIMEOUT_S = 300.0
WARMUP_INTERVAL_S = 10.0

log = logging.getLogger(__name__)


@dataclass
class WeightSyncer:
    """Saves and hot-loads snapshots of one model on one deployment.

    Args:
        policy_client: the model in training.
        deploy_mgr, deployment_id: where snapshots go; without them they are only saved.
        base_model: as the deployment has it.
        hotload_timeout: seconds for one hot load.
        first_checkpoint_type: kind of the first snapshot of all weights.
        compression_format: the name of the delta format, as hosted services have it; only passed on.
        warmup_after_hotload, warmup_max_retries: sample four tokens after each load, at most so many times.
        reset_prompt_cache: drop cached prefixes, which older weights computed.
        lora_rank: rank of the adapter; its snapshots are always whole. 0: as `policy_client` has it.

    Attributes:
        base_saved: a snapshot was saved, so the next is a delta.
        base_identity: the snapshot that was last loaded, on top of which the next is.
        last_timing: seconds of the last save, hot load and warm-up.
    """

    policy_client: TrainingClient
    deploy_mgr: DeploymentManager | None = None
    deployment_id: str | None = None
    base_model: str = ""
    hotload_timeout: float = 600
    first_checkpoint_type: str = "base"
    compression_format: str = "arc_v2"
    warmup_after_hotload: bool = True
    warmup_max_retries: int = 10
    reset_prompt_cache: bool = True
    lora_rank: int = 0
    base_saved: bool = field(default=False, init=False)
    base_identity: str | None = field(default=None, init=False)
    last_timing: dict[str, float] = field(default_factory=dict[str, float], init=False)
    _checked: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.lora_rank = self.lora_rank or getattr(self.policy_client, "lora_rank", 0)

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str:
        """Save a snapshot and load it; returns its name.

        Raises:
            RlorchError: the save or the load failed. What was served before is served on.
        """
        kind = self._kind(checkpoint_type)
        snapshot = self._save(name, kind)
        self._do_hotload(snapshot, kind)
        return snapshot

    def save_only(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Save a snapshot; None, and a logged error, where that failed."""
        try:
            return self._save(name, self._kind(checkpoint_type))
        except RlorchError as error:
            log.warning("snapshot %s was not saved: %s", name, error)
            return None

    def hotload(self, snapshot_name: str, checkpoint_type: str = "base") -> bool:
        """Load a saved snapshot; False, and a logged error, where that failed."""
        try:
            self._do_hotload(snapshot_name, checkpoint_type)
        except RlorchError as error:
            log.warning("snapshot %s was not loaded: %s", snapshot_name, error)
            return False
        return True

    def reset_delta_chain(self) -> None:
        """Begin again with a base snapshot, as after `DeploymentManager.reattach_trainer`."""
        self.base_saved = False
        self.base_identity = None

    def check_deployment_state(self) -> str | None:
        """The snapshot that the deployment serves; None for the base model. A snapshot that this syncer did not load
        is not built upon."""
        deploy_mgr, deployment_id = self._deployment()
        replicas = deploy_mgr.hotload_check_status(deployment_id, self.base_model)["replicas"]
        current = replicas[0]["current_snapshot_identity"] if replicas else None
        if current and current != self.base_identity:
            log.info("deployment %s serves %s, which was loaded by somebody else", deployment_id, current)
            self.base_identity = None
        return current

    def wait_for_hotload_ready(self, timeout_s: float = REPLICA_TIMEOUT_S, poll_interval_s: float = 5.0) -> None:
        """Wait until the deployment has a replica, waking it if need be. Raises `DeadlineError`."""
        deploy_mgr, deployment_id = self._deployment()
        give_up_s = time.monotonic() + timeout_s
        while not deploy_mgr.hotload_check_status(deployment_id, self.base_model)["replicas"]:
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineError(
                    f"deployment {deployment_id} has no replica after {timeout_s:g} s; is it scaled up?"
                )
            if not deploy_mgr.warmup(deployment_id, max_retries=1):
                time.sleep(min(poll_interval_s, left_s))

    def get_deployment_sampler(self, tokenizer: Any, **options: Any) -> Any:
        """A `DeploymentSampler` of the deployment; `options` are its."""
        from rlorch.sdk.sampler import DeploymentSampler

        deploy_mgr, deployment_id = self._deployment()
        return DeploymentSampler(deploy_mgr, deployment_id, tokenizer=tokenizer, **options)

    def get_sampling_client(self, tokenizer: Any, **options: Any) -> Any:
        """A tinker-shaped `SamplingClient` of the deployment."""
        from rlorch.sdk.sampling_client import SamplingClient

        return SamplingClient(self.get_deployment_sampler(tokenizer, **options), self.base_model)

    # --- inside -------------------------------------------------------------------------------------------

    def _kind(self, checkpoint_type: str | None) -> str:
        if checkpoint_type is not None:
            return checkpoint_type
        if self.lora_rank > 0:
            return "base"
        return "delta" if self.base_saved else self.first_checkpoint_type

    def _save(self, name: str, kind: str) -> str:
        started_s = time.monotonic()
        saved = self.policy_client.save_weights_for_sampler_ext(name, kind)
        self.base_saved = True
        self.last_timing = {"save_s": time.monotonic() - started_s}
        return saved.snapshot_name

    def _do_hotload(self, snapshot: str, kind: str) -> None:
        if self.deploy_mgr is None or self.deployment_id is None:
            return
        started_s = time.monotonic()
        if not self._checked:
            self.wait_for_hotload_ready()
            self.check_deployment_state()
            self._checked = True
        loaded = self.deploy_mgr.hotload_and_wait(
            self.deployment_id,
            self.base_model,
            snapshot,
            self._incremental(kind),
            self.reset_prompt_cache,
            self.hotload_timeout,
        )
        self.last_timing["hotload_s"] = time.monotonic() - started_s
        if not loaded:
            raise RlorchError(
                f"snapshot {snapshot} was not loaded on deployment {self.deployment_id}: "
                f"{self.deploy_mgr.last_hotload_error_message}; what it served before, it serves on"
            )
        self.base_identity = snapshot
        self._warm_up()

    def _incremental(self, kind: str) -> dict[str, str] | None:
        if kind != "delta" or self.lora_rank > 0 or self.base_identity is None:
            return None
        return {
            "previous_snapshot_identity": self.base_identity,
            "compression_format": self.compression_format,
            "checksum_format": "alder32",  # spelled so by the API
        }

    def _warm_up(self) -> None:
        if not self.warmup_after_hotload:
            return
        deploy_mgr, deployment_id = self._deployment()
        started_s = time.monotonic()
        if not deploy_mgr.warmup(deployment_id, self.warmup_max_retries, WARMUP_INTERVAL_S):
            log.warning("deployment %s does not answer after the hot load of %s", deployment_id, self.base_identity)
        self.last_timing["warmup_s"] = time.monotonic() - started_s

    def _deployment(self) -> tuple[DeploymentManager, str]:
        if self.deploy_mgr is None or self.deployment_id is None:
            raise UserError("this WeightSyncer has no deployment: pass deploy_mgr and deployment_id")
        return self.deploy_mgr, self.deployment_id
