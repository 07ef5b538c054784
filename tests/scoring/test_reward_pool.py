"""The pool over fake workers in virtual time: dispatch, loss, restart, deadlines, conservation."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rlorch.errors import DeadlineError, PluginError, ReplicaLostError
from rlorch.scoring.pool import CALL_TIMEOUT_S, RewardPool, call_timeout_s
from rlorch.sim.loop import run_virtual
from rlorch.specs import RewardSpec, RewardTerm
from rlorch.types import Rollout, Verdict

Make = Callable[..., Rollout]
Behaviour = Callable[[Rollout], Awaitable[Verdict]]


class FakeWorker:
    """Takes one virtual second per rollout, or does what `behave` says; counts."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave = behave
        self.running = self.most_running = self.calls = 0

    async def score(self, rollout: Rollout) -> Verdict:
        self.calls += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.behave is not None:
                return await self.behave(rollout)
            await asyncio.sleep(1.0)
            return Verdict(float(rollout.index), seconds=1.0)
        finally:
            self.running -= 1


async def lose(rollout: Rollout) -> Verdict:
    await asyncio.sleep(0.5)
    raise ReplicaLostError("gone")


async def hang(rollout: Rollout) -> Verdict:
    await asyncio.sleep(1e9)
    raise AssertionError


def test_rollouts_are_spread_and_come_back_in_order(make_rollout: Make) -> None:
    async def scene() -> None:
        workers = {name: FakeWorker() for name in "abcd"}
        pool = RewardPool(workers)
        scored = await pool.score([make_rollout(index=index) for index in range(16)])
        assert [rollout.verdict.score for rollout in scored if rollout.verdict] == list(range(16))
        assert asyncio.get_running_loop().time() == 4.0
        assert [worker.calls for worker in workers.values()] == [4] * 4
        assert {worker.most_running for worker in workers.values()} == {1}
        view = pool.view()
        assert (view.scored, view.mean_s, view.running, view.queued) == (16, 1.0, 0, 0)

    run_virtual(scene())


def test_a_slow_worker_gets_less(make_rollout: Make) -> None:
    async def slowly(rollout: Rollout) -> Verdict:
        await asyncio.sleep(10.0)
        return Verdict(1.0)

    async def scene() -> None:
        slow, quick = FakeWorker(slowly), FakeWorker()
        await RewardPool({"slow": slow, "quick": quick}).score([make_rollout() for _ in range(11)])
        assert (slow.calls, quick.calls) == (1, 10)

    run_virtual(scene())


def test_a_lost_worker_is_reported_and_its_rollout_goes_to_another(make_rollout: Make) -> None:
    async def scene() -> None:
        lost: list[str] = []
        pool = RewardPool({"a": FakeWorker(lose), "b": FakeWorker()}, on_lost=lambda name, _: lost.append(name))
        scored = await pool.score([make_rollout(index=index) for index in range(2)])
        assert [rollout.verdict.score for rollout in scored if rollout.verdict] == [0.0, 1.0]
        assert lost == ["a"]
        assert pool.view().available == 1

    run_virtual(scene())


def test_a_rollout_that_loses_two_workers_is_a_crash_and_not_an_error(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(lose), "b": FakeWorker(lose), "c": FakeWorker()})
        (scored,) = await pool.score([make_rollout()])
        assert scored.verdict is not None
        assert scored.verdict.failure == "crash"
        assert "two reward workers" in scored.verdict.detail
        assert pool.view().failures == {"crash": 1}

    run_virtual(scene())


def test_a_worker_that_does_not_answer_is_lost_at_its_deadline(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(hang), "b": FakeWorker()}, call_timeout_s=60.0)
        scored = await pool.score([make_rollout(index=1), make_rollout(index=2)])
        assert [rollout.verdict.score for rollout in scored if rollout.verdict] == [1.0, 2.0]
        assert asyncio.get_running_loop().time() == 61.0

    run_virtual(scene())


def test_a_lost_worker_is_restarted_once_and_serves_again(make_rollout: Make) -> None:
    async def scene() -> None:
        restarted: list[str] = []

        async def restart(name: str) -> FakeWorker:
            restarted.append(name)
            await asyncio.sleep(5.0)
            return FakeWorker()

        pool = RewardPool({"a": FakeWorker(lose)}, restart=restart, slots_per_worker=4)
        scored = await pool.score([make_rollout(index=index) for index in range(4)])
        assert restarted == ["a"]
        assert [rollout.verdict.score for rollout in scored if rollout.verdict] == [0, 1, 2, 3]
        view = pool.view()
        assert (view.available, view.lost) == (1, 4)

    run_virtual(scene())


def test_while_one_worker_restarts_the_others_do_its_work(make_rollout: Make) -> None:
    async def scene() -> None:
        async def restart(name: str) -> FakeWorker:
            await asyncio.sleep(100.0)
            return FakeWorker()

        other = FakeWorker()
        pool = RewardPool({"a": FakeWorker(lose), "b": other}, restart=restart)
        await pool.score([make_rollout(index=index) for index in range(8)])
        assert other.calls == 8

    run_virtual(scene())


def test_a_restart_that_fails_is_tried_again_by_the_next_score(make_rollout: Make) -> None:
    async def scene() -> None:
        tries: list[str] = []

        async def restart(name: str) -> FakeWorker:
            tries.append(name)
            if len(tries) == 1:
                raise ReplicaLostError("no room")
            return FakeWorker()

        pool = RewardPool({"a": FakeWorker(lose), "b": FakeWorker()}, restart=restart)
        await pool.score([make_rollout(), make_rollout()])
        assert pool.view().available == 1
        await pool.score([make_rollout()])
        assert pool.view().available == 2

    run_virtual(scene())


