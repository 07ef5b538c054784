"""The trainer host in this process keeps its contract."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
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


@asynccontextmanager
async def local_host(model: Path, job_dir: Path) -> AsyncIterator[TrainerHost]:
    host = await LocalTrainerHost.start(host_spec(model, job_dir))
    yield host
    await host.close()


class OnThisProcess:
    """Two hosts of this process."""

    @pytest.fixture(scope="class")
    def job_dir(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("job")

    @pytest.fixture(scope="class")
    def store(self, job_dir: Path) -> WeightStore:
        return FileWeightStore(job_dir / "weights", WeightsSpec())

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def started(self, tiny_model: Path, job_dir: Path) -> AsyncIterator[TrainerHost]:
        async with local_host(tiny_model, job_dir) as host:
            yield host

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    async def started_another(
        self, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> AsyncIterator[TrainerHost]:
        async with local_host(tiny_model, tmp_path_factory.mktemp("another-job")) as host:
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


async def test_an_open_that_waits_for_other_models_to_load_is_not_overtaken(tiny_model: Path, tmp_path: Path) -> None:
    loading = asyncio.Lock()
    host = await LocalTrainerHost.start(host_spec(tiny_model, tmp_path / "job"), loading=loading)
    async with asyncio.TaskGroup() as tasks, loading:
        opening = tasks.create_task(host.open(SMALL))
        scoring = tasks.create_task(host.forward(SMALL.name, ROWS))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not opening.done()
    assert opening.result() == 0
    assert len(scoring.result().logprobs) == 2
    await host.close()
