"""What a user may set beside a shape, and what the shape owns."""

from collections.abc import Mapping
from typing import Any

from rlorch.errors import ConfigError
from rlorch.shapes.names import parse_ref
from rlorch.shapes.shape import TrainingShape

USER_FIELDS = (
    "base_model",
    "lora_rank",
    "learning_rate",
    "gradient_accumulation_steps",
    "display_name",
    "trainer_replica_count",
    "min_replica_count",
    "max_replica_count",
    "hot_load_trainer_job",
)
"""Fields of a trainer job or deployment that stay the user's."""

SHAPE_OWNED_FIELDS: Mapping[str, str] = {
    "accelerator_type": "accelerator_type",
    "accelerator_count": "accelerator_count",
    "node_count": "node_count",
    "max_context_length": "max_supported_context_length",
    "max_supported_context_length": "max_supported_context_length",
    "custom_image_tag": "trainer_image_tag",
    "trainer_image_tag": "trainer_image_tag",
    "base_model_weight_precision": "base_model_weight_precision",
    "trainer_mode": "trainer_mode",
    "layout": "layout",
    "gpu_fraction": "gpu_fraction",
    "cpus_per_rank": "cpus_per_rank",
    "deployment_shape_version": "deployment",
    "deployment_image_tag": "deployment",
}
"""Fields that may not be given beside a shape, and the shape's own field that decides."""


def check_overrides(shape: TrainingShape, given: Mapping[str, Any]) -> None:
    """Refuse what `shape` owns among the fields that a user has set; None means not set.

    Fields that no shape knows are not looked at. `deployment_shape` may name the linked shape, and nothing else;
    `lora_rank` and `forward_only` must agree with the kind of the shape (a rank that is not given is not looked at).

    Raises:
        ConfigError: every such field at once, each with what to do.
    """
    problems = [
        f"{name} = {value!r}: the shape sets it to {_own(shape, SHAPE_OWNED_FIELDS[name])}; leave it out, or choose a "
        "shape that has what you need"
        for name, value in given.items()
        if name in SHAPE_OWNED_FIELDS and value is not None
    ]
    problems += _deployment(shape, given.get("deployment_shape"))
    problems += _kind(shape, given.get("lora_rank"), bool(given.get("forward_only")))
    if problems:
        raise ConfigError(f"training shape {shape.name} owns its infrastructure:\n  " + "\n  ".join(problems))


def _own(shape: TrainingShape, name: str) -> str:
    if name != "deployment":
        return repr(getattr(shape, name))
    return shape.deployment.full_name() if shape.deployment else "none"


def _deployment(shape: TrainingShape, ref: str | None) -> list[str]:
    if ref is None:
        return []
    linked = shape.deployment
    if linked is None:
        return [f"deployment_shape = {ref!r}: a {shape.kind} shape serves nothing; leave it out"]
    named = parse_ref(ref, "deploymentShapes")
    if named.name == linked.name and named.version in (None, linked.version):
        return []
    return [f"deployment_shape = {ref!r}: the linked one is {linked.full_name(named.account)}; leave it out"]


def _kind(shape: TrainingShape, lora_rank: int | None, forward_only: bool) -> list[str]:
    problems: list[str] = []
    if lora_rank is not None and lora_rank < 0:
        problems.append(f"lora_rank = {lora_rank}: must be 0 (all weights) or the rank of an adapter")
    elif lora_rank and not shape.supports_lora:
        problems.append(f"lora_rank = {lora_rank}: {_instead(shape, 'LORA_TRAINER', 'trains no adapter; set 0')}")
    elif lora_rank == 0 and shape.supports_lora:
        problems.append(f"lora_rank = 0: {_instead(shape, 'POLICY_TRAINER', 'trains an adapter; set its rank')}")
    if forward_only and shape.trainer_mode != "FORWARD_ONLY":
        problems.append(f"forward_only = True: {_instead(shape, 'FORWARD_ONLY', 'trains; leave it out')}")
    return problems


def _instead(shape: TrainingShape, mode: Any, does: str) -> str:
    """`a policy shape trains no adapter; set 0, or use qwen3p5-9b-256k-lora`."""
    other = shape.siblings.get(mode)
    there = f", or use {other}" if other else f"; there is no such shape for {shape.family}"
    return f"a {shape.kind} shape {does}{there}"
