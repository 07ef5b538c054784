"""Advantages: from the scores of one group to a weight for each of its rollouts. Pure numpy, float64 throughout.

With r_i the score of rollout i among the G *scored* rollouts of one prompt, mean m and sample deviation s (G - 1):

    grpo       (r_i - m) / (s + eps)                 arXiv 2402.03300, section 4.1.2
    dapo       the same; dynamic sampling drops the groups that `is_degenerate`     arXiv 2503.14476, section 3.2
    dr_grpo    r_i - m                               arXiv 2503.20783, section 3.2: no division, no difficulty bias
    rloo       r_i - mean of the other G - 1 scores  arXiv 2402.14740, equation 8; equals G / (G - 1) * dr_grpo
    reinforce  r_i                                   no baseline
    none       1                                     every rollout weighs the same, whatever it scored

Invariants: grpo, dapo, dr_grpo and rloo sum to 0 and do not change when every score is shifted; grpo and dapo do
not change (up to eps) when every score is scaled.

A failed rollout has no score. What it does to its group is a `FailurePolicy`; `group_advantages` applies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlorch.errors import ConfigError
from rlorch.types import Verdict

AdvantageKind = Literal["grpo", "dapo", "dr_grpo", "rloo", "reinforce", "none"]

# Below the smallest deviation of real rewards (a graded reward of 1e-3 steps), above float64 noise of their sum.
EPSILON = 1e-6
# Sums of the same weighted parts in another order differ by a few units in the last place.
EQUAL_TOLERANCE = 1e-9
# A comparison needs two scores.
MIN_SCORED = 2


def advantages(kind: AdvantageKind, scores_G: ArrayLike, eps: float = EPSILON) -> NDArray[np.float64]:
    """The advantage of each rollout of a group, shape (G,).

    A group whose scores are all equal gets exact zeros from the four estimators that have a baseline.

    Args:
        kind: the estimator (module docstring).
        scores_G: finite scores, one per scored rollout, G >= 1 (rloo and the deviation of one score are 0).
        eps: added to the deviation by grpo and dapo.

    Raises:
        ValueError: an unknown kind, an empty group, or a score that is not finite.
    """
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"unknown advantage {kind!r}; known: {', '.join(get_args(AdvantageKind))}")
    r_G = _checked(scores_G)
    if kind == "none":
        return np.ones_like(r_G)
    if kind == "reinforce":
        return r_G.copy()
    if is_degenerate(r_G):
        return np.zeros_like(r_G)
    centred_G = r_G - r_G.mean()
    if kind == "dr_grpo":
        return centred_G
    if kind == "rloo":
        return centred_G * (len(r_G) / (len(r_G) - 1))
    return centred_G / (r_G.std(ddof=1) + eps)


def is_degenerate(scores_G: ArrayLike) -> bool:
    """Whether all scores are equal, so that a baseline leaves nothing to learn (a single score always is)."""
    r_G = _checked(scores_G)
    return bool(np.ptp(r_G) <= EQUAL_TOLERANCE * max(1.0, float(np.abs(r_G).max())))


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What a failed verdict does to its group.

    drop_rollout: it leaves the group (default). drop_group: the group is dropped. score: it counts as `value`,
    which the user has to write down, because a failure is not evidence that an answer is wrong.
    """

    kind: Literal["drop_rollout", "drop_group", "score"] = "drop_rollout"
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "FailurePolicy":
        """Read `drop_rollout`, `drop_group` or `score:<number>`.

        Raises:
            ConfigError: anything else.
        """
        if text == "drop_rollout" or text == "drop_group":
            return cls(text)
        head, _, number = text.partition(":")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if head != "score" or not isfinite(value):
            raise ConfigError(
                f"failure policy {text!r} is unknown; write drop_rollout, drop_group or score:<number>, e.g. score:0"
            )
        return cls("score", value)


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """The verdicts of a group, decided.

    `kept` are the indices that train, in order; `scores_G` and `advantages_G` are aligned with it. `dropped` is the
    reason why the whole group does not train (then the three are empty), `degenerate` that its scores are equal.
    """

    kept: tuple[int, ...]
    scores_G: NDArray[np.float64]
    advantages_G: NDArray[np.float64]
    degenerate: bool
    dropped: str | None = None


def group_advantages(
    kind: AdvantageKind,
    verdicts: Sequence[Verdict],
    policy: FailurePolicy = FailurePolicy(),
    *,
    min_scored: int = MIN_SCORED,
) -> GroupAdvantages:
    """Apply the failure policy to the verdicts of one group, in rollout order, and compute its advantages."""
    failed = [verdict.failure for verdict in verdicts if verdict.failure is not None]
    if failed and policy.kind == "drop_group":
        return _dropped(f"reward_{failed[0]}")
    scored = [
        (index, policy.value if verdict.score is None else verdict.score)
        for index, verdict in enumerate(verdicts)
        if verdict.score is not None or policy.kind == "score"
    ]
    if len(scored) < min_scored:
        return _dropped(f"reward_{failed[0]}" if failed else "too_few_rollouts")
    scores_G = np.array([score for _, score in scored], dtype=np.float64)
    return GroupAdvantages(
        tuple(index for index, _ in scored), scores_G, advantages(kind, scores_G), is_degenerate(scores_G)
    )


def _dropped(reason: str) -> GroupAdvantages:
    return GroupAdvantages((), np.zeros(0), np.zeros(0), degenerate=False, dropped=reason)


def _checked(scores_G: ArrayLike) -> NDArray[np.float64]:
    r_G = np.asarray(scores_G, dtype=np.float64)
    if r_G.ndim != 1 or len(r_G) == 0 or not np.isfinite(r_G).all():
        raise ValueError(f"scores must be a non-empty list of finite numbers, not {r_G.tolist()!r}")
    return r_G
