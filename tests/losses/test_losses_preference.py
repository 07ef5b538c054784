"""Pair losses against plain Python floats, with finite differences for their gradients."""

import math

import numpy as np
import pytest
import torch

from rlorch.losses.preference import dpo, log_odds, orpo


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def slow_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    terms = zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    return sum(softplus(-beta * ((c - rc) - (r - rr))) for c, r, rc, rr in terms) / len(chosen)


def slow_orpo(chosen, rejected, weight):
    def odds(lp):
        return math.exp(lp) / (1 - math.exp(lp))

    pairs = list(zip(chosen, rejected, strict=True))
    ratio = sum(softplus(-math.log(odds(c) / odds(r))) for c, r in pairs) / len(pairs)
    return -sum(chosen) / len(pairs) + weight * ratio


def slopes(function, arrays):
    found = []
    for k, values in enumerate(arrays):
        for i in range(len(values)):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [list(array) for array in arrays]
                moved[k][i] += step
                ends.append(function(*moved))
            found.append((ends[0] - ends[1]) / 2e-6)
    return found


def leaves(arrays):
    return [torch.tensor(np.asarray(values), dtype=torch.float64, requires_grad=True) for values in arrays]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_has_the_value_and_slope_of_the_formula(beta):
    rng = np.random.default_rng(0)
    pair = [-rng.exponential(20, 7), -rng.exponential(20, 7)]
    reference = [array + rng.normal(0, 3, 7) for array in pair]
    tensors = leaves(pair)
    loss, metrics = dpo(*tensors, *[torch.tensor(array) for array in reference], beta)
    loss.backward()
    assert loss.item() == pytest.approx(slow_dpo(*pair, *reference, beta), rel=1e-12)
    slow = slopes(lambda c, r: slow_dpo(c, r, *reference, beta), pair)
    assert torch.cat([t.grad for t in tensors]).tolist() == pytest.approx(slow, rel=1e-5, abs=1e-8)
    rewards = [beta * (array - ref) for array, ref in zip(pair, reference, strict=True)]
    assert metrics["chosen_reward"].item() == pytest.approx(rewards[0].mean())
    assert metrics["rejected_reward"].item() == pytest.approx(rewards[1].mean())
    assert metrics["margin"].item() == pytest.approx((rewards[0] - rewards[1]).mean())
    assert metrics["accuracy"].item() == pytest.approx((rewards[0] > rewards[1]).mean())


def test_dpo_of_an_untrained_policy_is_log_2_and_right_about_no_pair():
    values = torch.tensor([-3.0, -4.0])
    loss, metrics = dpo(values, values * 2, values, values * 2, 0.1)
    assert loss.item() == pytest.approx(math.log(2))
    assert (metrics["margin"].item(), metrics["accuracy"].item()) == (0.0, 0.0)


def test_orpo_has_the_value_and_slope_of_the_formula():
    rng = np.random.default_rng(1)
    pair = [-rng.exponential(1.0, 9) - 1e-3, -rng.exponential(1.0, 9) - 1e-3]
    tensors = leaves(pair)
    loss, metrics = orpo(*tensors, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(slow_orpo(*pair, 0.7), rel=1e-9)
    slow = slopes(lambda c, r: slow_orpo(c, r, 0.7), pair)
    assert torch.cat([t.grad for t in tensors]).tolist() == pytest.approx(slow, rel=1e-4, abs=1e-7)
    assert metrics["nll"].item() == pytest.approx(-pair[0].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_stay_finite_with_their_gradient_at_both_ends(dtype):
    lp = torch.tensor([0.0, -1e-7, -1e-3, -math.log(2), -5.0, -200.0], dtype=dtype, requires_grad=True)
    values = log_odds(lp)
    values.sum().backward()
    assert values.isfinite().all()
    assert lp.grad.isfinite().all()
    assert values[2].item() == pytest.approx(math.log(math.exp(-1e-3) / (1 - math.exp(-1e-3))), rel=1e-5)
    assert values[3].item() == pytest.approx(0.0, abs=1e-6)
    assert values[5].item() == -200.0
