"""The likeliest tokens of each position, beside the target's log-probability: what distillation reads.

Chunked like `rlorch.engine.logprobs`: at most `chunk_tokens` rows of logits exist at once. No gradient.

N positions, D hidden width, V vocabulary, K tokens kept, T tokens of a row.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlorch.engine.collate import MicroBatch, lay_out, micro_batches
from rlorch.engine.logprobs import target_logprobs
from rlorch.engine.model import Head, Policy
from rlorch.errors import UserError
from rlorch.specs import TrainerSpec
from rlorch.types import Datum, ForwardResult


@torch.no_grad()
def top_k_logprobs(head: Head, hidden_ND: Tensor, k: int, chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The `k` likeliest tokens of each position, likeliest first, and their log-probabilities in nats.

    Args:
        head: the output layer.
        hidden_ND: last hidden states of the positions that predict.
        k: 1 to V.
        chunk_tokens: positions whose logits may exist at once.

    Returns:
        (token ids [N, K] int64, log-probabilities [N, K] float32).
    """
    ids: list[Tensor] = []
    values: list[Tensor] = []
    for part_ND in hidden_ND.split(chunk_tokens):
        scores_NK, ids_NK = head.logits(part_ND).log_softmax(-1).topk(k, dim=-1)
        ids.append(ids_NK)
        values.append(scores_NK)
    return torch.cat(ids), torch.cat(values)


@torch.no_grad()
def score_top_k(policy: Policy, spec: TrainerSpec, datums: Sequence[Datum], k: int) -> ForwardResult:
    """Log-probabilities of every target, as `rlorch.engine.forward.score` gives them bit for bit, and the `k` likeliest
    tokens of each position.

    Raises:
        UserError: `k` is not in [1, vocabulary], or a datum does not fit the model.
    """
    if not 1 <= k <= policy.vocab_size:
        raise UserError(f"top_k is {k}; it must be between 1 and the vocabulary's {policy.vocab_size} tokens")
    rows = lay_out(datums, vocab_size=policy.vocab_size, max_tokens=policy.max_tokens)
    num_positions = len(rows.tokens_N)
    logprobs_N = np.zeros(rows.targets_N.shape, dtype=np.float32)
    ids_NK = np.zeros((num_positions, k), dtype=np.int64)
    values_NK = np.zeros((num_positions, k), dtype=np.float32)
    group = policy.group

    def found(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        hidden_ND = policy.hidden(batch.tokens_BT).flatten(0, 1)[batch.positions_N]
        targets_N, _ = target_logprobs(policy.head, hidden_ND, batch.targets_N, spec.logprob_chunk_tokens)
        return targets_N, *top_k_logprobs(policy.head, hidden_ND, k, spec.logprob_chunk_tokens)

    with group.together("scoring"):
        for batch in micro_batches(rows, spec.micro_batch_tokens, policy.device, group.rank, group.world):
            parts = policy.run(partial(found, batch))
            for whole, part in zip((logprobs_N, ids_NK, values_NK), parts, strict=True):
                whole[batch.sources_N] = part.cpu().numpy()
        for whole in (logprobs_N, ids_NK, values_NK):
            group.add_up(whole)
    cuts = rows.starts_B[1:]
    pairs = zip(np.split(ids_NK, cuts), np.split(values_NK, cuts), strict=True)
    return ForwardResult(rows.unpack(logprobs_N), {}, tuple(pairs))
