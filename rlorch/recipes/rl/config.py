"""The config of an RL run, and what it needs started."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rlorch.coordinator.algorithm import AlgorithmSpec
from rlorch.coordinator.coordinator import RolloutSpec
from rlorch.coordinator.evaluation import EvaluationSpec
from rlorch.data import DataSpec
from rlorch.pool.config import PoolConfig
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec, model_path
from rlorch.render.prompt import RenderSpec
from rlorch.rollout.plugin import EnvironmentSpec
from rlorch.specs import RewardSpec, RuntimeSpec, SamplerSpec, Spec, TrainerSpec, WeightsSpec


class RLConfig(Spec):
    """`rlorch train` with `recipe: rl`."""

    recipe: Literal["rl"] = "rl"
    name: str = Field(default="rl", description="names the run directory")
    model: str = Field(description="directory of the initial policy, or a hub id")
    run_dir: str | None = Field(default=None, description="default: runs/<name>")
    runtime: Literal["ray", "local"] = Field(default="ray", description="local: all in this process")
    address: str | None = Field(default=None, description="Ray cluster; null: start one here, auto: the one around")
    seed: int = 0
    steps: int = Field(ge=1, description="optimizer steps")
    epochs: int | None = Field(default=None, ge=1, description="passes over the data; null: repeat until `steps`")
    data: DataSpec
    held_out: HeldOutSpec = HeldOutSpec()
    render: RenderSpec = RenderSpec()
    rewards: RewardSpec | None = None
    environment: EnvironmentSpec | None = None
    algorithm: AlgorithmSpec = AlgorithmSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    rollout: RolloutSpec = RolloutSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    concurrency: PoolConfig = PoolConfig()
    checkpoint: CheckpointSpec = CheckpointSpec()
    observe: ObserveSpec = ObserveSpec()
    trainer: TrainerSpec = TrainerSpec()
    sampler: SamplerSpec = SamplerSpec()
    weights: WeightsSpec = WeightsSpec()

    @model_validator(mode="after")
    def _the_schedule_fits_the_run(self) -> Self:
        self.optimizer.check(self.steps)
        return self

    @model_validator(mode="after")
    def _rollouts_are_scored_and_fit(self) -> Self:
        if self.rewards is None and self.environment is None:
            raise ValueError("nothing scores a rollout: give rewards.terms, or an environment")
        limit = self.environment.limits.max_context_tokens if self.environment else 0
        if limit > self.sampler.max_model_len:
            raise ValueError(
                f"environment.limits.max_context_tokens is {limit}, but sampler.max_model_len only "
                f"{self.sampler.max_model_len}: lower the first or raise the second"
            )
        return self


def run_path(config: RLConfig) -> Path:
    """The run directory, absolute: actors on other nodes see the same path."""
    return Path(config.run_dir or f"runs/{config.name}").expanduser().resolve()


def runtime_spec(config: RLConfig) -> RuntimeSpec:
    """What this recipe needs started. A reference only when the KL coefficient is not 0."""
    reference = config.algorithm.kl_coefficient > 0
    return RuntimeSpec(
        model=model_path(config.model),
        run_dir=str(run_path(config)),
        trainer=config.trainer,
        sampler=config.sampler,
        rewards=config.rewards,
        weights=config.weights,
        roles=(
            "trainer",
            *(("reference",) if reference else ()),
            "sampler",
            *(("reward",) if config.rewards else ()),
        ),
    )
