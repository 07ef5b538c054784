"""Advantages against references written out in plain Python, and the invariances that define them."""

import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.errors import ConfigError
from rlorch.scoring.advantage import (
    EPSILON,
    AdvantageKind,
    FailurePolicy,
    advantages,
    group_advantages,
    is_degenerate,
)
from rlorch.types import Verdict

CENTRED = ("grpo", "dapo", "dr_grpo", "rloo")
groups = st.lists(st.integers(-1000, 1000).map(lambda n: n / 100), min_size=2, max_size=16)


def reference(kind: str, scores: list[float]) -> list[float]:
    r = [Fraction(score) for score in scores]
    total, count = sum(r), len(r)
    if kind in ("grpo", "dapo"):
        mean = total / count
        deviation = math.sqrt(sum((x - mean) ** 2 for x in r) / (count - 1))
        return [float(x - mean) / (deviation + EPSILON) for x in r]
    if kind == "dr_grpo":
        return [float(x - total / count) for x in r]
    if kind == "rloo":
        return [float(x - (total - x) / (count - 1)) for x in r]
    return [float(x) for x in r] if kind == "reinforce" else [1.0] * count


@pytest.mark.parametrize("kind", get_args(AdvantageKind))
@given(scores=groups)
def test_every_estimator_equals_its_formula_in_exact_arithmetic(kind: AdvantageKind, scores: list[float]) -> None:
    np.testing.assert_allclose(advantages(kind, scores), reference(kind, scores), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", CENTRED)
@given(scores=groups, shift=st.integers(-50, 50))
def test_estimators_with_a_baseline_sum_to_zero_and_ignore_a_shift(
    kind: AdvantageKind, scores: list[float], shift: int
) -> None:
    plain = advantages(kind, scores)
    assert plain.sum() == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(advantages(kind, [score + shift for score in scores]), plain, atol=1e-7)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@given(scores=groups, scale=st.sampled_from([0.5, 2.0, 10.0, 1000.0]))
def test_group_normalisation_ignores_the_scale_of_the_scores(
    kind: AdvantageKind, scores: list[float], scale: float
) -> None:
    scaled = advantages(kind, [score * scale for score in scores])
    # What is left of the scale is eps beside the smallest deviation that these scores can have (0.0025).
    np.testing.assert_allclose(scaled, advantages(kind, scores), rtol=2e-3)


def test_a_group_of_binary_scores_has_the_known_grpo_values() -> None:
    np.testing.assert_allclose(advantages("grpo", [1, 0, 0, 0]), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    np.testing.assert_allclose(advantages("rloo", [1, 0, 0, 0]), [1, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("kind", CENTRED)
@pytest.mark.parametrize("scores", [[0.7], [0.1 + 0.2, 0.3], [0.0, 0.0, 0.0], [1e12, 1e12]])
def test_equal_scores_are_degenerate_and_give_exact_zeros(kind: AdvantageKind, scores: list[float]) -> None:
    assert is_degenerate(scores)
    assert advantages(kind, scores).tolist() == [0.0] * len(scores)


def test_scores_that_differ_a_little_are_not_degenerate() -> None:
    assert not is_degenerate([0.5, 0.5, 0.501])


@pytest.mark.parametrize("scores", [[], [math.nan, 1.0], [math.inf], [[1.0]]])
def test_scores_that_are_not_a_list_of_finite_numbers_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        advantages("grpo", scores)


def test_an_unknown_estimator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="dr_grpo"):
        advantages("gae", [1.0, 2.0])  # pyright: ignore[reportArgumentType]


TIMEOUT = Verdict(failure="timeout", detail="30 s")


def test_a_failed_rollout_leaves_its_group_and_is_not_a_zero() -> None:
    decided = group_advantages("dr_grpo", [Verdict(1.0), TIMEOUT, Verdict(0.5)])
    assert decided.kept == (0, 2)
    assert decided.advantages_G.tolist() == [0.25, -0.25]
    assert decided.dropped is None


def test_a_group_with_one_score_left_is_dropped_and_names_the_failure() -> None:
    decided = group_advantages("grpo", [Verdict(1.0), TIMEOUT, Verdict(failure="crash")])
    assert decided.dropped == "reward_timeout"
    assert decided.kept == ()


def test_drop_group_drops_the_group_for_one_failure() -> None:
    decided = group_advantages("grpo", [Verdict(1.0), Verdict(0.0), TIMEOUT], FailurePolicy.parse("drop_group"))
    assert decided.dropped == "reward_timeout"


def test_an_explicit_score_for_failures_is_used_as_written() -> None:
    decided = group_advantages("dr_grpo", [Verdict(1.0), TIMEOUT], FailurePolicy.parse("score:-1"))
    assert decided.kept == (0, 1)
    assert decided.scores_G.tolist() == [1.0, -1.0]


def test_a_group_of_equal_scores_is_marked_degenerate() -> None:
    assert group_advantages("grpo", [Verdict(1.0), Verdict(1.0)]).degenerate


@pytest.mark.parametrize("text", ["", "zero", "score", "score:", "score:nan", "score:x", "drop"])
def test_a_failure_policy_that_is_not_understood_says_what_can_be_written(text: str) -> None:
    with pytest.raises(ConfigError, match="drop_rollout, drop_group or score"):
        FailurePolicy.parse(text)
