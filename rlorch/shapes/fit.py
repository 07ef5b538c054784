"""Whether a shape fits on the devices there are, and how its trainer's processes are laid out.

A trainer takes `accelerator_count` GPUs on each of `node_count` nodes, one replica of its deployment `tensor_parallel`
GPUs on one node; both may take a fraction of a GPU. A GPU is good enough when it has the memory that the shape's type
names, whatever it is called: a larger one serves as well. Only counts by node decide, so the answer is exact.
"""

from collections import Counter
from collections.abc import Sequence

from rlorch.placement import GIB, Devices, Gpu, ModelSize, trainer_bytes
from rlorch.shapes.shape import CPU, DeploymentShape, TrainingShape, accelerator_memory_gib
from rlorch.specs import TrainerSpec

MEMORY_TOLERANCE = 0.9
"""Drivers report a little less than the nominal size: 22.5 GiB of 24, 268 of 288."""

USABLE_FRACTION = 0.9
"""Of a GPU's memory; the rest goes to contexts and fragmentation."""

WEIGHT_BYTES = {"BFLOAT16": 2, "FLOAT16": 2, "FLOAT32": 4}


def misfits(shape: TrainingShape, devices: Devices, *, with_deployment: bool = False) -> tuple[str, ...]:
    """Why the trainer (and one replica of its deployment) cannot be placed; empty when it can."""
    if shape.accelerator_type == CPU:
        return _host_memory(shape, devices)
    good = _good(devices, shape.accelerator_type)
    if sum(count >= shape.accelerator_count for count in _by_node(good).values()) < shape.node_count:
        return (_too_few(_needs(shape), devices, good),)
    reasons = _gpu_memory(shape, good)
    deployment = shape.deployment
    if with_deployment and deployment and not _room_for_both(shape, deployment, devices):
        wanted = _gpus(deployment.tensor_parallel, deployment.accelerator_type)
        reasons += (_too_few(f"{_needs(shape)}, and {wanted} for its deployment", devices, good),)
    return reasons


def host_layout(shape: TrainingShape) -> tuple[int, float, float]:
    """How a trainer host of this shape is started: (ranks, GPUs per rank, cores per rank)."""
    gpus_per_rank = 0.0 if shape.accelerator_type == CPU else shape.gpu_fraction
    return shape.layout.ranks, gpus_per_rank, shape.cpus_per_rank


def _good(devices: Devices, accelerator_type: str) -> list[Gpu]:
    """GPUs with the memory that a type names."""
    least = MEMORY_TOLERANCE * accelerator_memory_gib(accelerator_type)
    return [gpu for gpu in devices.gpus if gpu.memory_gib >= least]


def _by_node(gpus: Sequence[Gpu]) -> Counter[str | None]:
    return Counter(gpu.node for gpu in gpus)


def _room_for_both(shape: TrainingShape, deployment: DeploymentShape, devices: Devices) -> bool:
    """Whether some node can serve while the trainer has all its nodes: others first, else that one too."""
    if deployment.accelerator_type == CPU:
        return True
    trained = _by_node(_good(devices, shape.accelerator_type))
    served = _by_node(_good(devices, deployment.accelerator_type))
    shared = shape.gpu_fraction + deployment.gpu_fraction <= 1
    training = {node for node, count in trained.items() if count >= shape.accelerator_count}
    for node, count in served.items():
        left = count
        if len(training - {node}) < shape.node_count and not shared:
            too_small_to_serve = max(trained[node] - count, 0)
            left -= max(shape.accelerator_count - too_small_to_serve, 0)
        if left >= deployment.tensor_parallel:
            return True
    return False


def _needs(shape: TrainingShape) -> str:
    where = f" on each of {shape.node_count} nodes" if shape.node_count > 1 else ""
    return f"needs {_gpus(shape.accelerator_count, shape.accelerator_type)}{where}"


def _gpus(count: int, accelerator_type: str) -> str:
    memory = accelerator_memory_gib(accelerator_type)
    of = f" of {memory:.0f} GiB" if memory else ""
    return f"{count} GPU{'s' if count != 1 else ''}{of}"


def _too_few(needs: str, devices: Devices, good: Sequence[Gpu]) -> str:
    """`needs ...; there are 2 (1 + 1 by node), and 2 smaller ones`."""
    nodes = list(_by_node(good).values())
    spread = f" ({' + '.join(map(str, nodes))} by node)" if len(nodes) > 1 else ""
    small = len(devices.gpus) - len(good)
    if not good:
        has = f"the {small} here are smaller" if small > 1 else "the one here is smaller" if small else "there is none"
    else:
        smaller = f", and {small} smaller" if small else ""
        has = f"there {'is' if len(good) == 1 else 'are'} {len(good)}{spread}{smaller}"
    return f"{needs}; {has}"


def _gpu_memory(shape: TrainingShape, good: Sequence[Gpu]) -> tuple[str, ...]:
    needed = _needed_gib(shape, on_gpu=True)
    there = USABLE_FRACTION * shape.num_gpus * min(gpu.memory_gib for gpu in good)
    if needed <= there:
        return ()
    return (
        f"{_what(shape)} takes about {needed:.0f} GiB before activations; {there:.0f} GiB of "
        f"{shape.num_gpus} such GPUs can be used",
    )


def _host_memory(shape: TrainingShape, devices: Devices) -> tuple[str, ...]:
    needed = _needed_gib(shape, on_gpu=False)
    if not devices.memory_gib or needed <= devices.memory_gib:
        return ()
    return (f"{_what(shape)} takes about {needed:.1f} GiB; there are {devices.memory_gib:.1f} GiB",)


def _needed_gib(shape: TrainingShape, *, on_gpu: bool) -> float:
    """Weights, and gradients and optimizer state where all weights are trained; 0 for an unknown model."""
    num_params = int((shape.num_params_b or 0) * 1e9)
    if shape.trainer_mode == "POLICY_TRAINER":
        return trainer_bytes(ModelSize(num_params), TrainerSpec(), on_gpu=on_gpu) / GIB
    return num_params * WEIGHT_BYTES[shape.base_model_weight_precision] / GIB


def _what(shape: TrainingShape) -> str:
    if shape.trainer_mode == "POLICY_TRAINER":
        return f"training all {shape.num_params_b:g}B parameters (float32 weights, gradients and Adam)"
    return f"holding {shape.num_params_b:g}B parameters in {shape.base_model_weight_precision.lower()}"
