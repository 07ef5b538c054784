"""Datums to micro-batches: check everything, then sort by length and cut by a token budget.

All datums of a call are laid end to end once (`Rows`), so that checks and copies are a few array operations however
many rows there are. Rows are then sorted by length, longest first, and cut so that rows x longest <= budget, and
earlier where a further pass is cheaper than padding; a row longer than the budget gets a micro-batch of its own.
Results go back by flat index, so the order never leaks out.

Several ranks take turns: `deal` cuts finer until every rank has a micro-batch in each pass, hands them out largest
first, so that those of one pass are alike, and fills up with empty ones, because all ranks must make equally many
passes.

Only *selected* positions get logits: those whose mask or weight is not 0 (all of them without a loss).

A position may have K target tokens instead of one (soft targets): then target tokens and loss inputs are [T, K], for
all datums of a call, and a position is selected when any of its K is.

B rows of a micro-batch, T tokens of its longest row, N positions end to end, K target tokens of one position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlorch.errors import UserError
from rlorch.losses import Loss
from rlorch.losses.record import Config
from rlorch.types import Datum, Floats

PASS_COST_TOKENS = {False: 128, True: 2048}
"""What one more forward and backward pass costs, in tokens of padding, by whether it runs on a GPU. Measured on the
tiny model and a CPU: 12% faster than no such cut; on a GPU kernel launches dominate up to thousands of tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """All datums of a call, end to end. `starts_B` are offsets, `selected_N` the positions that get logits. Targets and
    inputs are [N, K] where positions have K targets."""

    tokens_N: NDArray[np.int64]
    targets_N: NDArray[np.int64]
    inputs: Mapping[str, Floats]
    selected_N: NDArray[np.bool_]
    starts_B: NDArray[np.int64]
    lengths_B: NDArray[np.int64]

    def unpack(self, values_N: Floats) -> tuple[Floats, ...]:
        """One array per datum, in order, of values by position ([N] or [N, K])."""
        return tuple(np.split(values_N, self.starts_B[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One forward pass. N counts the selected positions of its rows.

    `positions_N` index the flattened [B*T] grid, `sources_N` the end-to-end layout of `Rows`; `lengths_B` are the
    selected positions per row.
    """

    tokens_BT: Tensor
    positions_N: Tensor
    targets_N: Tensor
    inputs: Mapping[str, Tensor]
    lengths_B: Tensor
    sources_N: NDArray[np.int64]


def lay_out(
    datums: Sequence[Datum], *, vocab_size: int, max_tokens: int, loss: Loss | None = None, config: Config | None = None
) -> Rows:
    """Check the datums against the model and the loss, and lay them end to end.

    Raises:
        UserError: naming the datum's index and the key: a missing key, a wrong shape, a token outside the
            vocabulary, a number that is not finite, a negative mask, a row too long for the model.
    """
    if not datums:
        raise UserError("there are no datums")
    lengths_B = np.array([_length(index, datum, max_tokens) for index, datum in enumerate(datums)])
    starts_B = np.cumsum(lengths_B) - lengths_B
    tokens_N = np.concatenate([np.asarray(datum.tokens_T) for datum in datums])
    num_targets = _num_targets(datums, loss)
    targets_N = _joined(datums, lengths_B, "target_tokens", num_targets)
    _require(starts_B, (tokens_N >= 0) & (tokens_N < vocab_size), "tokens", f"a token id outside [0, {vocab_size})")
    _require(
        starts_B, (targets_N >= 0) & (targets_N < vocab_size), "target_tokens", f"a token id outside [0, {vocab_size})"
    )
    inputs: dict[str, Floats] = {}
    selected_N = np.ones(len(tokens_N), dtype=np.bool_)
    if loss is not None:
        inputs = _loss_inputs(datums, lengths_B, loss, loss.needs(config or {}), num_targets)
        if loss.selector in inputs:
            selected_N = np.logical_or.reduce(_by_position(inputs[loss.selector] != 0), axis=1)
        for key, values_N in inputs.items():
            finite_N = np.logical_and.reduce(_by_position(np.isfinite(values_N)), axis=1)
            _require(starts_B, finite_N | ~selected_N, key, "a value that is not finite")
        if loss.selector in inputs and not loss.signed:
            _require(starts_B, inputs[loss.selector] >= 0, loss.selector, "a negative value")
    return Rows(
        tokens_N.astype(np.int64, copy=False),
        targets_N.astype(np.int64, copy=False),
        inputs,
        selected_N,
        starts_B,
        lengths_B,
    )


def cut(lengths_B: NDArray[np.int64], budget_tokens: int, pass_cost_tokens: int = 0) -> list[NDArray[np.int64]]:
    """Row indices of each micro-batch: longest rows first, rows x longest <= budget, at least one row each.

    A micro-batch also ends where the rows that would still fit are so much shorter than its longest that their
    padding would cost more than `pass_cost_tokens` (0: never).
    """
    order_B = np.argsort(-lengths_B, kind="stable")
    sorted_B = lengths_B[order_B]
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order_B):
        width = int(sorted_B[start])
        stop = min(len(order_B), start + max(1, budget_tokens // width))
        if pass_cost_tokens:
            saved_B = (width - sorted_B[start:stop]) * np.arange(stop - start, 0, -1)
            worth_B = np.flatnonzero(saved_B > pass_cost_tokens)
            stop = start + int(worth_B[0]) if len(worth_B) else stop
        batches.append(order_B[start:stop])
        start = stop
    return batches


def deal(
    rows: Rows, budget_tokens: int, pass_cost_tokens: int = 0, rank: int = 0, world: int = 1
) -> list[NDArray[np.int64]]:
    """Row indices of each micro-batch of one rank, one per pass; an empty one stands for a pass without work.

    Micro-batches without a selected position are left out. Over all ranks every other row is there once. With one rank
    these are those of `cut`, in its order.
    """
    wanted_B = np.logical_or.reduceat(rows.selected_N, rows.starts_B)

    def batches(budget: int) -> list[NDArray[np.int64]]:
        return [batch_B for batch_B in cut(rows.lengths_B, budget, pass_cost_tokens) if wanted_B[batch_B].any()]

    found = batches(budget_tokens)
    if world == 1:
        return found
    passes = -(-len(found) // world)
    low, high = 1, budget_tokens
    while low < high:  # the smallest budget that makes no more passes
        middle = (low + high) // 2
        low, high = (low, middle) if len(batches(middle)) <= passes * world else (middle + 1, high)
    found = sorted(batches(high), key=lambda batch_B: -len(batch_B) * int(rows.lengths_B[batch_B[0]]))
    found += [np.zeros(0, dtype=np.int64)] * (passes * world - len(found))
    return found[rank::world]


def micro_batches(
    rows: Rows, budget_tokens: int, device: torch.device, rank: int = 0, world: int = 1
) -> Iterator[MicroBatch]:
    """The micro-batches of one rank (see `deal`), on the device, one at a time; empty ones have N 0 and one token."""
    for batch_B in deal(rows, budget_tokens, PASS_COST_TOKENS[device.type == "cuda"], rank, world):
        lengths_B = rows.lengths_B[batch_B]
        width = int(lengths_B[0]) if len(batch_B) else 1
        row_N = np.repeat(np.arange(len(batch_B)), lengths_B)
        column_N = np.arange(len(row_N)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
        source_N = np.repeat(rows.starts_B[batch_B], lengths_B) + column_N
        keep_N = rows.selected_N[source_N]
        tokens_BT = np.zeros((max(len(batch_B), 1), width), dtype=np.int64)
        tokens_BT[row_N, column_N] = rows.tokens_N[source_N]
        kept_N = source_N[keep_N]

        def send(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        yield MicroBatch(
            tokens_BT=send(tokens_BT),
            positions_N=send((row_N * width + column_N)[keep_N]),
            targets_N=send(rows.targets_N[kept_N]),
            inputs={key: send(values_N[kept_N]) for key, values_N in rows.inputs.items()},
            lengths_B=send(np.bincount(row_N[keep_N], minlength=len(batch_B))),
            sources_N=kept_N,
        )


def _length(index: int, datum: Datum, max_tokens: int) -> int:
    """Tokens of a datum, checked."""
    shape = np.shape(datum.tokens_T)
    if len(shape) != 1 or shape[0] == 0:
        raise UserError(f"datum {index}: tokens have shape {shape}; one row of at least one token is needed")
    if shape[0] > max_tokens:
        raise UserError(f"datum {index}: {shape[0]} tokens; the model's positions end at {max_tokens}: shorten the row")
    if np.asarray(datum.tokens_T).dtype.kind not in "iu":
        raise UserError(f"datum {index}: tokens have dtype {np.asarray(datum.tokens_T).dtype}; integers are needed")
    return shape[0]


def _num_targets(datums: Sequence[Datum], loss: Loss | None) -> int | None:
    """K where positions have K target tokens, None where they have one. `_joined` checks that all datums agree."""
    shapes = [np.shape(datum.loss_inputs.get("target_tokens", ())) for datum in datums]
    soft = next(((index, shape) for index, shape in enumerate(shapes) if len(shape) == 2), None)
    if soft is None:
        return None
    index, shape = soft
    if loss is not None and not loss.soft:
        raise UserError(
            f"datum {index}: target_tokens have shape {shape}; loss {loss.name!r} takes one target per position, only "
            "cross_entropy takes several"
        )
    if shape[1] == 0:
        raise UserError(f"datum {index}: target_tokens have shape {shape}; a position needs at least one target")
    return shape[1]


def _by_position(values_N: NDArray[Any]) -> NDArray[Any]:
    """[N] or [N, K] as [N, 1] or [N, K]."""
    return values_N.reshape(len(values_N), -1)


def _joined(
    datums: Sequence[Datum], lengths_B: NDArray[np.int64], key: str, num_targets: int | None = None
) -> NDArray[Any]:
    """One loss input of all datums, end to end, shapes checked: [N], or [N, K] for `num_targets` K."""
    columns = () if num_targets is None else (num_targets,)
    arrays: list[NDArray[Any]] = []
    for index, datum in enumerate(datums):
        if key not in datum.loss_inputs:
            raise UserError(f"datum {index}: loss input {key!r} is missing; it has {sorted(datum.loss_inputs)}")
        array = np.asarray(datum.loss_inputs[key])
        if array.shape != (lengths_B[index], *columns):
            targets = f" and this call {num_targets} targets per token" if columns else ""
            raise UserError(
                f"datum {index}: loss input {key!r} has shape {array.shape}, the datum has {lengths_B[index]} tokens"
                f"{targets}"
            )
        if array.dtype.kind not in ("iu" if key == "target_tokens" else "iufb"):
            raise UserError(f"datum {index}: loss input {key!r} has dtype {array.dtype}")
        arrays.append(array)
    return np.concatenate(arrays)


def _loss_inputs(
    datums: Sequence[Datum], lengths_B: NDArray[np.int64], loss: Loss, needed: Sequence[str], num_targets: int | None
) -> dict[str, Floats]:
    """The float inputs that the loss reads. An optional key is there for all datums or for none."""
    optional = [key for key in loss.optional if key not in needed and any(key in d.loss_inputs for d in datums)]
    keys = (*needed, *optional)
    return {key: _joined(datums, lengths_B, key, num_targets).astype(np.float32, copy=False) for key in keys}


def _require(starts_B: NDArray[np.int64], good_N: NDArray[np.bool_], key: str, problem: str) -> None:
    """Raise `UserError` naming the datum and position of the first False of [N] or [N, K]."""
    good_N = np.logical_and.reduce(_by_position(good_N), axis=1)
    if good_N.all():
        return
    flat = int(np.argmin(good_N))
    index = int(np.searchsorted(starts_B, flat, side="right")) - 1
    raise UserError(f"datum {index}: {key} holds {problem} at position {flat - int(starts_B[index])}")
