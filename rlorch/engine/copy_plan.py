"""Where each checkpoint tensor lives inside a running model: blocks to read and to write it in place.

An engine fuses, pads and ties what a checkpoint keeps apart (q, k, v in one matrix), so a delta that names checkpoint
tensors cannot be added to its parameters by name. The model's own `load_weights` knows the way, and is asked once per
tensor: it runs under a dispatch mode that records each `copy_` into a parameter as blocks (source offset, destination
offset, count) and does not perform it. From then on a sparse delta is one gather, XOR and scatter per parameter,
O(changed), and a tensor can be read back bit for bit from the live parameters.

Invariants: the blocks of a tensor cover it exactly once; no two tensors share a destination; between them they cover
every parameter (`check`). A tensor whose copy is not a plain move of bits (cast, transposed, computed, sharded)
has no blocks but a reason, and its owner reloads it whole.

P elements of a tensor, K changed elements.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from rlorch.errors import ModelError

Bits = NDArray[np.unsignedinteger[Any]]
LoadWeights = Callable[[Iterable[tuple[str, torch.Tensor]]], object]

SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The torch integer type that holds an element's bits, by bytes per element."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MAX_BLOCKS = 1 << 16
"""A copy of more pieces than this (a transpose) is cheaper to repeat than to follow."""


@dataclass(frozen=True, slots=True)
class Block:
    """`count` elements from flat index `source` of a tensor live at element `destination` of storage `home`."""

    home: int
    source: int
    destination: int
    count: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where one checkpoint tensor lives: `blocks` in source order, or (`blocks` empty) the `reason` why not."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: tuple[Block, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Scatter:
    """A sparse XOR, resolved and moved to the device: per storage, distinct element indices and the bits to XOR."""

    parts: tuple[tuple[int, torch.Tensor, torch.Tensor], ...]


@dataclass(slots=True, eq=False)
class _Home:
    """One parameter's storage as a flat tensor of bits. `names` are all the parameters in it (tied ones share)."""

    bits_P: torch.Tensor
    dtype: torch.dtype
    names: list[str]
    padding: int = 0
    reloaded: bool = False


