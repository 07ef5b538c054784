"""Direct reward optimisation: the score function with a quadratic pull to the anchor."""

from collections.abc import Mapping

from torch import Tensor

from rlorch.losses import policy
from rlorch.losses.record import Config, Loss, LossOutput, Option


def dro(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t m w (A lp - beta/2 (lp - p)^2) (DRO, arXiv 2405.19107, per token).

    The penalty pulls to p = `old_logprobs`, or the behaviour policy without them; it keeps p also where the
    correction anchors elsewhere, because a pull to sg(lp) would be none.
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    distance_N = tokens.logprobs_N - tokens.penalty_anchor_N
    penalty_N = 0.5 * float(config["beta"]) * distance_N * distance_N
    return policy.finish(tokens, penalty_N - tokens.advantages_N * tokens.logprobs_N, config)


LOSS = Loss(
    "dro",
    dro,
    policy.REQUIRED,
    policy.OPTIONAL,
    selector="mask",
    options=policy.COMMON | {"beta": Option(0.05, "weight of the quadratic penalty", low=0.0)},
)
