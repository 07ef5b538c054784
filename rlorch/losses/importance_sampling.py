"""Importance-sampled policy gradient, without clipping."""

from collections.abc import Mapping

from torch import Tensor

from rlorch.losses import corrections, policy
from rlorch.losses.record import Config, Loss, LossOutput, Option


def importance_sampling(
    logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config
) -> LossOutput:
    """L = -sum_t m w r A with r = exp(clamp(lp - o, +-ratio_log_cap)).

    Plain: r = exp(lp - q) and w = 1, gradient -r A dlp. With `tis_cap` c and no `old_logprobs`: r = 1 and
    w = min(exp(sg(lp) - q), c), gradient -min(rho, c) A dlp: token-level truncated importance sampling, the standard
    correction of REINFORCE with one optimizer step per batch. `rlorch.losses.policy` has the other cases.
    """
    tokens = policy.prepare(logprobs_N, inputs, lengths_B, config)
    ratio_N = corrections.ratio(tokens.log_ratio(), float(config["ratio_log_cap"]))
    return policy.finish(tokens, -ratio_N * tokens.advantages_N, config)


LOSS = Loss(
    "importance_sampling",
    importance_sampling,
    policy.REQUIRED,
    policy.OPTIONAL,
    selector="mask",
    options=policy.COMMON
    | {
        "ratio_log_cap": Option(
            corrections.LOG_RATIO_CLAMP, "clamp of the policy log-ratio", low=1e-3, high=corrections.LOG_RATIO_CLAMP
        )
    },
)
