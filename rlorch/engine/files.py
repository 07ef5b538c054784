"""Tensors and JSON to files and back: safetensors shards, fsync, digests; no pickle.

Everything a caller is told was written is on disk. What the operating system refuses becomes a `StorageError` that
names the path.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def write_tensors(directory: Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `stem.safetensors`, or as shards with an index, under the names that transformers reads."""
    shards = _shards(tensors, shard_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        write_json(
            directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
    for name, keys in zip(names, shards, strict=True):
        part = {key: tensors[key].detach().cpu().contiguous() for key in keys}
        with storing(directory / name, "write"):
            save_file(part, directory / name, metadata={"format": "pt"})
            _sync(directory / name)


def read_tensors(directory: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of `write_tensors`, one at a time, on the CPU."""
    for path in sorted(directory.glob(f"{stem}*.safetensors")):
        with storing(path, "read"), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield key, file.get_tensor(key)


def tensor_shapes(directory: Path, stem: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of `write_tensors`, without reading them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(directory.glob(f"{stem}*.safetensors")):
        with storing(path, "read"), safe_open(path, framework="pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


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


def seal(directory: Path) -> dict[str, str]:
    """Make the directory and every file in it durable; returns the xxh3-128 hex digest of each by name."""
    with storing(directory, "flush"):
        paths = sorted(path for path in directory.iterdir() if path.is_file())
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


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Sequence[Sequence[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
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
