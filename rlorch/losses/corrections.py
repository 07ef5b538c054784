"""Off-policy corrections: importance weights of what was sampled against what is trained. Pure functions.

All take detached log-ratios log(pi_train / pi_sample) of the same tokens, rows end to end, and treat them as
constants: a correction weighs a gradient, it has none of its own.

The sampler's policy differs from the trainer's for two reasons, which one ratio covers: other kernels and dtypes
(at equal weights), and older weights (asynchronous training).

N tokens of a packed micro-batch, B rows.
"""

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0
"""Log-ratios are clamped to +-20 before exp: e^20 is 4.9e8, beyond any useful ratio and far from overflow."""


def ratio(log_ratio: Tensor, clamp: float = LOG_RATIO_CLAMP) -> Tensor:
    """exp(clamp(x, -clamp, clamp)); the gradient is 0 beyond the clamp."""
    return log_ratio.clamp(-clamp, clamp).exp()


def sequence_sums(values_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum of each row: [B]. Deterministic on every device; empty rows sum to 0."""
    if values_N.numel() == 0:
        return values_N.new_zeros(lengths_B.shape)
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, initial=0.0)


def to_tokens(values_B: Tensor, lengths_B: Tensor) -> Tensor:
    """Each row's value at each of its tokens: [N]."""
    return values_B.repeat_interleave(lengths_B)


def sequence_means(values_N: Tensor, kept_N: Tensor, lengths_B: Tensor) -> Tensor:
    """Mean of each row over the tokens where `kept_N` (bool) holds: [B]; 0 for a row that keeps none."""
    total_B = sequence_sums(torch.where(kept_N, values_N, 0.0), lengths_B)
    count_B = sequence_sums(kept_N.to(values_N.dtype), lengths_B)
    return total_B / count_B.clamp(min=1.0)


def importance_ratios(log_ratio_N: Tensor, kept_N: Tensor, lengths_B: Tensor, level: str) -> Tensor:
    """Importance ratios at each token, before truncation: [N].

    Args:
        log_ratio_N: detached log(pi_train / pi_sample) of each token.
        kept_N: bool; tokens that the policy sampled.
        lengths_B: row lengths.
        level: "token", exp of the token's own log-ratio;
            "sequence", exp of the sum over the row, the exact weight of a whole trajectory; "geometric", exp of the
            mean over the row, whose scale does not depend on the length.
    """
    if level == "token":
        return ratio(log_ratio_N)
    if level == "sequence":
        total_B = sequence_sums(torch.where(kept_N, log_ratio_N, 0.0), lengths_B)
        return to_tokens(ratio(total_B), lengths_B)
    return to_tokens(ratio(sequence_means(log_ratio_N, kept_N, lengths_B)), lengths_B)


def truncated(ratio_N: Tensor, cap: float) -> Tensor:
    """min(rho, cap): truncated importance sampling (Ionides 2008; for rollout engines: Yao et al. 2025).

    Truncation bounds the variance of the gradient by the cap and biases it towards the sampler's policy only where
    the trainer thinks a token much likelier than the sampler did.
    """
    return ratio_N.clamp(max=cap)


def icepop_keeps(token_ratio_N: Tensor, threshold: float) -> Tensor:
    """Bool [N]: 1/t <= rho <= t, both ends kept (IcePop, arXiv 2510.18855: other tokens give no gradient).

    Unlike truncation it also drops tokens that the trainer thinks much *less* likely than the sampler did.
    """
    return (token_ratio_N >= 1.0 / threshold) & (token_ratio_N <= threshold)
