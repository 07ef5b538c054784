"""What a shape is: frozen records, their versions, and the profile that clients are given.

An accelerator type is `CPU`, `ANY_GPU`, or a name that ends in the memory of one GPU, `NVIDIA_H200_141GB`. A version is
the first 12 hex digits of the SHA-256 of the record's fields, its deployment's included; where the record was written,
and which shapes stand beside it, are not part of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rlorch.shapes.names import DEFAULT_ACCOUNT, full_name

TrainerMode = Literal["POLICY_TRAINER", "LORA_TRAINER", "FORWARD_ONLY"]
Precision = Literal["BFLOAT16", "FLOAT16", "FLOAT32"]

TRAINER_IMAGE_TAG = "torch-2.13.0"
"""The torch that rlorch pins (constraints.txt). There are no images: a tag names the runtime's version."""

DEPLOYMENT_IMAGE_TAG = "vllm-0.32.0"
"""The vLLM that rlorch pins (pyproject.toml)."""

VERSION_DIGITS = 12
CPU, ANY_GPU = "CPU", "ANY_GPU"
ACCELERATOR_TYPE = re.compile(r"CPU|ANY_GPU|[A-Z0-9_]+_(\d+)GB")

KIND_NAMES: Mapping[TrainerMode, str] = {
    "POLICY_TRAINER": "policy",
    "LORA_TRAINER": "LoRA",
    "FORWARD_ONLY": "forward-only",
}


def accelerator_memory_gib(accelerator_type: str) -> float:
    """Nominal memory of one accelerator, by its type's name; 0 where the type names none."""
    match = ACCELERATOR_TYPE.fullmatch(accelerator_type)
    return float(match[1]) if match and match[1] else 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """How a trainer's processes split the work: `ranks` processes, one GPU each, on all nodes together.

    Weights, gradients and optimizer state are sharded over the ranks (FSDP2), which also split the rows of a batch.
    """

    ranks: int = 1
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1


@dataclass(frozen=True, slots=True)
class DeploymentShape:
    """How one replica serves what a shape trains, on one node.

    `max_model_len` counts prompt plus completion, tokens. `gpu_fraction` is the part of each GPU that is reserved
    (less than 1: shared with the trainer), `gpu_memory_fraction` the part of its memory that the engine may take.
    """

    name: str
    accelerator_type: str
    tensor_parallel: int
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: int
    gpu_memory_fraction: float
    gpu_fraction: float = 1.0
    image_tag: str = DEPLOYMENT_IMAGE_TAG

    @property
    def accelerator_count(self) -> int:
        """GPUs of one replica; 0 on CPU."""
        return 0 if self.accelerator_type == CPU else self.tensor_parallel

    @property
    def version(self) -> str:
        """The content hash."""
        return _digest(asdict(self))

    def full_name(self, account: str = DEFAULT_ACCOUNT) -> str:
        """`accounts/<account>/deploymentShapes/<name>/versions/<version>`."""
        return full_name(account, "deploymentShapes", self.name, self.version)


@dataclass(frozen=True, slots=True)
class TrainingShape:
    """Everything that a shape owns.

    `accelerator_count` is per node; `gpu_fraction` the part of each GPU that a rank reserves; `cpus_per_rank` cores.
    `base_model` is the model it was laid out for (None: any), `num_params_b` its parameters in billions, nominal (None:
    unknown). `deployment` serves what is trained; a forward-only shape has none. `siblings` are the shapes of the same
    family by mode, itself included; `source` is where it was written, file:line.
    """

    name: str
    family: str
    trainer_mode: TrainerMode
    base_model: str | None
    num_params_b: float | None
    accelerator_type: str
    accelerator_count: int
    node_count: int
    gpu_fraction: float
    cpus_per_rank: float
    layout: Layout
    max_supported_context_length: int
    base_model_weight_precision: Precision
    deployment: DeploymentShape | None = None
    trainer_image_tag: str = TRAINER_IMAGE_TAG
    siblings: Mapping[TrainerMode, str] = field(default_factory=dict[TrainerMode, str], compare=False)
    source: str = field(default="", compare=False)

    @property
    def num_gpus(self) -> int:
        """GPUs on all nodes together; 0 on CPU."""
        return self.accelerator_count * self.node_count

    @property
    def supports_lora(self) -> bool:
        """Whether it trains adapters."""
        return self.trainer_mode == "LORA_TRAINER"

    @property
    def kind(self) -> str:
        """policy, LoRA or forward-only."""
        return KIND_NAMES[self.trainer_mode]

    @property
    def version(self) -> str:
        """The content hash."""
        fields = asdict(self)
        return _digest({name: value for name, value in fields.items() if name not in ("siblings", "source")})

    def full_name(self, account: str = DEFAULT_ACCOUNT) -> str:
        """`accounts/<account>/trainingShapes/<name>/versions/<version>`."""
        return full_name(account, "trainingShapes", self.name, self.version)

    def profile(self, account: str = DEFAULT_ACCOUNT) -> "TrainingShapeProfile":
        """What a client is told about it, with names under `account`."""
        deployment = self.deployment
        return TrainingShapeProfile(
            training_shape_version=self.full_name(account),
            trainer_image_tag=self.trainer_image_tag,
            max_supported_context_length=self.max_supported_context_length,
            node_count=self.node_count,
            deployment_shape_version=deployment.full_name(account) if deployment else "",
            deployment_image_tag=deployment.image_tag if deployment else "",
            accelerator_type=self.accelerator_type,
            accelerator_count=self.accelerator_count,
            base_model_weight_precision=self.base_model_weight_precision,
            pipeline_parallelism=self.layout.pipeline_parallel,
            trainer_mode=self.trainer_mode,
        )


@dataclass(frozen=True, slots=True)
class TrainingShapeProfile:
    """A resolved shape, with the fields that clients of the Fireworks Training API read.

    `accelerator_count` is per node. `deployment_shape_version` and `deployment_image_tag` are empty where the shape
    serves nothing.
    """

    training_shape_version: str
    trainer_image_tag: str
    max_supported_context_length: int
    node_count: int
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    base_model_weight_precision: str
    pipeline_parallelism: int
    trainer_mode: str

    @property
    def training_shape(self) -> str:
        """The full name without its version."""
        return self.training_shape_version.partition("/versions/")[0]

    @property
    def deployment_shape(self) -> str | None:
        """The full name of the linked deployment shape, version included; None where there is none."""
        return self.deployment_shape_version or None

    @property
    def supports_lora(self) -> bool:
        """Whether adapters are trained."""
        return self.trainer_mode == "LORA_TRAINER"


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:VERSION_DIGITS]