class CopyPlan:
    """The blocks of every traced tensor over one model's live parameters. Not thread-safe against writers."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], load_weights: LoadWeights) -> None:
        """Take the parameters by name (aliases included) and the model's loader.

        Raises:
            ModelError: a parameter is empty: the engine packed its weights away, so that nothing can be updated.
        """
        self._load_weights = load_weights
        self._homes: list[_Home] = []
        self._home_of: dict[int, int] = {}
        self.tensors: dict[str, TensorPlan] = {}
        if empty := [name for name, parameter in parameters.items() if not parameter.numel()]:
            raise ModelError(f"parameters {empty[:4]} are empty: their weights were packed away and cannot be updated")
        for name, parameter in parameters.items():
            self._add_home(name, parameter)

    def _add_home(self, name: str, parameter: torch.Tensor) -> None:
        storage = parameter.untyped_storage()
        if (number := self._home_of.get(storage.data_ptr())) is not None:
            self._homes[number].names.append(name)
            return
        data = parameter.detach()
        flat = data.as_strided((storage.nbytes() // data.element_size(),), (1,), 0)
        self._home_of[storage.data_ptr()] = len(self._homes)
        self._homes.append(_Home(flat.view(SIGNED[data.element_size()]), data.dtype, [name]))

    # --- tracing ------------------------------------------------------------------------------------------

    def trace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorPlan:
        """Find the tensor's blocks by running the model's loader on it once; no parameter is written but padding.

        Raises:
            ModelError: the loader refuses the tensor, or ignores it.
        """
        if name in self.tensors:
            return self.tensors[name]
        source = torch.empty(shape, dtype=dtype)
        recorder = _Recorder(self._home_number, source)
        with recorder, torch.no_grad():
            try:
                self._load_weights([(name, source)])
            except (ValueError, KeyError, AssertionError, RuntimeError) as error:
                raise ModelError(f"the engine cannot load tensor {name!r} of shape {shape}: {error!r}") from error
        for number, count in recorder.filled:
            self._homes[number].padding += count
        blocks, reason = recorder.blocks, recorder.reason
        if not blocks and not reason:
            raise ModelError(f"the engine ignores tensor {name!r}: it is tied to another one or unknown; leave it out")
        if not reason and not _covers_once(blocks, source.numel()):
            reason = "its copies do not cover it exactly once"
        if reason:
            for number in recorder.touched:
                self._homes[number].reloaded = True
        plan = TensorPlan(name, shape, dtype, () if reason else tuple(blocks), reason)
        self.tensors[name] = plan
        return plan

    def check(self) -> None:
        """Check that the traced tensors own every element of every parameter once.

        Raises:
            ModelError: two tensors share memory (tied weights published twice), or nobody writes a parameter.
        """
        spans = sorted(
            (block.home, block.destination, block.destination + block.count, plan.name)
            for plan in self.tensors.values()
            for block in plan.blocks
        )
        for (home, _, stop, name), (next_home, start, _, other) in pairwise(spans):
            if home == next_home and start < stop:
                raise ModelError(f"tensors {name!r} and {other!r} share memory in the engine: publish only one of them")
        written = [home.padding for home in self._homes]
        for number, start, stop, _ in spans:
            written[number] += stop - start
        for home, count in zip(self._homes, written, strict=True):
            if count != home.bits_P.numel() and not home.reloaded:
                raise ModelError(
                    f"parameter {home.names[0]!r}: published tensors cover {count} of its {home.bits_P.numel()} "
                    "elements; the anchor lacks a tensor"
                )

    def _home_number(self, tensor: torch.Tensor) -> int | None:
        return self._home_of.get(tensor.untyped_storage().data_ptr())

    def is_tied(self, name: str) -> bool:
        """Whether the model knows the tensor's memory by several names: an embedding that is also the head."""
        return any(len(self._homes[block.home].names) > 1 for block in self.tensors[name].blocks)

    # --- reading and writing, in place --------------------------------------------------------------------

    def read(self, name: str) -> Bits:
        """The tensor's live bits, flat. On CPU a tensor of one block is a view: copy it before a write."""
        plan = self.tensors[name]
        parts = [self._homes[b.home].bits_P[b.destination : b.destination + b.count] for b in plan.blocks]
        bits_P = parts[0] if len(parts) == 1 else torch.cat(parts)
        return bits_P.cpu().numpy().view(UNSIGNED[bits_P.element_size()])

    def write(self, name: str, bits_P: Bits) -> None:
        """Overwrite the tensor."""
        for target, source in self._pairs(name, bits_P):
            target.copy_(source)

    def xor_dense(self, name: str, bits_P: Bits) -> None:
        """XOR the whole tensor. Its own inverse."""
        for target, source in self._pairs(name, bits_P):
            target.bitwise_xor_(source.to(target.device))

    def _pairs(self, name: str, bits_P: Bits) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        source_P = _signed(bits_P)
        for b in self.tensors[name].blocks:
            target = self._homes[b.home].bits_P[b.destination : b.destination + b.count]
            yield target, source_P[b.source : b.source + b.count]

    def scatter(self, changes: Sequence[tuple[str, NDArray[np.int64], Bits]]) -> Scatter:
        """Resolve sparse changes (tensor, flat indices_K, xor_K) and move them to the device in one transfer.

        Reads no parameter, so that it can run beside the engine.
        """
        groups: dict[tuple[torch.device, int], list[tuple[int, NDArray[np.int64], Bits]]] = {}
        for name, index_K, xor_K in changes:
            for number, destination_K, chosen_K in self._destinations(name, index_K, xor_K):
                bits_P = self._homes[number].bits_P
                groups.setdefault((bits_P.device, bits_P.element_size()), []).append((number, destination_K, chosen_K))
        parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        for (device, _), pieces in groups.items():
            indices = torch.from_numpy(np.concatenate([piece[1] for piece in pieces])).to(device)
            values = _signed(np.concatenate([piece[2] for piece in pieces])).to(device)
            start = 0
            for number, destination_K, _ in pieces:
                stop = start + len(destination_K)
                parts.append((number, indices[start:stop], values[start:stop]))
                start = stop
        return Scatter(tuple(parts))

    def _destinations(
        self, name: str, index_K: NDArray[np.int64], xor_K: Bits
    ) -> Iterable[tuple[int, NDArray[np.int64], Bits]]:
        blocks = self.tensors[name].blocks
        if len(blocks) == 1:
            yield blocks[0].home, index_K + (blocks[0].destination - blocks[0].source), xor_K
            return
        starts = np.array([block.source for block in blocks])
        shifts = np.array([block.destination - block.source for block in blocks])
        homes = np.array([block.home for block in blocks])
        block_K = np.searchsorted(starts, index_K, side="right") - 1
        for number in np.unique(homes[block_K]):
            chosen = homes[block_K] == number
            yield int(number), index_K[chosen] + shifts[block_K[chosen]], xor_K[chosen]

    def apply(self, scatter: Scatter) -> None:
        """XOR a scatter into the live parameters: O(changed). Its own inverse."""
        for number, index_K, xor_K in scatter.parts:
            bits_P = self._homes[number].bits_P
            bits_P.index_copy_(0, index_K, bits_P.index_select(0, index_K).bitwise_xor_(xor_K))


