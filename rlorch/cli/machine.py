"""What this machine has, and what a model directory weighs, without importing torch."""

import json
import math
import os
import struct
import subprocess
from pathlib import Path

from rlorch.errors import ModelError
from rlorch.placement import GIB, Devices, Gpu, ModelSize

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_NVIDIA_SMI_TIMEOUT_S = 20.0
_LONGEST_HEADER_BYTES = 100_000_000
"""What the safetensors format allows."""

_SERVED_BYTES = 2
"""Of one KV element: bfloat16 or float16."""


def find_devices() -> Devices:
    """GPUs (as CUDA_VISIBLE_DEVICES leaves them), cores and memory that this process may use."""
    return Devices(gpus=find_gpus(), cpus=count_cores(), memory_gib=memory_bytes() / GIB)


def find_gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs in the order that CUDA numbers them here; none without a working nvidia-smi."""
    try:
        listed = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(listed.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """GPUs of an `index, uuid, name, MiB` listing, in the order of `visible` (indices or UUIDs; None: all).

    Like CUDA, stops at the first entry of `visible` that names no GPU.
    """
    found: dict[str, tuple[str, float]] = {}
    for line in listing.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[3].isdecimal():
            found[cells[0]] = found[cells[1]] = (cells[2], int(cells[3]) / 1024)
    names = [name for name in found if name.isdecimal()]
    if visible is not None:
        names = []
        for wanted in (part.strip() for part in visible.split(",")):
            matches = [name for name in found if wanted and (name == wanted or _is_uuid_prefix(wanted, name))]
            if not matches:
                break
            names.append(matches[0])
    return tuple(Gpu(index, *found[name]) for index, name in enumerate(names))


def _is_uuid_prefix(wanted: str, name: str) -> bool:
    return wanted.startswith("GPU-") and name.startswith(wanted)


def count_cores() -> int:
    """Cores that this process may run on, a container's CPU quota included."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.strip().isdecimal():
        cores = min(cores, max(math.floor(int(quota) / int(period)), 1))
    return cores


def memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdecimal() else total


def available_memory_bytes() -> int | None:
    """What can be allocated now without swapping; None where the system does not say."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
            if limit.isdecimal() and used.isdecimal():
                available = min(available, int(limit) - int(used))
            return available
    return None


def model_size(model: str) -> ModelSize | None:
    """Parameters and KV cache of a model directory, from file headers only; None for a hub id.

    Raises:
        ModelError: a safetensors file is damaged, or config.json is not JSON.
    """
    folder = Path(model)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    num_params = sum(_count_elements(file) for file in files)
    config_path = folder / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has weights but no config.json; is it a whole model directory?") from error
    except ValueError as error:
        raise ModelError(f"{config_path} is not JSON: {error}") from error
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads") or 0
    head_dim = text.get("head_dim") or (text.get("hidden_size", 0) // heads if heads else 0)
    kv_heads = text.get("num_key_value_heads") or heads
    kv_bytes = 2 * text.get("num_hidden_layers", 0) * kv_heads * head_dim * _SERVED_BYTES
    return ModelSize(num_params, kv_bytes, text.get("vocab_size", 0))


def _count_elements(file: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _LONGEST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(
            f"{file} is not a safetensors file ({error}); a Git LFS pointer or a partial download?"
        ) from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