@pytest.mark.parametrize("error", [ReplicaLostError("no room"), PluginError("the file was edited")])
def test_a_pool_that_cannot_be_restarted_says_why_with_one_plain_error(make_rollout: Make, error: Exception) -> None:
    async def scene() -> None:
        async def restart(name: str) -> FakeWorker:
            raise error

        pool = RewardPool({"a": FakeWorker(lose)}, restart=restart)
        with pytest.raises(type(error), match=str(error)):
            await pool.score([make_rollout(), make_rollout()])
        assert (pool.view().running, pool.view().queued) == (0, 0)

    run_virtual(scene())


def test_a_pool_whose_last_worker_is_lost_for_good_says_so_at_once(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(lose)})
        for _ in range(2):
            with pytest.raises(ReplicaLostError, match="no reward worker is left"):
                await pool.score([make_rollout(), make_rollout()])
        assert asyncio.get_running_loop().time() == 0.5

    run_virtual(scene())


def test_the_queue_is_bounded_and_waits_as_long_as_calls_end(make_rollout: Make) -> None:
    async def slowly(rollout: Rollout) -> Verdict:
        await asyncio.sleep(50.0)
        return Verdict(1.0)

    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(slowly)}, call_timeout_s=60.0, capacity=2)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(pool.score([make_rollout() for _ in range(20)]))
            await asyncio.sleep(1.0)
            view = pool.view()
            assert (view.running, view.queued) == (1, 19)
        assert len(task.result()) == 20
        assert asyncio.get_running_loop().time() == 1000.0  # far longer than one wait may take without progress

    run_virtual(scene())


def test_a_restart_that_hangs_ends_at_its_deadline(make_rollout: Make) -> None:
    async def scene() -> None:
        async def restart(name: str) -> FakeWorker:
            await asyncio.sleep(1e9)
            raise AssertionError

        pool = RewardPool({"a": FakeWorker(lose)}, restart=restart, call_timeout_s=10.0)
        with pytest.raises(ReplicaLostError, match="restarting reward worker 'a'"):
            await pool.score([make_rollout()])
        assert asyncio.get_running_loop().time() == 10.5

    run_virtual(scene())


def test_a_pool_in_which_no_call_ends_is_a_deadline_error(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker()}, call_timeout_s=10.0)
        await pool._dispatch.acquire()  # a place that never comes back
        with pytest.raises(DeadlineError, match="no reward worker became free; they were a: 0 running"):
            await pool.score([make_rollout()])
        assert asyncio.get_running_loop().time() == 20.0

    run_virtual(scene())


def test_cancelling_a_score_frees_its_places(make_rollout: Make) -> None:
    async def scene() -> None:
        workers = {"a": FakeWorker(hang), "b": FakeWorker(hang)}
        pool = RewardPool(workers)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await pool.score([make_rollout() for _ in range(9)])
        assert (pool.view().running, pool.view().queued) == (0, 0)
        for worker in workers.values():
            worker.behave = None
        assert len(await pool.score([make_rollout() for _ in range(9)])) == 9

    run_virtual(scene())


@pytest.mark.parametrize("seed", range(25))
def test_in_any_world_every_rollout_gets_one_verdict_and_every_place_comes_back(seed: int, make_rollout: Make) -> None:
    rng = random.Random(seed)

    async def chaos(rollout: Rollout) -> Verdict:
        await asyncio.sleep(rng.expovariate(1.0))
        if rng.random() < 0.2:
            raise ReplicaLostError("gone")
        if rng.random() < 0.05:
            await asyncio.sleep(1e9)
        return Verdict(failure="timeout") if rng.random() < 0.1 else Verdict(1.0)

    async def restart(name: str) -> FakeWorker:
        await asyncio.sleep(rng.uniform(0, 5))
        return made.setdefault(f"{name}-{len(made)}", FakeWorker(chaos))

    made: dict[str, FakeWorker] = {f"w{index}": FakeWorker(chaos) for index in range(rng.randint(1, 4))}
    slots = rng.randint(1, 3)

    async def scene() -> None:
        pool = RewardPool(
            dict(made), restart=restart, slots_per_worker=slots, capacity=rng.randint(1, 20), call_timeout_s=30.0
        )
        async with asyncio.TaskGroup() as group:
            groups = [
                group.create_task(pool.score([make_rollout(index=i) for i in range(rng.randint(1, 8))]))
                for _ in range(12)
            ]
        scored = [rollout for task in groups for rollout in task.result()]
        view = pool.view()
        assert all(rollout.verdict is not None for rollout in scored)
        assert view.scored + sum(view.failures.values()) == len(scored)
        assert (view.running, view.queued) == (0, 0)
        assert max(worker.most_running for worker in made.values()) <= slots
        assert pool._dispatch.in_flight == pool._admission.in_flight == 0
        assert pool._dispatch.limit == view.available * slots

    run_virtual(scene())


def test_the_default_deadline_of_a_call_covers_the_default_budgets() -> None:
    assert call_timeout_s(RewardSpec(terms=(RewardTerm(plugin="exact"),))) < CALL_TIMEOUT_S


@pytest.mark.parametrize("wrong", [{"workers": {}}, {"slots_per_worker": 0}, {"capacity": 0}])
def test_a_pool_without_workers_or_room_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool(**{"workers": {"a": FakeWorker()}, **wrong})
