"""The trainer in this process and the one behind Ray keep one contract."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainer_contract import TrainerContract

from rlorch.local import LocalRuntime
from rlorch.ports import Runtime, Trainer, WeightStore
from rlorch.specs import RuntimeSpec, TrainerSpec

pytestmark = pytest.mark.engine


def runtime_spec(model: Path, run_dir: Path, ranks: int = 1) -> RuntimeSpec:
    trainer = TrainerSpec(compute_dtype="float32", threads=1, ranks=ranks, collective_timeout_s=60)
    return RuntimeSpec(model=str(model), run_dir=str(run_dir), trainer=trainer, roles=("trainer",))


class OnRuntime(TrainerContract):
    """The contract over the trainer of a `runtime`, which a subclass opens."""

    @pytest.fixture(scope="class")
    def started(self, runtime: Runtime) -> Iterator[Trainer]:
        yield asyncio.run(runtime.trainer())
        asyncio.run(runtime.stop())

    @pytest.fixture(scope="class")
    def store(self, runtime: Runtime) -> WeightStore:
        return runtime.weight_store()

    @pytest.fixture(scope="class")
    def fresh(self, started: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("fresh") / "version-0"
        asyncio.run(_save(started, path))
        return path


async def _save(trainer: Trainer, path: Path) -> None:
    await trainer.save(str(path))


class TestLocalTrainer(OnRuntime):
    @pytest.fixture(scope="class")
    def runtime(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
        return LocalRuntime(runtime_spec(tiny_model, tmp_path_factory.mktemp("local")))


def ray_runtime(spec: RuntimeSpec) -> Runtime:
    from actors.runtime import RayRuntime, devices
    from rlorch.placement import adjusted, make_plan

    plan = make_plan(devices(), spec)
    return RayRuntime(adjusted(spec, plan), plan)


@pytest.mark.ray
class TestRayTrainer(OnRuntime):
    @pytest.fixture(scope="class")
    def runtime(self, cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
        return ray_runtime(runtime_spec(tiny_model, tmp_path_factory.mktemp("ray")))


@pytest.mark.ray
class TestRayTrainerOfTwoRanks(OnRuntime):
    @pytest.fixture(scope="class")
    def runtime(self, cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
        return ray_runtime(runtime_spec(tiny_model, tmp_path_factory.mktemp("ray-ranks"), ranks=2))
