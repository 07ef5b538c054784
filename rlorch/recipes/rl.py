"""Reinforcement learning: sample groups, score them, train, push the new weights to the samplers, all at once.

This file is the whole run as one reads it: what is started, what is wired to what, what is left behind. The loops
are in `rlorch.coordinator`; each part is a port and can be replaced.
"""

import asyncio
import logging
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlorch.checkpoint.store import FileCheckpointStore
from rlorch.coordinator.algorithm import Algorithm, AlgorithmSpec
from rlorch.coordinator.board import Board
from rlorch.coordinator.coordinator import Coordinator, RolloutSpec, StepDone
from rlorch.coordinator.evaluation import Evaluation, EvaluationSpec, Evaluator
from rlorch.coordinator.fleet import Fleet
from rlorch.coordinator.ledger import Ledger
from rlorch.coordinator.source import Cursor, PromptSource
from rlorch.data import DataSpec, load_rows, split_held_out
from rlorch.errors import DataError
from rlorch.journal.journal import SqliteJournal
from rlorch.journal.recovery import RecoveredRun, read_state
from rlorch.observe.trace import Tracer
from rlorch.observe.view import RunSummary
from rlorch.pool.config import PoolConfig
from rlorch.ports import Runtime, Trainer
from rlorch.recipes.run_dir import RunDir, learned_digest, open_run_dir
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec, check_model_dir
from rlorch.recipes.sft import save_checkpoint
from rlorch.render.prompt import RenderSpec, render_prompt
from rlorch.rollout.single_turn import rollout_group
from rlorch.scoring.pool import RewardPool
from rlorch.specs import RewardSpec, RuntimeSpec, SamplerSpec, Spec, TrainerSpec, WeightsSpec
from rlorch.types import Batch, Prompt, Rollout, SamplingParams
from rlorch.weights.publisher import Publisher

log = logging.getLogger(__name__)


class RLConfig(Spec):
    """`rlorch train` with `recipe: rl`."""

    recipe: Literal["rl"] = "rl"
    name: str = Field("rl", description="names the run directory")
    model: str = Field(description="directory of the initial policy, or a hub id")
    run_dir: str | None = Field(None, description="default: runs/<name>")
    runtime: Literal["ray", "local"] = Field("ray", description="local: all roles in this process, for debugging")
    address: str | None = Field(None, description="Ray cluster; null: start one here, auto: the one around")
    seed: int = 0
    steps: int = Field(ge=1, description="optimizer steps")
    epochs: int | None = Field(None, ge=1, description="passes over the data; null: repeat until `steps`")
    data: DataSpec
    held_out: HeldOutSpec = HeldOutSpec()
    render: RenderSpec = RenderSpec()
    rewards: RewardSpec
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


Config = RLConfig