@dataclass(eq=False)
class _Record:
    blocks: list[Block] = field(default_factory=list[Block])
    filled: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    touched: set[int] = field(default_factory=set[int])
    reason: str = ""


class _Recorder(TorchDispatchMode):
    """Records copies from one source tensor into parameters instead of performing them; other calls run."""

    def __init__(self, home_number: Callable[[torch.Tensor], int | None], source: torch.Tensor) -> None:
        super().__init__()
        self._home_number = home_number
        self._source = source.untyped_storage().data_ptr()
        self._record = _Record()

    @property
    def blocks(self) -> list[Block]:
        """Copies, in source order."""
        return sorted(self._record.blocks, key=lambda block: block.source)

    @property
    def filled(self) -> list[tuple[int, int]]:
        """(storage, elements) that were filled with a constant: padding."""
        return self._record.filled

    @property
    def touched(self) -> set[int]:
        """Every storage that was written."""
        return self._record.touched

    @property
    def reason(self) -> str:
        """Why the tensor cannot be followed; empty if it can."""
        return self._record.reason

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record `copy_`, note other writes to parameters, run everything else."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if not written or not isinstance(value, torch.Tensor) or (home := self._home_number(value)) is None:
                continue
            self._record.touched.add(home)
            if func is torch.ops.aten.copy_.default:
                self._copied(home, value, args[1])
                return value
            if func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
                self._record.filled.append((home, value.numel()))
            else:
                self._record.reason = f"it is written by {func}"
        return func(*args, **(kwargs or {}))

    def _copied(self, home: int, target: torch.Tensor, source: torch.Tensor) -> None:
        if source.untyped_storage().data_ptr() != self._source:
            self._record.reason = "it is computed before it is copied"
        elif source.dtype != target.dtype:
            self._record.reason = f"it is cast from {source.dtype} to {target.dtype}"
        elif (pieces := _pieces(target, source)) is None:
            self._record.reason = "it is transposed or broadcast"
        else:
            self._record.blocks += [Block(home, start, destination, count) for destination, start, count in pieces]


def _pieces(target: torch.Tensor, source: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """The runs (destination, source, count) of a copy between two views, contiguous on both sides."""
    if target.shape != source.shape:
        if target.numel() != source.numel() or not (target.is_contiguous() and source.is_contiguous()):
            return None
        return [(int(target.storage_offset()), int(source.storage_offset()), target.numel())]
    axes = [axis for axis in zip(target.shape, target.stride(), source.stride(), strict=True) if axis[0] != 1]
    run = 1
    while axes and axes[-1][1] == axes[-1][2] == run:
        run *= axes.pop()[0]
    destinations, sources = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for size, target_stride, source_stride in axes:
        if len(sources) * size > MAX_BLOCKS:
            return None
        steps = np.arange(size)
        destinations = (destinations[:, None] + steps * target_stride).reshape(-1)
        sources = (sources[:, None] + steps * source_stride).reshape(-1)
    return [
        (int(target.storage_offset()) + int(destination), int(source.storage_offset()) + int(start), run)
        for destination, start in zip(destinations, sources, strict=True)
    ]


def _covers_once(blocks: Sequence[Block], size: int) -> bool:
    end = 0
    for block in blocks:
        if block.source != end:
            return False
        end += block.count
    return end == size


def _signed(bits: Bits) -> torch.Tensor:
    """Numpy bits as a flat torch integer tensor that shares their memory where it may be written."""
    flat = np.ascontiguousarray(bits).reshape(-1)
    return torch.from_numpy((flat if flat.flags.writeable else flat.copy()).view(f"i{flat.itemsize}"))
