"""Log-probabilities of target tokens, in chunks: at most `chunk_tokens` rows of logits exist at once.

One float32 row of logits of a 152k vocabulary takes 0.6 MB, so 8192 positions would take 5 GB, several times over with
softmax and gradient. Each chunk is checkpointed: the backward pass computes its logits again, so memory is bounded
there too, for one more product with the output layer. A single chunk is within the bound as it is and not recomputed.

N positions, D hidden width, V vocabulary, K target tokens of one position.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlorch.engine.model import Head


def target_logprobs(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, chunk_tokens: int, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, in nats, float32, with gradient to `hidden_ND` and the head where enabled.

    Args:
        head: the output layer.
        hidden_ND: last hidden states of the positions that predict.
        targets_N: int64 token ids; also [N, K], for K targets at each position.
        chunk_tokens: positions whose logits may exist at once.
        with_entropy: also the entropy of each position's distribution, in nats, without gradient.

    Returns:
        (logprobs_N, of the shape of the targets; entropy_N or None).
    """
    starts = range(0, max(hidden_ND.shape[0], 1), chunk_tokens)
    entropies: list[Tensor | None] = [None] * len(starts)

    def chunk(hidden_ND: Tensor, targets_N: Tensor, index: int) -> Tensor:
        scores_NV = head.logits(hidden_ND).log_softmax(-1)
        if with_entropy and entropies[index] is None:  # None only in the first pass, not when recomputed
            entropies[index] = _entropy(scores_NV.detach())
        columns_NK = targets_N if targets_N.ndim == 2 else targets_N.unsqueeze(-1)
        return scores_NV.gather(-1, columns_NK).view_as(targets_N)

    recompute = len(starts) > 1 and torch.is_grad_enabled()
    pieces: list[Tensor] = []
    for index, start in enumerate(starts):
        part = slice(start, start + chunk_tokens)
        arguments = (hidden_ND[part], targets_N[part], index)
        if recompute:
            pieces.append(checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False))  # pyright: ignore[reportArgumentType]
        else:
            pieces.append(chunk(*arguments))
    return torch.cat(pieces), torch.cat([e for e in entropies if e is not None]) if with_entropy else None


def _entropy(scores_NV: Tensor) -> Tensor:
    """-sum p log p of each row of log-probabilities; a row may hold -inf."""
    return torch.special.entr(scores_NV.exp()).sum(-1)
