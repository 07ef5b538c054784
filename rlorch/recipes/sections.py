"""Config sections that several recipes share."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from rlorch.errors import ModelError
from rlorch.recipes.schedules import ScheduleSpec, lr_at
from rlorch.specs import Spec
from rlorch.types import AdamParams

TOKENIZER_FILES = ("tokenizer*", "vocab.*", "tekken.json")
"""Patterns of the files of a tokenizer; without any of them there is none."""


class OptimizerSpec(Spec):
    """AdamW (arXiv 1711.05101) and its learning-rate schedule."""

    learning_rate: float = Field(default=1e-6, gt=0, description="peak learning rate")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled; not applied to norms and biases")
    grad_clip_norm: float = Field(default=1.0, ge=0, description="global norm; 0: off")
    schedule: ScheduleSpec = ScheduleSpec()

    def check(self, total_steps: int) -> None:
        """Raise `ValueError` when the schedule does not fit a run of `total_steps`."""
        if self.schedule.warmup_steps > total_steps:
            raise ValueError(
                f"optimizer.schedule.warmup_steps is {self.schedule.warmup_steps}, but the run has only {total_steps} "
                "steps: shorten one or lengthen the other"
            )

    def adam(self, step: int, total_steps: int) -> AdamParams:
        """Parameters of the step that starts from version `step`."""
        return AdamParams(
            learning_rate=lr_at(step, peak=self.learning_rate, total_steps=total_steps, spec=self.schedule),
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
        )


class HeldOutSpec(Spec):
    """Prompts kept out of training, by a hash of their text, for evaluation."""

    num_prompts: int = Field(default=0, ge=0, description="0: no evaluation")


class CheckpointSpec(Spec):
    """Resumable checkpoints: weights, optimizer, version."""

    every: int = Field(default=50, ge=0, description="optimizer steps; 0: only at the end and on Ctrl-C")
    keep_last: int = Field(default=2, ge=1)


class ObserveSpec(Spec):
    """Where metrics go besides metrics.jsonl, trace.json and the console."""

    console: Literal["auto", "live", "plain", "off"] = Field(default="auto", description="auto: live on a terminal")
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "rlorch"
    wandb_mode: Literal["online", "offline"] = Field(default="online", description="offline: needs no account")


def model_path(model: str) -> str:
    """The absolute directory of a local model, or the hub id unchanged."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def check_model_dir(model: str, key: str = "model") -> None:
    """Refuse what cannot be a model, without loading it. A hub id is taken on trust; `key` is where it was configured.

    Raises:
        ModelError: a path where nothing is, or a directory without a config or a tokenizer.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
            raise ModelError(f"{key} = {model}: no such directory (looked from {Path.cwd()})")
        return
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise ModelError(f"{key} = {path}: no config.json: a model directory as save_pretrained writes it is needed")
    if not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ModelError(
            f"{key} = {path}: no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer there"
        )
