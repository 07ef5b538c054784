"""Losses over pairs of answers to one prompt, one of which is preferred: functions of their log-probabilities.

They couple tokens of two rows, so they are no entries of `LOSSES` (sums over tokens); `rlorch.losses.custom` turns them
into weights of a cross-entropy, with their exact gradient.

P pairs. Chosen and rejected log-probs are those of the answer's tokens alone, natural log, summed (DPO) or averaged
(ORPO) over them.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
