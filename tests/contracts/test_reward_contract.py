"""The reward worker in this process and the one behind Ray keep one contract."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from reward_contract import Open, RewardWorkerContract

from rlorch.local import LocalRuntime
from rlorch.ports import RewardWorker
from rlorch.specs import RewardSpec, RuntimeSpec


class TestLocalRewardWorker(RewardWorkerContract):
    @pytest.fixture
    def open_worker(self, tmp_path: Path) -> Open:
        @asynccontextmanager
        async def open_worker(rewards: RewardSpec) -> AsyncIterator[RewardWorker]:
            runtime = LocalRuntime(RuntimeSpec(model="m", run_dir=str(tmp_path), rewards=rewards, roles=("reward",)))
            try:
                yield await runtime.reward_worker("reward-0")
            finally:
                await runtime.stop()

        return open_worker


@pytest.mark.ray
class TestRayRewardWorker(RewardWorkerContract):
    @pytest.fixture
    def open_worker(self, cluster: None, tmp_path: Path) -> Open:
        from actors.runtime import RayRuntime, devices
        from rlorch.placement import make_plan

        @asynccontextmanager
        async def open_worker(rewards: RewardSpec) -> AsyncIterator[RewardWorker]:
            spec = RuntimeSpec(model="m", run_dir=str(tmp_path), rewards=rewards, roles=("reward",))
            runtime = RayRuntime(spec, make_plan(devices(), spec))
            try:
                yield await runtime.reward_worker("reward-0")
            finally:
                await runtime.stop()

        return open_worker
