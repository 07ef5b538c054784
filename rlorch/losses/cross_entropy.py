"""Weighted negative log-likelihood."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlorch.losses.record import Config, Loss, LossOutput


def cross_entropy(logprobs_N: Tensor, inputs: Mapping[str, Tensor], lengths_B: Tensor, config: Config) -> LossOutput:
    """L = -sum_t w_t lp_t; with K targets per position, -sum_t sum_k w_tk lp_tk (soft targets).

    `weights` may be any real number, negative too: a custom loss C sends w = -dC/dlp and gets exactly its gradient
    (`rlorch.losses.custom`). Absent weights are 1. `num_loss_tokens` counts positions with a weight that is not 0.
    """
    del lengths_B, config
    weights_N = inputs.get("weights")
    weights_N = torch.ones_like(logprobs_N) if weights_N is None else weights_N
    counted_N = weights_N != 0
    loss = -(weights_N * torch.where(counted_N, logprobs_N, 0.0)).sum()
    positions_N = counted_N if counted_N.ndim == 1 else counted_N.any(-1)
    count = positions_N.sum().to(logprobs_N.dtype)
    return LossOutput(loss, {"loss:sum": loss.detach(), "num_loss_tokens:sum": count})


LOSS = Loss(
    "cross_entropy", cross_entropy, required=(), optional=("weights",), selector="weights", signed=True, soft=True
)
