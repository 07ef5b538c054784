"""Any differentiable function of log-probabilities as a training loss.

    forward -> log-probs -> L(log-probs), autograd -> w = -dL/dlp -> cross-entropy with weights w

The cross-entropy -sum w lp has, at these weights, the gradient sum (dL/dlp) dlp: the chain rule, so it is that of L
whatever L couples (tokens, rows, pairs). The model's part of the gradient is computed where the model is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlorch.errors import NonFiniteError, UserError
from rlorch.types import Datum, Floats

CustomLoss = Callable[[list[Datum], list[Tensor]], tuple[Tensor, Mapping[str, float]]]
"""`loss_fn(datums, logprobs)`: a 0-d loss and metrics. `logprobs` has one float32 tensor per datum, of the shape of its
`target_tokens` ([T], or [T, K]), at every position; a datum's own inputs (`weights`, `mask`) say which ones matter."""


@dataclass(frozen=True, slots=True, eq=False)
class Linearized:
    """A loss at given log-probs: its value, its metrics, and rows whose cross-entropy has its gradient."""

    loss: float
    metrics: Mapping[str, float]
    datums: tuple[Datum, ...]


def linearize(datums: Sequence[Datum], logprobs: Sequence[Floats], loss_fn: CustomLoss) -> Linearized:
    """The loss and the rows for a `cross_entropy` forward_backward that has exactly its gradient.

    Args:
        datums: rows; only `target_tokens` must be there.
        logprobs: what `forward` returned for them.
        loss_fn: see `CustomLoss`.

    Raises:
        UserError: the loss is not a 0-d tensor that depends on the log-probs.
        NonFiniteError: its value or gradient is not finite; names the datum.
    """
    leaves = [torch.tensor(np.asarray(values, np.float32), requires_grad=True) for values in logprobs]
    with torch.enable_grad():
        loss, metrics = loss_fn(list(datums), leaves)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
        said = f"shape {tuple(loss.shape)}, requires_grad {loss.requires_grad}" if isinstance(loss, Tensor) else loss
        raise UserError(f"a custom loss must return a 0-d tensor computed from the log-probs; this one gave {said!r}")
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    value = float(loss.detach())
    rows: list[Datum] = []
    for index, (datum, leaf, gradient) in enumerate(zip(datums, leaves, gradients, strict=True)):
        weights = -(torch.zeros_like(leaf) if gradient is None else gradient)
        if not (np.isfinite(value) and weights.isfinite().all()):
            raise NonFiniteError(
                f"the custom loss is {value} and its gradient at datum {index} is not finite everywhere; nothing was "
                "accumulated: look for log(0), division by an empty mask, or an overflowing exp in it"
            )
        targets = datum.loss_inputs["target_tokens"]
        rows.append(Datum(datum.tokens_T, {"target_tokens": targets, "weights": weights.numpy()}))
    return Linearized(value, {name: float(number) for name, number in metrics.items()}, tuple(rows))
