"""Several processes that train one model: how they meet, agree on what happened, and share weights and rows.

Every rank makes the same calls with the same arguments in the same order (SPMD), so what a call refuses is refused by
all of them before the first collective. What only one rank can see (a file, its memory) is made common by `agree`.
Anything else that fails on one rank alone leaves the others in a collective that will not come: that rank leaves the
group, the rest fail at once or after the group's timeout, and no rank accepts another call.

Weights are sharded with FSDP2 (torch.distributed.fsdp.fully_shard; ZeRO stage 3, arXiv 1910.02054; PyTorch FSDP, arXiv
2304.11277): one group of parameters per decoder layer, the rest (embedding, last norm, head) with the root, so that
tied embeddings are one parameter of one group. A rank holds a contiguous block of each parameter's rows. Gradients
are *summed* over ranks (divide factor 1), which is what a sum-loss needs and exact for any number of ranks.

Loading holds the whole model once per rank in host memory; it is checked there, then sharded layer by layer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # the public API has no such thing

from rlorch import errors
from rlorch.errors import ConfigError, ModelError, RlorchError
from rlorch.specs import Ranks

T = TypeVar("T")


class Group:
    """The ranks of one model, seen from one of them. A group of one does nothing."""

    def __init__(self, rank: int = 0, world: int = 1, mesh: DeviceMesh | None = None) -> None:
        self.rank = rank
        self.world = world
        self.mesh = mesh
        self._broken: str | None = None

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A call that all ranks make. A `RlorchError` inside is raised by all of them alike and passes.

        Raises:
            RlorchError: naming this rank, when anything else goes wrong; the group is of no use any more.
        """
        if self.world == 1:
            yield
            return
        if self._broken is not None:
            raise RlorchError(f"rank {self.rank} of {self.world}: {what} after {self._broken}; start the ranks again")
        try:
            yield
        except RlorchError:
            raise
        except Exception as error:
            self._broken = f"{what} failed ({type(error).__name__}: {error})"
            self._abort()
            raise RlorchError(
                f"rank {self.rank} of {self.world}: {self._broken}; a rank that loses a connection or waits in vain is "
                "not the one that failed first: look at the others' logs, then start the ranks again"
            ) from error

    def exchange(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank."""
        if self.world == 1:
            return [value]
        data = json.dumps(value).encode()
        sizes = self._gathered(torch.tensor([len(data)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = self._gathered(padded)
        return [json.loads(bytes(part[: int(size)].numpy())) for part, size in zip(parts, sizes, strict=True)]

    def agree(self, action: Callable[[], Any]) -> list[Any]:
        """Let every rank act (and return JSON), and return what all of them returned, by rank.

        Raises:
            RlorchError: on every rank, the error of the lowest rank that had one, class and message kept.
        """
        if self.world == 1:
            return [action()]
        outcome: dict[str, Any] = {}
        try:
            outcome["value"] = action()
        except RlorchError as error:
            outcome["error"] = [type(error).__name__, str(error)]
        outcomes = self.exchange(outcome)
        for each in outcomes:
            if "error" in each:
                kind, message = each["error"]
                raise getattr(errors, kind, RlorchError)(message)
        return [each["value"] for each in outcomes]

    def add_up(self, array: NDArray[Any]) -> None:
        """Sum an array over ranks, in place. Exact where one rank alone has a value that is not 0."""
        if self.world > 1:
            dist.all_reduce(torch.from_numpy(array))

    def collect(self, array: NDArray[Any], counts: list[int]) -> NDArray[Any] | None:
        """The flat arrays of all ranks end to end, on rank 0; None elsewhere. `counts` are their lengths, by rank."""
        if self.world == 1:
            return array
        if self.rank > 0:
            if counts[self.rank]:
                dist.send(_bytes(np.ascontiguousarray(array)), dst=0)
            return None
        whole = np.empty(sum(counts), array.dtype)
        whole[: counts[0]] = array
        start = counts[0]
        for rank, count in enumerate(counts[1:], start=1):
            if count:
                dist.recv(_bytes(whole[start : start + count]), src=rank)
            start += count
        return whole

    def close(self) -> None:
        """Leave. Idempotent; no calls after it."""
        if self.world > 1 and self._broken is None:
            self._broken = "it was closed"
            dist.destroy_process_group()

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return parts

    def _abort(self) -> None:
        """Close the connections, so that ranks that wait for this one need not wait for the timeout."""
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()


SOLO = Group()
"""One process."""


def join(ranks: Ranks, device: torch.device, timeout_s: float) -> tuple[Group, torch.device]:
    """Meet the other ranks; returns the group and the device of this rank.

    Control messages and files go over gloo; on GPUs weights and gradients go over NCCL.

    Raises:
        RlorchError: not all ranks came within `timeout_s`.
    """
    if ranks.world == 1:
        return SOLO, device
    if device.type == "cuda":
        index = device.index if device.index is not None else ranks.rank % torch.cuda.device_count()
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method=ranks.init_method,
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=timeout_s),
        )
        mesh = init_device_mesh(device.type, (ranks.world,))
    except (RuntimeError, ValueError) as error:
        raise RlorchError(
            f"rank {ranks.rank} of {ranks.world} did not meet the others at {ranks.init_method}: {error}; check that "
            "all ranks were started and reach each other"
        ) from error
    return Group(ranks.rank, ranks.world, mesh), device


def check_ranks(wanted: int, ranks: Ranks | None) -> Ranks:
    """The place of this process. Raises `ConfigError` when `trainer.ranks` says another number of ranks."""
    place = ranks or Ranks()
    if place.world != wanted:
        raise ConfigError(
            f"trainer.ranks = {wanted}, but here the trainer has {place.world} processes; only the Ray runtime starts "
            "several: set runtime to ray, or trainer.ranks to 1"
        )
    return place


# --- shards -----------------------------------------------------------------------------------------------


def shard(model: Any, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard a model over the ranks, in place; its parameters become DTensors of float32 on the mesh's device.

    Afterwards `model.run_part(call)` calls with the root's own parameters gathered, as `forward` would.

    Raises:
        ModelError: the model has no decoder layers that could be sharded one by one.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layers = _decoder_layers(model)
    for module in (*layers, model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # holds for this module's own parameters only
        sharded.set_force_sum_reduction_for_comms(True)
    model.run_part = _call
    register_fsdp_forward_method(model, "run_part")


def _call(call: Callable[[], T]) -> T:
    return call()


def _decoder_layers(model: Any) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = next(([*found] for found in lists if found and type(found[0]).__name__ in names), [])
    if not layers:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers to shard: set trainer.ranks to 1")
    return layers


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, start + rows) of a tensor of `shape`: what this rank holds of it. A scalar has one row.

    `counts` are the elements that each rank holds, by rank, in the order of the rows.
    """

    shape: tuple[int, ...]
    start: int
    rows: int
    counts: list[int]

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))


