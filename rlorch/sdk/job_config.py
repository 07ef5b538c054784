"""What a trainer job is created from, and what is given back for it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rlorch.errors import ConfigError
from rlorch.sdk.connection import absolute_model
from rlorch.service.types import JobConfig

MAX_INACTIVITY_S = 3 * 3600.0


@dataclass
class TrainerJobConfig:
    """What a trainer job is created from.

    The fields down to `forward_only`, `inactivity_timeout` and `requested_job_id` have an effect; the others are taken
    because programs pass them. `lora_rank` 0 trains all weights. With a `training_shape_ref` the shape owns
    accelerators, nodes and context; without, give `accelerator_count` and `node_count`, or auto-select a shape.
    `learning_rate` is only a note: `optim_step` has the real one. `gradient_accumulation_steps` says how many
    forward_backward calls the loop makes before an `optim_step`. `create` writes the id that it chose into
    `requested_job_id`, so that a second `create` of the same config finds the job.
    """

    base_model: str
    lora_rank: int = 0
    max_context_length: int | None = None
    learning_rate: float = 1e-5
    gradient_accumulation_steps: int | None = None
    training_shape_ref: str | None = None
    auto_select_training_shape: bool = False
    node_count: int | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    display_name: str | None = None
    hot_load_deployment_id: str | None = None
    forward_only: bool = False
    inactivity_timeout: timedelta | str | None = None
    requested_job_id: str | None = None
    projection_head_dim: int | None = None
    trainer_replica_count: int | None = None
    region: str | None = None
    custom_image_tag: str | None = None
    extra_args: list[str] | None = None
    extra_values: dict[str, Any] | None = None
    disable_inactivity_cleanup: bool = False
    skip_validations: bool = False
    use_reservation: bool = True
    reservation_target: str | None = None
    preemptible: bool = False
    purpose: str | None = None
    managed_by: str | None = None

    def validate(self) -> None:
        """Check what can be checked here. Raises `ConfigError`."""
        steps = self.gradient_accumulation_steps
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank is {self.lora_rank}; 0 trains all weights, 1 or more an adapter")
        if steps is not None and steps < 1:
            raise ConfigError(f"gradient_accumulation_steps is {steps}; it counts batches per step, so 1 or more")
        if self.display_name is not None and len(self.display_name) >= 64:
            raise ConfigError(f"display_name has {len(self.display_name)} characters; keep it below 64")
        if self.projection_head_dim:
            raise ConfigError("projection_head_dim: projection heads are not supported; leave it out")
        if self.training_shape_ref and self.auto_select_training_shape:
            raise ConfigError("training_shape_ref and auto_select_training_shape exclude each other; keep one")
        owned = ("accelerator_type", "accelerator_count", "node_count")
        given = [name for name in owned if getattr(self, name) is not None]
        if given and (self.training_shape_ref or self.auto_select_training_shape):
            raise ConfigError(f"{', '.join(given)}: a training shape owns its hardware; leave it out, or name no shape")

    def to_service(self) -> JobConfig:
        """The service's form of it. Raises `ConfigError`."""
        self.validate()
        return JobConfig(
            base_model=absolute_model(self.base_model),
            training_shape=self.training_shape_ref,
            auto_select_training_shape=self.auto_select_training_shape,
            max_lora_rank=self.lora_rank,
            max_context_length=self.max_context_length,
            learning_rate=self.learning_rate,
            gradient_accumulation_steps=self.gradient_accumulation_steps or 1,
            accelerator_type=self.accelerator_type,
            accelerator_count=self.accelerator_count,
            node_count=self.node_count,
            display_name=self.display_name or "",
            forward_only=self.forward_only,
            inactivity_timeout_s=_seconds(self.inactivity_timeout),
            hot_load_deployment_id=self.hot_load_deployment_id,
        )


@dataclass(frozen=True, slots=True)
class CreatedTrainerJob:
    """A job that was asked for; it may not run yet."""

    job_name: str
    job_id: str


@dataclass(frozen=True, slots=True)
class TrainerServiceEndpoint:
    """A trainer that is ready: `ServiceClient(endpoint)`, or `ServiceClient(base_url=endpoint.base_url)`."""

    job_name: str
    job_id: str
    base_url: str
    max_context_length: int | None = None


def _seconds(timeout: timedelta | str | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, timedelta):
        seconds = timeout.total_seconds()
    else:
        try:
            seconds = float(timeout.removesuffix("s"))
        except ValueError as error:
            raise ConfigError(f"inactivity_timeout is {timeout!r}; write a timedelta, or seconds as '1800s'") from error
    if not 0 < seconds <= MAX_INACTIVITY_S:
        raise ConfigError(f"inactivity_timeout is {seconds:g} s; it must be over 0 and at most {MAX_INACTIVITY_S:g} s")
    return seconds
