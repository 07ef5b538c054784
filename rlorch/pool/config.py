"""The pool's settings, and the strategy that they name."""

from typing import Self

from pydantic import Field, model_validator

from rlorch.pool.aimd import AimdWindow, FixedWindow
from rlorch.pool.knee import KneeWindow
from rlorch.pool.strategy import ConcurrencyStrategy, StrategyName
from rlorch.specs import Spec


class PoolConfig(Spec):
    """Admission, retries and deadlines of a `SamplerPool`. Windows are per replica, in sequences."""

    strategy: StrategyName = Field(default="knee", description="knee: follow tokens/s; adaptive: published AIMD; fixed")
    initial_window: int = Field(default=8, ge=1, description="sequences; with `fixed` it is the window")
    min_window: int = Field(default=1, ge=1, description="sequences")
    max_window: int = Field(default=256, ge=1, description="sequences")
    prefill_queue_target_s: float = Field(default=0.5, gt=0, description="adaptive: window halves above it")
    stats_period_s: float = Field(default=1.0, gt=0, description="between two readings of a replica's gauges")
    request_timeout_s: float = Field(default=600.0, gt=0, description="one attempt, to its last token")
    admission_timeout_s: float = Field(default=3600.0, gt=0, description="waiting for a slot, replicas routable")
    no_replica_timeout_s: float = Field(default=300.0, gt=0, description="waiting while no replica is routable")
    stall_timeout_s: float = Field(default=120.0, gt=0, description="no progress for this long: replica lost")
    max_moves: int = Field(default=1, ge=0, description="times a request moves off a lost replica")
    max_retries: int = Field(default=7, ge=0, description="times a refused request is sent again")

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if not self.min_window <= self.initial_window <= self.max_window:
            raise ValueError(
                f"need min_window <= initial_window <= max_window, got {self.min_window}, {self.initial_window}, "
                f"{self.max_window}: change one of them"
            )
        return self


def build_strategy(config: PoolConfig, kv_tokens: int | None = None) -> ConcurrencyStrategy:
    """A fresh strategy for one replica. `kv_tokens` is its KV-cache capacity, where it is known."""
    match config.strategy:
        case "adaptive":
            return AimdWindow(
                config.initial_window,
                config.min_window,
                config.max_window,
                prefill_queue_target=config.prefill_queue_target_s,
            )
        case "knee":
            return KneeWindow(
                config.initial_window,
                config.min_window,
                config.max_window,
                kv_tokens=kv_tokens,
                period_s=config.stats_period_s,
            )
        case "fixed":
            return FixedWindow(config.initial_window)
