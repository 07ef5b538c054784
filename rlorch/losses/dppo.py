"""Importance-sampled policy gradient inside a trust region of probability divergence."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlorch.losses import corrections, policy
from rlorch.losses.record import Config, Loss, LossOutput, Option

PROBABILITY_FLOOR = 1e-7
"""Binary probabilities are kept this far from 0 and 1: float32 has no values between 1 - 6e-8 and 1."""


def dppo(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t m w M r A, r = exp(lp - o) (divergence PPO, arXiv 2602.04879, eq. 11 and 12).

    M is 0, and with it the gradient, where the token has left the trust region and the update would carry it further:

        A > 0, pi > q, D > delta_high        A < 0, pi < q, D > delta_low

    D is the divergence between the behaviour policy q and the current one pi, both reduced to "this token or another"
    (eq. 13 and 14): `divergence` "tv" is |q - pi|, "kl" is q log(q/pi) + (1-q) log((1-q)/(1-pi)). Both thresholds are
    in the unit of D: a share of probability, or nats (where .05 is about what .15 is to "tv").

    A ratio says little about how far a distribution moved: PPO's clip stops rare tokens that hardly matter and lets
    likely ones fall far. The region is always around the policy that sampled, also with `old_logprobs`.
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    advantages_N, current_N = tokens.advantages_N, tokens.logprobs_N.detach()
    distance_N = binary_divergence(tokens.behaviour_N, current_N, str(config["divergence"]))
    rising_N = (advantages_N > 0) & (current_N > tokens.behaviour_N) & (distance_N > float(config["delta_high"]))
    falling_N = (advantages_N < 0) & (current_N < tokens.behaviour_N) & (distance_N > float(config["delta_low"]))
    masked_N = rising_N | falling_N
    ratio_N = corrections.ratio(tokens.log_ratio())
    return policy.finish(tokens, torch.where(masked_N, 0.0, -ratio_N * advantages_N), config, masked_N)


def binary_divergence(behaviour_N: Tensor, current_N: Tensor, kind: str) -> Tensor:
    """Divergence of the two-outcome distributions (this token, any other) of two policies, from log-probs: [N]."""
    q_N, p_N = behaviour_N.exp(), current_N.exp()
    if kind == "tv":
        return (q_N - p_N).abs()
    q_N = q_N.clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    p_N = p_N.clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return q_N * (q_N.log() - p_N.log()) + (1 - q_N) * (torch.log1p(-q_N) - torch.log1p(-p_N))


LOSS = Loss(
    "dppo",
    dppo,
    policy.REQUIRED,
    policy.OPTIONAL,
    selector="mask",
    options=policy.COMMON
    | {
        "divergence": Option("tv", "distance between behaviour and current policy", choices=("tv", "kl")),
        "delta_low": Option(0.15, "largest divergence of a token that becomes less likely", low=0.0),
        "delta_high": Option(0.15, "largest divergence of a token that becomes likelier", low=0.0),
    },
)
