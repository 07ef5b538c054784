"""The config of a distillation, and what it needs started."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rlorch.data import DataSpec
from rlorch.pool.config import PoolConfig
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec, model_path
from rlorch.render.prompt import RenderSpec
from rlorch.render.supervised import TrainOn
from rlorch.specs import RuntimeSpec, SamplerSpec, Spec, TrainerSpec, WeightsSpec

Objective = Literal["reverse_kl", "forward_kl"]


class DistillConfig(Spec):
    """`rlorch train` with `recipe: distill`."""

    recipe: Literal["distill"] = "distill"
    name: str = Field(default="distill", description="names the run directory")
    model: str = Field(description="directory of the student, or a hub id")
    teacher: str = Field(description="directory of the teacher, or a hub id; with the student's tokenizer")
    run_dir: str | None = Field(default=None, description="default: runs/<name>")
    runtime: Literal["ray", "local"] = "ray"
    address: str | None = Field(default=None, description="Ray cluster; null: start one here, auto: the one around")
    seed: int = 0
    steps: int = Field(ge=1, description="optimizer steps; the data repeats, reshuffled")
    objective: Objective = "reverse_kl"
    sequences: Literal["student", "data"] = Field(
        default="student", description="what is scored: samples of the student, or demonstrations (forward_kl only)"
    )
    center: bool = Field(
        default=True,
        description="reverse_kl: subtract the batch's mean advantage; the expected gradient stays, its variance falls",
    )
    top_k: int = Field(default=5, ge=1, le=128, description="forward_kl: the teacher's tokens per position")
    batch_size: int = Field(default=32, ge=1, description="rows per step")
    group_size: int = Field(default=1, ge=1, description="student: samples per row")
    max_tokens: int = Field(default=512, ge=1, description="student: sampled tokens per answer")
    data: DataSpec
    held_out: HeldOutSpec = HeldOutSpec()
    render: RenderSpec = RenderSpec()
    train_on: TrainOn = Field(default="all_assistant", description="data: turns that are learned")
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=1e-5)
    checkpoint: CheckpointSpec = CheckpointSpec()
    observe: ObserveSpec = ObserveSpec()
    trainer: TrainerSpec = TrainerSpec()
    sampler: SamplerSpec = SamplerSpec()
    concurrency: PoolConfig = PoolConfig()
    weights: WeightsSpec = WeightsSpec()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        self.optimizer.check(self.steps)
        if self.objective == "reverse_kl" and self.sequences == "data":
            raise ValueError("objective reverse_kl needs the student's own samples: set sequences: student")
        return self


def runtime_spec(config: DistillConfig) -> RuntimeSpec:
    """What this recipe needs started: a trainer, the teacher as reference, and samplers where the student samples."""
    return RuntimeSpec(
        model=model_path(config.model),
        run_dir=str(run_path(config)),
        reference_model=model_path(config.teacher),
        trainer=config.trainer,
        sampler=config.sampler,
        weights=config.weights,
        roles=("trainer", "reference", *(("sampler",) if config.sequences == "student" else ())),
    )


def run_path(config: DistillConfig) -> Path:
    """The run directory, absolute: actors on other nodes see the same path."""
    return Path(config.run_dir or f"runs/{config.name}").expanduser().resolve()
