"""Clipped importance weights on the score function."""

from collections.abc import Mapping

from torch import Tensor

from rlorch.losses import corrections, policy
from rlorch.losses.record import Config, Loss, LossOutput


def cispo(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t m w sg(clip(r, lo, hi)) A lp, r = exp(lp - o) (MiniMax-M1, arXiv 2506.13585, eq. 4).

    Unlike PPO no token loses its gradient: the clip bounds its weight. `clip_low_threshold` 0 leaves only the upper
    bound, as in the paper.
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    low, high = float(config["clip_low_threshold"]), float(config["clip_high_threshold"])
    ratio_N = corrections.ratio(tokens.log_ratio().detach())
    objective_N = -ratio_N.clamp(low, high) * tokens.advantages_N * tokens.logprobs_N
    return policy.finish(tokens, objective_N, config, (ratio_N < low) | (ratio_N > high))


LOSS = Loss("cispo", cispo, policy.REQUIRED, policy.OPTIONAL, selector="mask", options=policy.COMMON | policy.CLIP)
