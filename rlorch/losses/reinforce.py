"""The score-function estimator."""

from collections.abc import Mapping

from torch import Tensor

from rlorch.losses import policy
from rlorch.losses.record import Config, Loss, LossOutput


def reinforce(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t m w A lp (Williams 1992).

    Without a correction w = 1: right only where the tokens were sampled by the policy that is trained.
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    return policy.finish(tokens, -tokens.advantages_N * tokens.logprobs_N, config)


LOSS = Loss("reinforce", reinforce, policy.REQUIRED, policy.OPTIONAL, selector="mask", options=policy.COMMON)
