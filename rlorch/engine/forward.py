"""The forward pass that the trainer and the reference share: datums in, target log-probabilities out.

Both use this code, this dtype and these micro-batches, so at equal weights their log-probabilities are equal bit for
bit and the KL between them is exactly 0.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rlorch.engine.collate import MicroBatch, lay_out, micro_batches
from rlorch.engine.logprobs import target_logprobs
from rlorch.engine.model import Policy
from rlorch.specs import TrainerSpec
from rlorch.types import Datum, Floats


@torch.no_grad()
def score(policy: Policy, spec: TrainerSpec, datums: Sequence[Datum]) -> tuple[Floats, ...]:
    """Log-probabilities of every target: one float32 array of length T per datum, in order.

    Raises:
        UserError: a datum that does not fit the model.
    """
    rows = lay_out(datums, vocab_size=policy.vocab_size, max_tokens=policy.max_tokens)
    group = policy.group
    logprobs_N = np.zeros(rows.targets_N.shape, dtype=np.float32)

    def values(batch: MicroBatch) -> Tensor:
        hidden_ND = policy.hidden(batch.tokens_BT).flatten(0, 1)[batch.positions_N]
        return target_logprobs(policy.head, hidden_ND, batch.targets_N, spec.logprob_chunk_tokens)[0]

    with group.together("scoring"):
        for batch in micro_batches(rows, spec.micro_batch_tokens, policy.device, group.rank, group.world):
            logprobs_N[batch.sources_N] = policy.run(partial(values, batch)).cpu().numpy()
        group.add_up(logprobs_N)
    return rows.unpack(logprobs_N)
