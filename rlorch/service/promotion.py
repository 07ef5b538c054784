"""Model directories made of checkpoints: files in, files out; synchronous, and without torch.

A base snapshot holds every tensor under its checkpoint name, so its bits go into safetensors files as they are; config
and tokenizer are those of the base model, with the dtype of the bits. A directory appears under its name whole, or not
at all.

safetensors: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, [begin, end) in the
data), the data (https://github.com/huggingface/safetensors#format).
"""

import json
import shutil
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rlorch.checkpoint.files import partial_directory, publish, sync_tree
from rlorch.checkpoint.manifest import MANIFEST_NAME
from rlorch.errors import DigestMismatchError, StorageError
from rlorch.types import Manifest, TensorEntry
from rlorch.weights.codec import iter_update
from rlorch.weights.manifest import digest, tensor_bytes

SHARD_BYTES = 4 << 30
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


def write_base(
    model_dir: Path, anchor: Manifest, payload: bytes, target: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the model directory `target` from a base snapshot and its payload.

    Args:
        model_dir: the base model, for config and tokenizer.
        anchor: the manifest of the snapshot.
        payload: what the store has under `anchor.payload`.
        target: replaced if there.
        shard_bytes: largest file of weights, a tensor that is larger by itself apart.

    Raises:
        DigestMismatchError: payload and manifest disagree.
        StorageError: the files cannot be read or written.
    """
    with _whole_directory(target) as directory:
        for path in sorted(model_dir.iterdir()):
            if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
                shutil.copyfile(path, directory / path.name)
        _write_dtype(directory / "config.json", anchor.tensors)
        _write_weights(directory, anchor, payload, shard_bytes)


def copy_directory(source: Path, target: Path) -> None:
    """Copy a saved adapter or merged model to `target`, less the checkpoint's manifest. Raises `StorageError`."""
    with _whole_directory(target) as directory:
        shutil.copytree(source, directory, ignore=shutil.ignore_patterns(MANIFEST_NAME), dirs_exist_ok=True)


@contextmanager
def _whole_directory(target: Path) -> Generator[Path]:
    """A directory to fill that gets its name at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_directory(target.parent, target.name) as directory:
            yield directory
            sync_tree(directory)
            publish(directory, target)
    except OSError as error:
        raise StorageError(f"model {target} could not be written: {error}; check free space and rights") from error


def _write_dtype(config_path: Path, entries: Sequence[TensorEntry]) -> None:
    """Say in the config which dtype most of the weights have."""
    config = json.loads(config_path.read_bytes())
    dtypes = Counter(dict.fromkeys(_TORCH_NAMES, 0))
    for entry in entries:
        if (dtype := _dtype(entry)) in _TORCH_NAMES:
            dtypes[dtype] += tensor_bytes(entry)
    config.pop("torch_dtype", None)
    config["dtype"] = _TORCH_NAMES[dtypes.most_common(1)[0][0]]
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_weights(directory: Path, anchor: Manifest, payload: bytes, shard_bytes: int) -> None:
    shards = _shards(anchor.tensors, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": anchor.full_bytes}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    places: dict[str, tuple[BinaryIO, int]] = {}
    with ExitStack() as files:
        for name, shard in zip(names, shards, strict=True):
            file = files.enter_context((directory / name).open("wb"))
            places |= {key: (file, position) for key, position in _write_header(file, shard).items()}
        for update in iter_update(anchor, payload):
            if update.full is None or digest(update.full) != update.digest:
                raise DigestMismatchError(
                    f"tensor {update.name!r} of base snapshot {anchor.version} is not what was published: "
                    "promote another snapshot"
                )
            file, position = places.pop(update.name)
            file.seek(position)
            file.write(np.ascontiguousarray(update.full).tobytes())
    assert not places, f"{anchor.payload} lacks {sorted(places)[:3]}"


def _write_header(file: BinaryIO, shard: Sequence[TensorEntry]) -> dict[str, int]:
    """Begin a safetensors file; where in it the bytes of each tensor go."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for entry in shard:
        begins[entry.name], end = end, end + tensor_bytes(entry)
        header[entry.name] = {
            "dtype": _dtype(entry), "shape": list(entry.shape), "data_offsets": [begins[entry.name], end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}


def _dtype(entry: TensorEntry) -> str:
    """The safetensors name of a dtype; manifests may have torch's."""
    return _SAFETENSORS_NAMES.get(entry.dtype, entry.dtype)


def _shards(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    room = shard_bytes
    for entry in entries:
        size = tensor_bytes(entry)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= size
    return shards
