"""Training on any differentiable loss of log-probabilities, over the Trainer port.

    forward -> log-probs -> loss_fn and its gradient, here -> cross_entropy with weights -dL/dlp -> the exact gradient

The trainer may be anywhere: the loss function runs in this process and couples whatever it likes (tokens, rows, pairs).
It costs one forward pass more than a built-in loss. `rlorch.losses.custom` has the arithmetic.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlorch.ports import Trainer
from rlorch.types import Datum, LossSpec

if TYPE_CHECKING:
    from rlorch.losses.custom import CustomLoss, Linearized


async def forward_backward_custom(
    trainer: Trainer, datums: Sequence[Datum], loss_fn: "CustomLoss"
) -> Mapping[str, float]:
    """Add the gradient of `loss_fn(datums, logprobs)` to what the trainer has accumulated.

    The loss is taken as it is: step with normalization "none" when it is a mean already.

    Returns:
        `loss`, `num_loss_tokens` (positions with a gradient), and what the loss function measured.

    Raises:
        UserError: the loss is not a 0-d tensor that depends on the log-probs.
        NonFiniteError: its value or gradient is not finite; nothing was accumulated.
    """
    linear = await _linearized(trainer, datums, loss_fn)
    done = await trainer.forward_backward(linear.datums, LossSpec("cross_entropy"))
    return {**linear.metrics, "loss": linear.loss, "num_loss_tokens": done.metrics["num_loss_tokens:sum"]}


async def evaluate_custom(trainer: Trainer, datums: Sequence[Datum], loss_fn: "CustomLoss") -> Mapping[str, float]:
    """`loss`, and what the loss function measured, under the current weights; trains nothing. Raises as above."""
    linear = await _linearized(trainer, datums, loss_fn)
    return {**linear.metrics, "loss": linear.loss}


async def _linearized(trainer: Trainer, datums: Sequence[Datum], loss_fn: "CustomLoss") -> "Linearized":
    from rlorch.losses.custom import linearize

    logprobs = (await trainer.forward(datums)).logprobs
    return await asyncio.to_thread(linearize, datums, logprobs, loss_fn)
