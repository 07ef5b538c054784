"""Catalogue files to shapes: the only module here that reads files and the environment.

A file lists families. What a family says holds for each of its kinds, which may say otherwise:

    families:
      my-model-32k:
        base_model: my-model
        accelerator_type: NVIDIA_H100_80GB
        max_context_length: 32768
        deployment: {tensor_parallel: 1}
        policy: {accelerator_count: 4}                     # my-model-32k
        lora: {accelerator_count: 1}                       # my-model-32k-lora
        forward_only: {accelerator_count: 1}               # my-model-32k-forward-only

The deployment is shared by policy and LoRA. A name can be given once; a family with `replace: true` may take names
that an earlier file has given.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from rlorch.config.document import Document, read_document
from rlorch.config.explain import explain
from rlorch.errors import ConfigError
from rlorch.shapes.names import NAME
from rlorch.shapes.shape import (
    ACCELERATOR_TYPE,
    CPU,
    DEPLOYMENT_IMAGE_TAG,
    TRAINER_IMAGE_TAG,
    DeploymentShape,
    Layout,
    Precision,
    TrainerMode,
    TrainingShape,
)
from rlorch.specs import Spec

ENVIRONMENT_VARIABLE = "RLORCH_SHAPES"
BUILTIN = Path(__file__).with_name("builtin.yaml")

_KINDS: tuple[tuple[TrainerMode, str, str], ...] = (
    ("POLICY_TRAINER", "policy", ""),
    ("LORA_TRAINER", "lora", "-lora"),
    ("FORWARD_ONLY", "forward_only", "-forward-only"),
)


class DeploymentEntry(Spec):
    """The deployment of a family, as written in a file."""

    name: str | None = Field(default=None, description="default: the family's")
    accelerator_type: str | None = Field(default=None, description="default: the family's")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs of one replica")
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int | None = Field(default=None, ge=2, description="tokens; default: the family's context length")
    gpu_memory_fraction: float = Field(default=0.85, gt=0, lt=1, description="of a GPU's memory, for vLLM")
    gpu_fraction: float = Field(default=1.0, gt=0, le=1, description="of a GPU, reserved")
    image_tag: str = DEPLOYMENT_IMAGE_TAG


class KindEntry(Spec):
    """One kind of a family, as written in a file. `None` means: as the family says."""

    name: str | None = Field(default=None, description="default: the family's, with -lora or -forward-only")
    accelerator_type: str | None = None
    accelerator_count: int = Field(default=0, ge=0, description="GPUs per node; 0 on CPU")
    node_count: int = Field(default=1, ge=1)
    ranks: int | None = Field(default=None, ge=1, description="processes; default: one per GPU, or one on CPU")
    gpu_fraction: float = Field(default=1.0, gt=0, le=1, description="of each GPU, reserved")
    cpus_per_rank: float = Field(default=1.0, ge=0, description="cores")
    max_context_length: int | None = Field(default=None, ge=2, description="tokens of a row")
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    context_parallel: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _only_fsdp(self) -> "KindEntry":
        for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
            if (value := getattr(self, name)) != 1:
                raise ValueError(f"{name} = {value}: the trainer splits its work over ranks (FSDP2) only; must be 1")
        return self


class FamilyEntry(Spec):
    """Shapes of one model on one kind of hardware, as written in a file."""

    base_model: str | None = Field(default=None, description="the model it was laid out for; default: any")
    num_params_b: float | None = Field(default=None, gt=0, description="billions of parameters, to check memory")
    accelerator_type: str = Field(description="CPU, ANY_GPU, or a type that ends in its memory: NVIDIA_H200_141GB")
    max_context_length: int = Field(ge=2, description="tokens of a row")
    base_model_weight_precision: Precision = "BFLOAT16"
    trainer_image_tag: str = TRAINER_IMAGE_TAG
    deployment: DeploymentEntry = DeploymentEntry()
    policy: KindEntry | None = None
    lora: KindEntry | None = None
    forward_only: KindEntry | None = None
    replace: bool = Field(default=False, description="may take names that an earlier file has given")


class CatalogueFile(Spec):
    """A catalogue file."""

    families: dict[str, FamilyEntry] = Field(min_length=1, description="by name")


def read_shapes(extra_files: Iterable[str | Path] = ()) -> tuple[TrainingShape, ...]:
    """Shapes of the built-in catalogue, of RLORCH_SHAPES (files, separated as in PATH), and of `extra_files`.

    Raises:
        ConfigError: a file is wrong, with every line of it that is; or it gives a name that is taken.
    """
    named = [part for part in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if part]
    shapes: dict[str, TrainingShape] = {}
    for path in (BUILTIN, *map(Path, named), *map(Path, extra_files)):
        _add_file(shapes, path.expanduser())
    return tuple(shapes.values())


def _add_file(shapes: dict[str, TrainingShape], path: Path) -> None:
    document = read_document(path)
    try:
        file = CatalogueFile.model_validate(document.data)
    except ValidationError as error:
        raise _wrong(path, explain(CatalogueFile, document, error)) from error
    problems: list[str] = []
    here: dict[str, TrainingShape] = {}
    for name, family in file.families.items():
        for shape in _family(name, family, document, problems):
            taken = here.get(shape.name) or (None if family.replace else shapes.get(shape.name))
            if taken is None:
                here[shape.name] = shape
            elif taken.name in here:
                problems.append(f"{shape.source}: {shape.name} is given twice, first at {taken.source}")
            else:
                fix = "choose another name, or set replace: true in the family"
                problems.append(f"{shape.source}: {shape.name} is taken, at {taken.source}: {fix}")
    if problems:
        raise _wrong(path, problems)
    shapes.update(here)


def _family(name: str, family: FamilyEntry, document: Document, problems: list[str]) -> list[TrainingShape]:
    """The shapes of one family; what is wrong with it is added to `problems`."""
    where = document.place(("families", name))
    deployment = _deployment(name, family)
    made: list[TrainingShape] = []
    for mode, key, suffix in _KINDS:
        kind: KindEntry | None = getattr(family, key)
        if kind is None:
            continue
        shape = TrainingShape(
            name=kind.name or name + suffix,
            family=name,
            trainer_mode=mode,
            base_model=family.base_model,
            num_params_b=family.num_params_b,
            accelerator_type=kind.accelerator_type or family.accelerator_type,
            accelerator_count=kind.accelerator_count,
            node_count=kind.node_count,
            gpu_fraction=kind.gpu_fraction,
            cpus_per_rank=kind.cpus_per_rank,
            layout=Layout(kind.ranks or max(kind.accelerator_count * kind.node_count, 1)),
            max_supported_context_length=kind.max_context_length or family.max_context_length,
            base_model_weight_precision=family.base_model_weight_precision,
            deployment=None if mode == "FORWARD_ONLY" else deployment,
            trainer_image_tag=family.trainer_image_tag,
            source=document.place(("families", name, key)),
        )
        made.append(shape)
        problems += [f"{shape.source}: families.{name}.{key}: {problem}" for problem in _contradictions(shape)]
    if not made:
        problems.append(f"{where}: families.{name}: has none of policy, lora and forward_only; give at least one")
    if not NAME.fullmatch(deployment.name):
        problems.append(f"{where}: families.{name}: {deployment.name!r} is not a name: use a-z, 0-9 and -")
    if not ACCELERATOR_TYPE.fullmatch(deployment.accelerator_type):
        problems.append(f"{where}: families.{name}.deployment.{_unknown_type(deployment.accelerator_type)}")
    return made


def _deployment(name: str, family: FamilyEntry) -> DeploymentShape:
    entry = family.deployment
    return DeploymentShape(
        name=entry.name or name,
        accelerator_type=entry.accelerator_type or family.accelerator_type,
        tensor_parallel=entry.tensor_parallel,
        dtype=entry.dtype,
        max_model_len=entry.max_model_len or family.max_context_length,
        gpu_memory_fraction=entry.gpu_memory_fraction,
        gpu_fraction=entry.gpu_fraction,
        image_tag=entry.image_tag,
    )


def _contradictions(shape: TrainingShape) -> Iterable[str]:
    """What the fields of one shape cannot mean together."""
    if not NAME.fullmatch(shape.name):
        yield f"{shape.name!r} is not a name: use a-z, 0-9 and -, at most 63"
    if not ACCELERATOR_TYPE.fullmatch(shape.accelerator_type):
        yield _unknown_type(shape.accelerator_type)
    elif shape.accelerator_type == CPU and shape.accelerator_count:
        yield f"accelerator_count = {shape.accelerator_count}: a CPU shape has no accelerators; leave it out"
    elif shape.accelerator_type != CPU and not shape.accelerator_count:
        yield "accelerator_count: required, GPUs per node"
    elif shape.accelerator_count and shape.layout.ranks != shape.num_gpus:
        yield (
            f"ranks = {shape.layout.ranks}: a rank has one GPU, and {shape.accelerator_count} on each of "
            f"{shape.node_count} nodes are {shape.num_gpus}; leave it out"
        )
    if shape.gpu_fraction < 1 and shape.node_count > 1:
        yield f"gpu_fraction = {shape.gpu_fraction:g}: only on one node; several take whole GPUs"


def _unknown_type(accelerator_type: str) -> str:
    return (
        f"accelerator_type = {accelerator_type!r}: must be CPU, ANY_GPU, or a type that ends in its memory, as in "
        "NVIDIA_H200_141GB"
    )


def _wrong(path: Path, problems: list[str]) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{count} in the shape catalogue {path}:\n" + "\n".join(f"  {line}" for line in problems))
