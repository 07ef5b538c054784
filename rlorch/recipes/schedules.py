"""Learning rates by step: warm-up, then constant, linear, cosine or warm-up-stable-decay. Pure."""

import math
from typing import Literal

from pydantic import Field, model_validator

from rlorch.specs import Spec

DecayShape = Literal["linear", "cosine", "sqrt"]


class ScheduleSpec(Spec):
    """How the learning rate changes over a run.

    constant stays at its peak after the warm-up; linear and cosine (arXiv 1608.03983, without restarts) fall to
    `min_ratio` at the last step; wsd (arXiv 2404.06395) stays at its peak and falls over the last `decay_ratio` of
    all steps, in the shape `decay_type` (sqrt: 1 - sqrt of the progress, arXiv 2405.18392).
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, description="linear; the first step has peak / warmup_steps")
    min_ratio: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a share of the peak")
    decay_ratio: float = Field(default=0.1, gt=0, le=1, description="wsd: share of all steps that decay")
    decay_type: DecayShape = Field(default="linear", description="wsd: shape of the decay")

    @model_validator(mode="after")
    def _decay_options_belong_to_wsd(self) -> "ScheduleSpec":
        # A default that is written out, as in the resolved config of a run, asks for nothing.
        defaults = {name: type(self).model_fields[name].default for name in ("decay_ratio", "decay_type")}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if given and self.kind != "wsd":
            raise ValueError(f"{', '.join(given)} belong to kind wsd, but kind is {self.kind}")
        return self


def lr_at(step: int, *, peak: float, total_steps: int, spec: ScheduleSpec) -> float:
    """The learning rate of optimizer step `step`.

    Args:
        step: from 0; steps beyond the last keep the last one's rate.
        peak: learning rate after the warm-up.
        total_steps: optimizer steps of the run, at least 1.
        spec: the schedule.

    Raises:
        ValueError: a negative step, no steps, or a warm-up longer than the run.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step {step} of {total_steps}: steps count from 0 and a run has at least one")
    if spec.warmup_steps > total_steps:
        raise ValueError(f"warmup_steps is {spec.warmup_steps}, but the run has only {total_steps} steps; shorten it")
    if step < spec.warmup_steps:
        return peak * ((step + 1) / spec.warmup_steps)
    match spec.kind:
        case "constant":
            return peak
        case "linear" | "cosine":
            start, shape = spec.warmup_steps, spec.kind
        case "wsd":
            decay_steps = math.ceil(spec.decay_ratio * total_steps)
            start, shape = max(spec.warmup_steps, total_steps - decay_steps), spec.decay_type
    return peak * (spec.min_ratio + (1.0 - spec.min_ratio) * _remaining(step, start, total_steps, shape))


def _remaining(step: int, start: int, total_steps: int, shape: DecayShape) -> float:
    """Share of the fall that is left: 1 before `start`, 0 at the last step."""
    if step < start:
        return 1.0
    progress = min(1.0, (step - start + 1) / (total_steps - start))
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if shape == "sqrt" else progress)
