"""Whether a shape fits: against what the hardware of its name has, and against a search of every placement."""

from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlorch.placement import Devices, Gpu
from rlorch.shapes import Catalogue, Layout, TrainingShape
from rlorch.shapes.shape import accelerator_memory_gib

BUILTIN = Catalogue.load()
REPORTED = {"NVIDIA_H200_141GB": 140.4, "NVIDIA_B200_180GB": 179.1, "NVIDIA_B300_288GB": 268.6, "ANY_GPU": 24.0}
"""Memory in GiB as drivers report it."""


def gpus(*by_node: int, memory_gib: float = 80.0) -> Devices:
    found = [(f"node-{node}", memory_gib) for node, count in enumerate(by_node) for _ in range(count)]
    listed = tuple(Gpu(index, "GPU", memory, node) for index, (node, memory) in enumerate(found))
    return Devices(listed, cpus=64, memory_gib=512, nodes=len(by_node))


def own_hardware(shape: TrainingShape) -> Devices:
    nodes = [shape.accelerator_count] * shape.node_count
    return gpus(*nodes, memory_gib=REPORTED.get(shape.accelerator_type, 0.0))


@pytest.mark.parametrize("shape", BUILTIN.list(), ids=lambda shape: shape.name)
def test_every_shape_fits_on_the_hardware_it_names_except_one_that_says_what_is_missing(shape: TrainingShape) -> None:
    reasons = BUILTIN.fits(shape, own_hardware(shape))
    if shape.name != "kimi-2p5-text-only-256k":
        assert reasons == ()
    else:
        assert len(reasons) == 1
        assert reasons[0].startswith("training all 1026B parameters")


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_box_holds_trainer_deployment_and_reference_at_once(count: int) -> None:
    box, reference = BUILTIN.get(f"box-{count}gpu"), BUILTIN.get(f"box-{count}gpu-forward-only")
    assert BUILTIN.fits(box, gpus(count), with_deployment=True) == ()
    assert box.deployment is not None
    served = box.deployment.accelerator_count * box.deployment.gpu_fraction
    trained = box.num_gpus * box.gpu_fraction + reference.num_gpus * reference.gpu_fraction
    assert served + trained <= count
    assert box.gpu_fraction + reference.gpu_fraction <= 1
    smaller = gpus(count - 1) if count > 1 else gpus()
    assert BUILTIN.fits(box, smaller, with_deployment=True) or count > 2


def test_reasons_give_what_is_needed_and_what_there_is() -> None:
    shape = BUILTIN.get("qwen3p5-9b-256k")
    assert BUILTIN.fits(shape, gpus()) == ("needs 2 GPUs of 141 GiB; there is none",)
    assert BUILTIN.fits(shape, gpus(2)) == ("needs 2 GPUs of 141 GiB; the 2 here are smaller",)
    assert BUILTIN.fits(shape, gpus(1, 1, memory_gib=140.0)) == (
        "needs 2 GPUs of 141 GiB; there are 2 (1 + 1 by node)",
    )
    assert BUILTIN.fits(shape, gpus(2, memory_gib=140.0)) == ()
    assert BUILTIN.fits(shape, gpus(2, memory_gib=140.0), with_deployment=True) == (
        "needs 2 GPUs of 141 GiB, and 1 GPU of 141 GiB for its deployment; there are 2",
    )


def test_a_larger_gpu_than_the_shape_names_serves_as_well() -> None:
    assert BUILTIN.fits(BUILTIN.get("qwen3p5-9b-256k"), gpus(2, memory_gib=179.0)) == ()


def test_a_cpu_shape_fits_without_a_gpu_and_a_model_must_fit_into_memory() -> None:
    shape = BUILTIN.get("cpu")
    assert BUILTIN.fits(shape, Devices((), 1, 1.0), with_deployment=True) == ()
    large = replace(shape, num_params_b=70.0)
    (reason,) = BUILTIN.fits(large, Devices((), 8, 64.0))
    assert reason.startswith("training all 70B parameters (float32 weights, gradients and Adam) takes about 1043.1 GiB")
    assert BUILTIN.fits(large, Devices((), 8, 0.0)) == ()  # memory that is not known is not judged


@st.composite
def problems(draw: st.DrawFn) -> tuple[TrainingShape, Devices]:
    """A small shape with a deployment, and a few nodes of small and large GPUs."""
    base = BUILTIN.get("box-2gpu")
    assert base.deployment is not None
    types = st.sampled_from(["ANY_GPU", "NVIDIA_H200_141GB"])
    count, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    fractions = st.sampled_from([0.3, 0.5, 0.7, 1.0])
    deployment = replace(
        base.deployment,
        tensor_parallel=draw(st.integers(1, 3)),
        accelerator_type=draw(types),
        gpu_fraction=draw(fractions),
    )
    shape = replace(
        base,
        accelerator_type=draw(types),
        accelerator_count=count,
        node_count=nodes,
        gpu_fraction=draw(fractions) if nodes == 1 else 1.0,
        layout=Layout(count * nodes),
        deployment=deployment,
    )
    sizes = draw(st.lists(st.lists(st.sampled_from([24.0, 140.0]), max_size=4), max_size=3))
    found = [(f"node-{node}", memory) for node, on_node in enumerate(sizes) for memory in on_node]
    listed = tuple(Gpu(index, "GPU", memory, node) for index, (node, memory) in enumerate(found))
    return shape, Devices(listed, cpus=8, memory_gib=64, nodes=max(len(sizes), 1))


def trainer_placements(shape: TrainingShape, devices: Devices) -> list[set[int]]:
    """Every set of GPU indices that the trainer could take."""
    least = 0.9 * accelerator_memory_gib(shape.accelerator_type)
    by_node: dict[str | None, list[int]] = {}
    for gpu in devices.gpus:
        if gpu.memory_gib >= least:
            by_node.setdefault(gpu.node, []).append(gpu.index)
    choices = [list(combinations(indices, shape.accelerator_count)) for indices in by_node.values()]
    return [
        {index for part in picked for index in part}
        for nodes in combinations(choices, shape.node_count)
        for picked in product(*nodes)
    ]


def deployment_has_room(shape: TrainingShape, devices: Devices, trainer: set[int]) -> bool:
    assert shape.deployment is not None
    least = 0.9 * accelerator_memory_gib(shape.deployment.accelerator_type)
    room: dict[str | None, int] = {}
    for gpu in devices.gpus:
        left = 1 - (shape.gpu_fraction if gpu.index in trainer else 0)
        if gpu.memory_gib >= least and left >= shape.deployment.gpu_fraction - 1e-9:
            room[gpu.node] = room.get(gpu.node, 0) + 1
    return any(count >= shape.deployment.tensor_parallel for count in room.values())


@given(problems())
def test_the_trainer_fits_exactly_where_a_search_finds_a_place(problem: tuple[TrainingShape, Devices]) -> None:
    shape, devices = problem
    assert (BUILTIN.fits(shape, devices) == ()) == bool(trainer_placements(shape, devices))


@settings(max_examples=400)
@given(problems())
def test_a_deployment_is_said_to_fit_only_where_a_search_finds_a_place(problem: tuple[TrainingShape, Devices]) -> None:
    shape, devices = problem
    found = any(deployment_has_room(shape, devices, trainer) for trainer in trainer_placements(shape, devices))
    assert (BUILTIN.fits(shape, devices, with_deployment=True) == ()) == found
