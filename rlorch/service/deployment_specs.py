"""What a deployment's config leaves open, filled in: from its shape, its trainer job and its model. Pure."""

from dataclasses import replace

from rlorch.errors import ConfigError
from rlorch.service.types import DeploymentConfig, JobConfig
from rlorch.shapes import DeploymentShape

DEFAULT_MODEL_LEN = 4096
"""Tokens of prompt and completion where neither user nor shape says; a model made for fewer gets its own."""
DEFAULT_MAX_LORAS = 4
"""Adapters in one batch of a deployment whose trainer job trains adapters, or that has no trainer job yet."""


def resolve(
    config: DeploymentConfig, *, shape: DeploymentShape | None, model_context: int | None, job: JobConfig | None
) -> DeploymentConfig:
    """`config` with `max_model_len`, `tensor_parallel`, `gpu_memory_fraction` and `max_loras` set.

    Args:
        config: what the user asked for.
        shape: the deployment shape that it names.
        model_context: positions that the model was made for; None: unknown.
        job: its trainer job, when it names one.

    Raises:
        ConfigError: a field that the shape owns is set to something else, or a length that the model has not.
    """
    owned = {} if shape is None else {"tensor_parallel": shape.tensor_parallel, "max_model_len": shape.max_model_len}
    for field, value in owned.items():
        given = getattr(config, field)
        if given not in (None, value):
            raise ConfigError(
                f"deployment {config.id}: {field} = {given}, but the shape {config.deployment_shape} owns it "
                f"({value}): leave it out, or leave the shape out"
            )
    length = config.max_model_len or owned.get("max_model_len") or DEFAULT_MODEL_LEN
    if model_context is not None and length > model_context:
        if config.max_model_len is not None and shape is None:
            raise ConfigError(
                f"deployment {config.id}: max_model_len = {config.max_model_len}, but the model ends at {model_context}"
            )
        length = model_context
    trains_all_weights = job is not None and job.max_lora_rank == 0
    return replace(
        config,
        max_model_len=length,
        tensor_parallel=config.tensor_parallel or owned.get("tensor_parallel") or 1,
        gpu_memory_fraction=config.gpu_memory_fraction or (shape.gpu_memory_fraction if shape else None),
        max_loras=config.max_loras if config.max_loras is not None else 0 if trains_all_weights else DEFAULT_MAX_LORAS,
        max_lora_rank=max(config.max_lora_rank, job.max_lora_rank if job else 0),
    )
