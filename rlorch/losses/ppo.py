"""Clipped surrogate."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlorch.losses import corrections, policy
from rlorch.losses.record import Config, Loss, LossOutput, Option


def ppo(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t m w min(r A, clip(r, lo, hi) A), r = exp(lp - o) (arXiv 1707.06347, eq. 7).

    Thresholds are absolute ratios: epsilon .2 / .28 (DAPO, arXiv 2503.14476) is lo .8, hi 1.28. `dual_clip` c > 1
    bounds the surrogate of negative advantages from below by c A (dual clip, arXiv 1912.09729): above the ratio c the
    gradient is 0. With `old_logprobs` this is the decoupled objective (arXiv 2505.24298).
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    advantages_N = tokens.advantages_N
    ratio_N = corrections.ratio(tokens.log_ratio())
    surrogate_N, clipped_N = policy.clipped(ratio_N, advantages_N, config)
    bound = float(config["dual_clip"])
    if bound > 0:
        beyond_N = (advantages_N < 0) & (ratio_N.detach() > bound)
        surrogate_N = torch.where(beyond_N, bound * advantages_N, surrogate_N)
        clipped_N = clipped_N | beyond_N
    return policy.finish(tokens, -surrogate_N, config, clipped_N)


LOSS = Loss(
    "ppo",
    ppo,
    policy.REQUIRED,
    policy.OPTIONAL,
    selector="mask",
    options=policy.COMMON
    | policy.CLIP
    | {"dual_clip": Option(0.0, "ratio above which negative advantages give no gradient", low=1.0, zero_is_off=True)},
)
