"""What there is to place roles on."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `node` is the scheduler's id of its machine, None where there is only one."""

    index: int
    name: str
    memory_gib: float
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Devices:
    """All GPUs, and the cores and memory of all nodes together. `memory_gib` 0 means unknown."""

    gpus: tuple[Gpu, ...]
    cpus: int
    memory_gib: float
    nodes: int = 1


def machine(devices: Devices) -> str:
    """`16 cores, 128.0 GiB of memory, 2 x NVIDIA H100 (78 GiB)`."""
    parts = [f"{devices.cpus} core" + ("s" if devices.cpus != 1 else "")]
    if devices.memory_gib:
        parts.append(f"{devices.memory_gib:.1f} GiB of memory")
    kinds = Counter((gpu.name, gpu.memory_gib) for gpu in devices.gpus)
    parts += [f"{count} x {name} ({memory:.0f} GiB)" for (name, memory), count in kinds.items()] or ["no GPU"]
    if devices.nodes > 1:
        parts.append(f"{devices.nodes} nodes")
    return ", ".join(parts)
