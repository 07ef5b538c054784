"""What the teacher says about sequences, as rows for a loss, and how far the student is from it.

T positions of a row, K likeliest tokens of a position.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlorch.ports import Reference
from rlorch.recipes.distill.config import DistillConfig
from rlorch.types import Datum, Floats


async def teacher_targets(teacher: Reference, sequences: Sequence[Datum], config: DistillConfig) -> list[Datum]:
    """Rows for the objective's loss, from rows with `mask` (1 where a token is learned) and, for `reverse_kl`, the
    student's `logprobs`."""
    if config.objective == "reverse_kl":
        return reverse_kl_rows(sequences, await teacher.logprobs(sequences), center=config.center)
    top_k = (await teacher.top_k(sequences, config.top_k)).top_k
    assert top_k is not None, "a top_k call without top_k"
    return [_soft(datum, *likeliest) for datum, likeliest in zip(sequences, top_k, strict=True)]


def reverse_kl_rows(sequences: Sequence[Datum], teacher: Sequence[Floats], *, center: bool) -> list[Datum]:
    """Sampled rows with `advantages`: by how much the teacher (`ref_logprobs`) likes a token more than the student did,
    less the mean of that over all tokens of the call when `center`."""
    gains = [scores_T - datum.loss_inputs["logprobs"] for datum, scores_T in zip(sequences, teacher, strict=True)]
    masks = [datum.loss_inputs["mask"] for datum in sequences]
    sampled = max(sum(float(mask_T.sum()) for mask_T in masks), 1.0)
    total = sum(float((mask_T * gain_T).sum()) for mask_T, gain_T in zip(masks, gains, strict=True))
    baseline = np.float32(total / sampled if center else 0.0)
    return [
        Datum(
            datum.tokens_T,
            {**datum.loss_inputs, "ref_logprobs": scores_T, "advantages": mask_T * (gain_T - baseline)},
        )
        for datum, scores_T, mask_T, gain_T in zip(sequences, teacher, masks, gains, strict=True)
    ]


def _soft(datum: Datum, ids_TK: NDArray[np.int64], logprobs_TK: Floats) -> Datum:
    """The teacher's likeliest tokens as targets, their probabilities, scaled to sum to 1, as weights."""
    shares_TK = np.exp(logprobs_TK - logprobs_TK.max(1, keepdims=True))
    shares_TK /= shares_TK.sum(1, keepdims=True)
    weights_TK = shares_TK * datum.loss_inputs["mask"][:, None]
    return Datum(datum.tokens_T, {"target_tokens": ids_TK, "weights": weights_TK.astype(np.float32)})


def divergence(datums: Sequence[Datum], logprobs: Sequence[Floats]) -> float:
    """Nats per learned token between student and teacher, given the student's log-probs of the targets.

    Soft targets: sum_k w_k (log w_k - log student_k), which counts what the student puts outside the K tokens too.
    Sampled tokens: the estimate mean(log student - log teacher), with the log-probs that the tokens were sampled by.
    """
    total = count = 0.0
    for datum, lp in zip(datums, logprobs, strict=True):
        inputs = datum.loss_inputs
        if "weights" in inputs:
            weights_TK = inputs["weights"].astype(np.float64)
            known = weights_TK > 0
            total += float((weights_TK[known] * (np.log(weights_TK[known]) - lp[known])).sum())
            count += float(known.any(1).sum())
        else:
            total += float((inputs["mask"] * (inputs["logprobs"] - inputs["ref_logprobs"])).sum())
            count += float(inputs["mask"].sum())
    return total / max(count, 1.0)
