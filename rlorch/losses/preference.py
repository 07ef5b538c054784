"""Losses over pairs of answers to one prompt, one of which is preferred: functions of their log-probabilities.

They couple tokens of two rows, so they are no entries of `LOSSES` (sums over tokens); `rlorch.losses.custom` turns them
into weights of a cross-entropy, with their exact gradient.

P pairs. Chosen and rejected log-probs are those of the answer's tokens alone, natural log, summed (DPO) or averaged
(ORPO) over them.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlorch.losses.custom import CustomLoss
from rlorch.types import Datum

MAX_MEAN_LOGPROB = -1e-6
"""Mean log-probs are capped here before they become odds: at 0 the odds are infinite."""


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): mean of -log sigmoid(r_chosen - r_rejected).

    r = beta (log pi - log ref) is the reward that policy and reference imply for an answer, of summed log-probs.

    Returns:
        The loss (0-d) and, detached, the means of `margin` (r_chosen - r_rejected), `accuracy` (share of pairs with a
        margin above 0), `chosen_reward`, `rejected_reward`.
    """
    chosen_reward_P = beta * (chosen_P - ref_chosen_P)
    rejected_reward_P = beta * (rejected_P - ref_rejected_P)
    margin_P = chosen_reward_P - rejected_reward_P
    metrics = {
        "margin": margin_P.mean(),
        "accuracy": (margin_P > 0).to(margin_P.dtype).mean(),
        "chosen_reward": chosen_reward_P.mean(),
        "rejected_reward": rejected_reward_P.mean(),
    }
    return -logsigmoid(margin_P).mean(), {name: value.detach() for name, value in metrics.items()}


def orpo(chosen_P: Tensor, rejected_P: Tensor, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Odds-ratio preference optimisation (arXiv 2403.07691, eq. 6 and 7), of mean log-probs, mean over pairs:

        -log p_chosen - weight * log sigmoid(log odds(p_chosen) - log odds(p_rejected)),  odds(p) = p / (1 - p)

    Returns:
        The loss (0-d) and, detached, the means of `nll`, `margin` (log odds ratio), `accuracy` (share of pairs with a
        margin above 0).
    """
    margin_P = log_odds(chosen_P) - log_odds(rejected_P)
    nll = -chosen_P.mean()
    metrics = {"nll": nll, "margin": margin_P.mean(), "accuracy": (margin_P > 0).to(margin_P.dtype).mean()}
    return nll - weight * logsigmoid(margin_P).mean(), {name: value.detach() for name, value in metrics.items()}


def log_odds(logprobs_P: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0, exact at both ends of the range."""
    lp_P = logprobs_P.clamp(max=MAX_MEAN_LOGPROB)
    near_one_P = lp_P > -math.log(2.0)
    # The branch that is not taken must be finite too: where() multiplies its gradient by 0.
    small_P = torch.where(near_one_P, lp_P, -1.0)
    large_P = torch.where(near_one_P, -1.0, lp_P)
    return lp_P - torch.where(near_one_P, torch.log(-torch.expm1(small_P)), torch.log1p(-torch.exp(large_P)))


def dpo_loss(reference_P2: NDArray[np.float64], beta: float) -> CustomLoss:
    """DPO as a custom loss over rows chosen, rejected, chosen, rejected, ...

    Args:
        reference_P2: the reference's summed log-probs of each pair's chosen and rejected answer.
        beta: strength of the pull to the reference.
    """
    reference = torch.from_numpy(np.asarray(reference_P2, np.float64))

    def loss(datums: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        sums_P2 = _answer_sums(datums, logprobs)
        value, metrics = dpo(sums_P2[:, 0], sums_P2[:, 1], reference[:, 0], reference[:, 1], beta)
        return value, {name: float(number) for name, number in metrics.items()}

    return loss


def orpo_loss(weight: float) -> CustomLoss:
    """ORPO as a custom loss over rows chosen, rejected, chosen, rejected, ..."""

    def loss(datums: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        counts = torch.tensor([float(datum.loss_inputs["weights"].sum()) for datum in datums], dtype=torch.float64)
        means_P2 = _answer_sums(datums, logprobs) / counts.clamp(min=1.0).view(-1, 2)
        value, metrics = orpo(means_P2[:, 0], means_P2[:, 1], weight)
        return value, {name: float(number) for name, number in metrics.items()}

    return loss


def _answer_sums(datums: list[Datum], logprobs: list[Tensor]) -> Tensor:
    """Summed log-probs of the answers, weighted by `weights`, in float64 (margins are small against sums): [P, 2]."""
    weighted = [
        (torch.from_numpy(np.asarray(datum.loss_inputs["weights"], np.float64)) * lp_T.double()).sum()
        for datum, lp_T in zip(datums, logprobs, strict=True)
    ]
    return torch.stack(weighted).view(-1, 2)
