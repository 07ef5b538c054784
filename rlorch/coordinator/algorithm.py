"""From scored groups to training rows: which groups teach, what each rollout's advantage is, how tokens are weighted.

Pure decisions. A batch becomes one `Datum` per rollout:

    tokens    x_0 .. x_{T-1}          everything but the last token of the trajectory
    targets   x_1 .. x_T
    mask      weight of the target where the policy sampled it, 0 on prompt and observations
    logprobs  behaviour log-probs of the targets;  advantages  the rollout's advantage on every sampled token

How losses of different lengths are averaged is `loss_average`, expressed in the mask so that every loss and the KL
term share it (the trainer divides the summed gradient by the sum of the mask):

    token      every sampled token weighs the same (DAPO, arXiv 2503.14476)
    sequence   every rollout weighs the same: mask = 1 / its length (GRPO, arXiv 2402.03300)
    constant   sum over tokens / (rollouts * max_tokens), no length bias (Dr. GRPO, arXiv 2503.20783)
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rlorch.rollout.arrays import trajectory_arrays
from rlorch.scoring.advantage import AdvantageKind, FailurePolicy, GroupAdvantages, group_advantages
from rlorch.specs import Spec
from rlorch.types import Batch, Datum, Floats, Group, LossSpec, Normalization, Rollout, Verdict

LossAverage = Literal["token", "sequence", "constant"]

_UNSCORED = Verdict(failure="crash", detail="never scored")


class AlgorithmSpec(Spec):
    """What is optimised. GRPO, DAPO, Dr. GRPO, RLOO, GSPO and CISPO are settings of these fields."""

    loss: str = Field("importance_sampling", description="a loss of rlorch.losses")
    loss_options: dict[str, float | str] = Field(default_factory=dict, description="the loss's own options")
    advantage: AdvantageKind = Field("grpo", description="how rewards of a group become advantages")
    loss_average: LossAverage = Field("token", description="token (DAPO), sequence (GRPO) or constant (Dr. GRPO)")
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the k3 KL to the reference; 0: no reference")
    tis_cap: float | None = Field(2.0, gt=0, description="truncated importance sampling: cap of trainer/sampler ratio")
    icepop: float | None = Field(None, gt=1, description="drop tokens whose trainer/sampler ratio leaves [1/x, x]")
    proximal: Literal["behaviour", "recompute"] = Field(
        "behaviour", description="a ratio's old policy: the sampler's log-probs, or the trainer's before the step"
    )
    drop_equal_rewards: bool = Field(True, description="groups that teach nothing are dropped and refilled")
    min_scored: int = Field(2, ge=1, description="a group with fewer scored rollouts is dropped")
    failures: str = Field(
        "drop_rollout", description="a rollout without a score: drop_rollout, drop_group, or score:<number>"
    )
    shuffle_advantages: bool = Field(
        False, description="a control: permute advantages across the batch, so that reward carries no signal"
    )


class Algorithm:
    """`AlgorithmSpec` put to work; holds no state but its settings."""

    def __init__(self, spec: AlgorithmSpec, *, max_tokens: int, seed: int = 0) -> None:
        self.spec = spec
        self._failures = FailurePolicy.parse(spec.failures)
        self._max_tokens = max_tokens
        self._seed = seed

    @property
    def needs_reference(self) -> bool:
        """Whether a reference trainer has to be started."""
        return self.spec.kl_coefficient > 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the trainer scores the batch before the step (decoupled objective, arXiv 2505.24298)."""
        return self.spec.proximal == "recompute"

    @property
    def normalization(self) -> Normalization:
        """How the trainer divides the summed gradient."""
        return "none" if self.spec.loss_average == "constant" else "num_loss_tokens"

    def loss(self) -> LossSpec:
        """The loss with its corrections."""
        spec = self.spec
        options: dict[str, float | str] = dict(spec.loss_options)
        if spec.kl_coefficient > 0:
            options["kl_beta"] = spec.kl_coefficient
        if spec.tis_cap is not None:
            options["tis_cap"] = spec.tis_cap
        if spec.icepop is not None:
            options["icepop"] = spec.icepop
        return LossSpec(spec.loss, options)

    def judge(self, group: Group) -> GroupAdvantages:
        """What the group's verdicts come to: kept rollouts, their scores and advantages."""
        verdicts = [rollout.verdict or _UNSCORED for rollout in group.rollouts]
        return group_advantages(self.spec.advantage, verdicts, self._failures, min_scored=self.spec.min_scored)

    def drop_reason(self, group: Group) -> str | None:
        """Why the group teaches nothing, or None when it should be trained."""
        judged = self.judge(group)
        if judged.dropped is not None:
            return judged.dropped
        return "equal_rewards" if judged.degenerate and self.spec.drop_equal_rewards else None

    def datums(self, batch: Batch) -> tuple[Datum, ...]:
        """One row per kept rollout, groups in batch order, rollouts in index order."""
        judged = [(group, self.judge(group)) for group in batch.groups]
        rollouts = [group.rollouts[index] for group, verdict in judged for index in verdict.kept]
        values = np.concatenate([verdict.advantages_G for _, verdict in judged])
        if self.spec.shuffle_advantages:
            values = np.random.default_rng((self._seed, batch.step)).permutation(values)
        return tuple(
            self._datum(rollout, float(value), len(rollouts)) for rollout, value in zip(rollouts, values, strict=True)
        )

    def _datum(self, rollout: Rollout, advantage: float, num_rows: int) -> Datum:
        arrays = trajectory_arrays(rollout)
        sampled = arrays.mask_T > 0
        weight = {
            "token": 1.0,
            "sequence": 1.0 / max(int(sampled.sum()), 1),
            "constant": 1.0 / (num_rows * self._max_tokens),
        }[self.spec.loss_average]
        return Datum(
            tokens_T=arrays.tokens_T,
            loss_inputs={
                "target_tokens": arrays.target_tokens_T,
                "logprobs": arrays.logprobs_T,
                "advantages": np.where(sampled, np.float32(advantage), np.float32(0)),
                "mask": np.where(sampled, np.float32(weight), np.float32(0)),
            },
        )


def with_inputs(datums: Sequence[Datum], key: str, values: Sequence[Floats]) -> tuple[Datum, ...]:
    """The same rows with one more loss input, one array per row."""
    return tuple(
        Datum(datum.tokens_T, {**datum.loss_inputs, key: value}) for datum, value in zip(datums, values, strict=True)
    )
