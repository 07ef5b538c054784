"""Tensors and JSON to files and back: safetensors shards, fsync, digests; no pickle.

Everything a caller is told was written is on disk. What the operating system refuses becomes a `StorageError` that
names the path.

A tensor may be in pieces: blocks of its rows, in files that several ranks wrote. Each file's own header says (under
`PIECES`) which rows of what shape its tensors are, so that any number of ranks reads just the rows it needs, whatever
number wrote them, and a tensor without such a note is whole. That is why torch.distributed.checkpoint is not used: its
metadata is a pickle, and its safetensors writer has no digests.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlorch.errors import StorageError

SHARD_BYTES = 4 << 30
"""Largest file of tensors: one shard is copied to host memory at a time."""
READ_BYTES = 1 << 22
PIECES = "pieces"
"""Key in the metadata of a safetensors file: JSON, name -> [first row, whole shape]."""

Pieces = Mapping[str, tuple[int, tuple[int, ...]]]
"""(first row, whole shape) by name, of tensors that are a block of the rows of a larger one."""
Rows = Mapping[str, tuple[int, int]]
"""(first row, number of rows) by name."""


@contextmanager
def storing(path: Path, action: str) -> Iterator[None]:
    """Turn what files do wrong into `StorageError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot {action} {path}: {error}; check free space and permissions") from error


def empty_directory(path: str) -> Path:
    """Create the directory, or take it when it is empty. Raises `StorageError` when it holds something."""
    directory = Path(path)
    with storing(directory, "create"):
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise StorageError(f"{directory} is not empty; a checkpoint needs a directory of its own")
    return directory


def write_tensors(
    directory: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
    pieces: Pieces | None = None,
) -> None:
    """Write tensors as `stem.safetensors`, or as shards with an index, under the names that transformers reads.

    With `pieces`, the tensors named there are blocks of rows of larger ones, and there is no index.
    """
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    write_stream(directory, stem, sizes, iter(tensors.items()), shard_bytes, pieces)


def write_stream(
    directory: Path,
    stem: str,
    sizes: Mapping[str, int],
    tensors: Iterator[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
    pieces: Pieces | None = None,
) -> None:
    """`write_tensors` of tensors that come one at a time, in the order of `sizes` (bytes): one shard is in memory."""
    shards = _shards(sizes, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        if pieces is None:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            write_json(directory / f"{stem}.safetensors.index.json", index)
    for name, keys in zip(names, shards, strict=True):
        part: dict[str, Tensor] = {}
        for expected in keys:
            key, tensor = next(tensors)
            assert key == expected, f"{key} came where {expected} was announced"
            part[key] = tensor.detach().cpu().contiguous()
        metadata = {"format": "pt"}
        if pieces is not None:  # one key: safetensors writes several in random order
            metadata = {PIECES: json.dumps({key: pieces[key] for key in keys if key in pieces}, sort_keys=True)}
        with storing(directory / name, "write"):
            save_file(part, directory / name, metadata=metadata)
            _sync(directory / name)


def read_tensors(directory: Path, stem: str, rows: Rows | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors of `write_tensors`, one at a time, on the CPU; of those in `rows` only these rows, put together from
    their pieces. Raises `StorageError` when pieces are missing."""
    with ExitStack() as stack, storing(directory, "read"):
        paths = sorted(directory.glob(f"{stem}*.safetensors"))
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        for key, found in _find_pieces(directory, opened).items():
            if found[0].shape == ():
                yield key, opened[found[0].path].get_tensor(key)
                continue
            start, count = (rows or {}).get(key, (0, found[0].shape[0]))
            parts: list[Tensor] = []
            for piece in found:
                first, last = max(start, piece.start), min(start + count, piece.stop)
                if first < last:
                    parts.append(opened[piece.path].get_slice(key)[first - piece.start : last - piece.start])
            if not parts:
                parts = [opened[found[0].path].get_slice(key)[:0]]
            yield key, parts[0] if len(parts) == 1 else torch.cat(parts)


def tensor_shapes(directory: Path, stem: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of `write_tensors`, pieces put together, without reading them."""
    with ExitStack() as stack, storing(directory, "read"):
        paths = sorted(directory.glob(f"{stem}*.safetensors"))
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        return {key: found[0].shape for key, found in _find_pieces(directory, opened).items()}


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows [start, stop) of a tensor of `shape`, in the file at `path`."""

    path: Path
    start: int
    stop: int
    shape: tuple[int, ...]


def _find_pieces(directory: Path, opened: Mapping[Path, Any]) -> dict[str, list[_Piece]]:
    """The pieces of every tensor, in the order of their rows, which must leave no gap."""
    found: dict[str, list[_Piece]] = {}
    for path, file in opened.items():
        noted = json.loads((file.metadata() or {}).get(PIECES, "{}"))
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            held = tuple(file.get_slice(key).get_shape())
            start, shape = noted.get(key, (0, held))
            stop = start + (held[0] if held else 1)
            found.setdefault(key, []).append(_Piece(path, start, stop, tuple(shape)))
    for key, pieces in found.items():
        pieces.sort(key=lambda piece: piece.start)
        shape = pieces[0].shape
        edges = [0, *(piece.stop for piece in pieces)]
        fits = edges[-1] == (shape[0] if shape else 1) and all(piece.shape == shape for piece in pieces)
        if not fits or [piece.start for piece in pieces] != edges[:-1]:
            raise StorageError(
                f"{directory}: {key!r} of shape {shape} is there in rows {[(p.start, p.stop) for p in pieces]}: pieces "
                "are missing or doubled, use another checkpoint"
            )
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, durably."""
    with storing(path, "write"):
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
        _sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `StorageError` when it is absent or none."""
    with storing(path, "read"):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{path} is not JSON: {error}; the checkpoint is damaged, use another one") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds no JSON object; the checkpoint is damaged, use another one")
    return value


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with the digest of the rest under `digest`, so that `read_record` notices any edit."""
    write_json(path, {**value, "digest": _record_digest(value)})


def read_record(path: Path) -> dict[str, Any]:
    """What `write_record` wrote. Raises `StorageError` when it is absent or was changed."""
    value = read_json(path)
    if value.pop("digest", None) != _record_digest(value):
        raise StorageError(f"{path} does not have its own digest: it is damaged, use another checkpoint")
    return value


def _record_digest(value: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def seal(directory: Path, pattern: str = "*") -> dict[str, str]:
    """Make the directory and the files in it that match durable; returns the xxh3-128 hex digest of each by name."""
    with storing(directory, "flush"):
        paths = sorted(path for path in directory.glob(pattern) if path.is_file())
        for path in paths:
            _sync(path)
        _sync(directory)
        return {path.name: file_digest(path) for path in paths}


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, as 32 hex digits."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def verify(directory: Path, digests: Mapping[str, str]) -> None:
    """Check files against their digests. Raises `StorageError` naming the first that is absent or differs."""
    for name, expected in digests.items():
        with storing(directory / name, "read"):
            found = file_digest(directory / name)
        if found != expected:
            raise StorageError(f"{directory / name} has digest {found}, not {expected}: it is damaged, use another one")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Sequence[Sequence[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(key)
        room -= size
    return shards


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's generators: the CPU's and the current CUDA device's."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Put back what `rng_tensors` returned, for the devices that are here."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
