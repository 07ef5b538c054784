"""The trainer host in this process keeps its contract."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from trainer_contract import CROSS_ENTROPY
from trainer_host_contract import FULL, ROWS, SMALL, AdaptersContract, FullModelContract

from rlorch.local import LocalTrainerHost
from rlorch.ports import TrainerHost, WeightStore
from rlorch.specs import HostSpec, TrainerSpec, WeightsSpec
from rlorch.types import AdamParams
from rlorch.weights.store import FileWeightStore

pytestmark = pytest.mark.engine


def host_spec(model: Path, job_dir: Path) -> HostSpec:
    trainer = TrainerSpec(compute_dtype="float32", threads=1)
    return HostSpec(model=str(model), job_dir=str(job_dir), trainer=trainer, max_context_length=32)


@contextmanager
def local_host(model: Path, job_dir: Path) -> Iterator[TrainerHost]:
    host = asyncio.run(LocalTrainerHost.start(host_spec(model, job_dir)))
    yield host
    asyncio.run(host.close())


class OnThisProcess:
    """Two hosts of this process."""

    @pytest.fixture(scope="class")
    def job_dir(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("job")

    @pytest.fixture(scope="class")
    def store(self, job_dir: Path) -> WeightStore:
        return FileWeightStore(job_dir / "weights", WeightsSpec())

    @pytest.fixture(scope="class")
    def started(self, tiny_model: Path, job_dir: Path) -> Iterator[TrainerHost]:
        with local_host(tiny_model, job_dir) as host:
            yield host

    @pytest.fixture(scope="class")
    def started_another(self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerHost]:
        with local_host(tiny_model, tmp_path_factory.mktemp("another-job")) as host:
            yield host


class TestLocalFullModel(OnThisProcess, FullModelContract):
    pass


class TestLocalAdapters(OnThisProcess, AdaptersContract):
    pass


async def test_a_host_that_closes_lets_the_calls_before_it_finish(tiny_model: Path, tmp_path: Path) -> None:
    host = await LocalTrainerHost.start(host_spec(tiny_model, tmp_path / "job"))
    await host.open(SMALL)
    async with asyncio.TaskGroup() as tasks:
        gradient = tasks.create_task(host.forward_backward(SMALL.name, ROWS, CROSS_ENTROPY))
        taken = tasks.create_task(host.optim_step(SMALL.name, AdamParams(), "none"))
        closing = tasks.create_task(host.close())
    assert len(gradient.result().logprobs) == 2
    assert taken.result().version == 1
    assert closing.result() is None
    await host.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        await host.open(FULL)