def part_of(tensor: Tensor, group: Group) -> Part:
    """What this rank holds of a tensor. One that is not sharded belongs to rank 0.

    Raises:
        ModelError: it is sharded, but not by rows.
    """
    shape = tuple(tensor.shape)
    rows = shape[0] if shape else 1
    if not isinstance(tensor, DTensor):
        counts = [tensor.numel()] + [0] * (group.world - 1)
        return Part(shape, 0, rows if group.rank == 0 else 0, counts)
    if not all(placement.is_shard(0) for placement in tensor.placements):
        raise ModelError(
            f"a tensor of shape {shape} is not sharded by rows, so several ranks cannot export it: set trainer.ranks "
            "to 1"
        )
    size, offset = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    block = -(-rows // group.world)  # as torch.chunk cuts
    held = [min(block, max(0, rows - rank * block)) for rank in range(group.world)]
    assert size[0] == held[group.rank], f"rank {group.rank} holds {size[0]} of {rows} rows, not {held[group.rank]}"
    each = int(np.prod(shape[1:], dtype=np.int64))
    return Part(shape, min(offset[0], rows), size[0], [count * each for count in held])


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, as an alias; all of one that is not sharded."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def like(tensor: Tensor, rows: Tensor) -> Tensor:
    """A tensor of this rank's `rows`, laid out as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return rows
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _bytes(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
