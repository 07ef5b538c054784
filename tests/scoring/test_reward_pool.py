"""The pool over fake workers in virtual time: dispatch, loss, restart, deadlines, conservation."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from rlorch.errors import DeadlineError, PluginError, ReplicaLostError
from rlorch.scoring.pool import RewardPool, call_timeout_s, default_call_timeout_s
from rlorch.sim.loop import run_virtual
from rlorch.specs import RewardSpec, RewardTerm
from rlorch.types import Rollout, Verdict

Make = Callable[..., Rollout]
Behaviour = Callable[[Sequence[Rollout]], Awaitable[tuple[Verdict, ...]]]


class FakeWorker:
    """Takes one virtual second per rollout, or does what `behave` says; counts calls and how many run at a time."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave = behave
        self.running = self.most_running = self.calls = 0

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        self.calls += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.behave is not None:
                return await self.behave(rollouts)
            await asyncio.sleep(1.0 * len(rollouts))
            return tuple(Verdict(float(rollout.index), seconds=1.0) for rollout in rollouts)
        finally:
            self.running -= 1


async def lose(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
    await asyncio.sleep(0.5)
    raise ReplicaLostError("gone")


async def hang(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
    await asyncio.sleep(1e9)
    raise AssertionError


async def score_groups(pool: RewardPool, groups: Sequence[Sequence[Rollout]]) -> list[tuple[Rollout, ...]]:
    """All groups at once, as the coordinator does it."""
    async with asyncio.TaskGroup() as tasks:
        scoring = [tasks.create_task(pool.score(group)) for group in groups]
    return [task.result() for task in scoring]


def scores(rollouts: Sequence[Rollout]) -> list[float | None]:
    return [rollout.verdict.score for rollout in rollouts if rollout.verdict]


def test_groups_are_spread_over_the_workers_and_come_back_in_order(make_rollout: Make) -> None:
    async def scene() -> None:
        workers = {name: FakeWorker() for name in "abcd"}
        pool = RewardPool(workers)
        group = [make_rollout(index=index) for index in range(8)]
        scored = await score_groups(pool, [group] * 16)
        assert [scores(rollouts) for rollouts in scored] == [list(range(8))] * 16
        assert asyncio.get_running_loop().time() == 32.0
        assert [worker.calls for worker in workers.values()] == [4] * 4  # one call per group
        assert {worker.most_running for worker in workers.values()} == {1}
        view = pool.view()
        assert (view.scored, view.mean_s, view.running, view.queued) == (128, 1.0, 0, 0)

    run_virtual(scene())


def test_a_group_of_a_slow_reward_is_shared_out_over_the_workers(make_rollout: Make) -> None:
    async def scene() -> None:
        workers = {name: FakeWorker() for name in "abc"}
        pool = RewardPool(workers)
        group = [make_rollout(index=index) for index in range(8)]
        for elapsed in (8.0, 8.0 + 3.0):  # nothing is known of the first; then 2 + 3 + 3
            assert scores(await pool.score(group)) == list(range(8))
            assert asyncio.get_running_loop().time() == elapsed
        assert sum(worker.calls for worker in workers.values()) == 1 + 3

    run_virtual(scene())


def test_a_quick_reward_gets_a_group_in_one_call(make_rollout: Make) -> None:
    async def quick(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        return tuple(Verdict(1.0, seconds=0.001) for _ in rollouts)

    async def scene() -> None:
        workers = {name: FakeWorker(quick) for name in "abc"}
        pool = RewardPool(workers)
        for _ in range(5):
            await pool.score([make_rollout(index=index) for index in range(8)])
        assert sum(worker.calls for worker in workers.values()) == 5

    run_virtual(scene())


def test_no_rollouts_need_no_worker() -> None:
    async def scene() -> None:
        assert await RewardPool({"a": FakeWorker(hang)}).score([]) == ()

    run_virtual(scene())


def test_a_slow_worker_gets_less(make_rollout: Make) -> None:
    async def slowly(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        await asyncio.sleep(10.0)
        return (Verdict(1.0),) * len(rollouts)

    async def scene() -> None:
        slow, quick = FakeWorker(slowly), FakeWorker()
        await score_groups(RewardPool({"slow": slow, "quick": quick}), [[make_rollout()]] * 11)
        assert (slow.calls, quick.calls) == (1, 10)

    run_virtual(scene())


def test_the_worker_with_the_fewest_rollouts_gets_the_next_group(make_rollout: Make) -> None:
    async def scene() -> None:
        a, b = FakeWorker(), FakeWorker()
        pool = RewardPool({"a": a, "b": b}, slots_per_worker=9)
        await score_groups(pool, [[make_rollout()] * 8, *([[make_rollout()] * 2] * 4)])
        assert (a.calls, b.calls) == (1, 4)

    run_virtual(scene())


def test_a_lost_worker_is_reported_and_its_whole_group_goes_to_another(make_rollout: Make) -> None:
    async def scene() -> None:
        lost: list[str] = []
        other = FakeWorker()
        pool = RewardPool({"a": FakeWorker(lose), "b": other}, on_lost=lambda name, _: lost.append(name))
        scored = await pool.score([make_rollout(index=index) for index in range(8)])
        assert scores(scored) == list(range(8))
        assert other.calls == 1
        assert lost == ["a"]
        assert pool.view().available == 1

    run_virtual(scene())


def test_a_group_that_loses_two_workers_is_crashes_and_not_an_error(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(lose), "b": FakeWorker(lose), "c": FakeWorker()})
        scored = await pool.score([make_rollout()] * 3)
        assert [rollout.verdict.failure for rollout in scored if rollout.verdict] == ["crash"] * 3
        assert scored[0].verdict is not None
        assert "two reward workers" in scored[0].verdict.detail
        assert pool.view().failures == {"crash": 3}

    run_virtual(scene())


def test_a_worker_that_does_not_answer_is_lost_at_the_deadline_of_its_group(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(hang), "b": FakeWorker()}, call_timeout_s=lambda count: 10.0 + count)
        assert scores(await pool.score([make_rollout(index=index) for index in range(5)])) == [0, 1, 2, 3, 4]
        assert asyncio.get_running_loop().time() == 15.0 + 5.0

    run_virtual(scene())


def test_a_lost_worker_is_restarted_once_and_serves_again(make_rollout: Make) -> None:
    async def scene() -> None:
        restarted: list[str] = []

        async def restart(name: str) -> FakeWorker:
            restarted.append(name)
            await asyncio.sleep(5.0)
            return FakeWorker()

        pool = RewardPool({"a": FakeWorker(lose)}, restart=restart, slots_per_worker=4)
        scored = await score_groups(pool, [[make_rollout(index=index)] * 2 for index in range(4)])
        assert restarted == ["a"]
        assert [scores(rollouts) for rollouts in scored] == [[index] * 2 for index in range(4)]
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
        await score_groups(pool, [[make_rollout()]] * 8)
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


def test_a_group_waits_for_its_turn_as_long_as_calls_end(make_rollout: Make) -> None:
    async def slowly(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        await asyncio.sleep(50.0)
        return (Verdict(1.0),) * len(rollouts)

    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(slowly)}, call_timeout_s=lambda count: 30.0 * count)
        async with asyncio.TaskGroup() as tasks:
            scoring = tasks.create_task(score_groups(pool, [[make_rollout()] * 2] * 20))
            await asyncio.sleep(1.0)
            view = pool.view()
            assert (view.running, view.queued) == (2, 38)
        assert len(scoring.result()) == 20
        assert asyncio.get_running_loop().time() == 1000.0  # far longer than one wait may take without progress

    run_virtual(scene())


def test_a_small_group_waits_for_the_deadline_of_the_large_one_before_it(make_rollout: Make) -> None:
    async def slowly(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        await asyncio.sleep(9.0 * len(rollouts))
        return (Verdict(1.0),) * len(rollouts)

    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker(slowly)}, call_timeout_s=lambda count: 10.0 * count)
        large, small = await score_groups(pool, [[make_rollout()] * 16, [make_rollout()]])
        assert (scores(large), scores(small)) == ([1.0] * 16, [1.0])

    run_virtual(scene())


def test_a_restart_that_hangs_ends_at_its_deadline(make_rollout: Make) -> None:
    async def scene() -> None:
        async def restart(name: str) -> FakeWorker:
            await asyncio.sleep(1e9)
            raise AssertionError

        pool = RewardPool({"a": FakeWorker(lose)}, restart=restart, call_timeout_s=lambda _: 10.0)
        with pytest.raises(ReplicaLostError, match="restarting reward worker 'a'"):
            await pool.score([make_rollout()])
        assert asyncio.get_running_loop().time() == 10.5

    run_virtual(scene())


def test_a_pool_in_which_no_call_ends_is_a_deadline_error(make_rollout: Make) -> None:
    async def scene() -> None:
        pool = RewardPool({"a": FakeWorker()}, call_timeout_s=lambda _: 10.0)
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
                await score_groups(pool, [[make_rollout()] * 3] * 9)
        assert (pool.view().running, pool.view().queued) == (0, 0)
        for worker in workers.values():
            worker.behave = None
        assert len(await score_groups(pool, [[make_rollout()] * 3] * 9)) == 9

    run_virtual(scene())


@pytest.mark.parametrize("seed", range(25))
def test_in_any_world_every_rollout_gets_one_verdict_and_every_place_comes_back(seed: int, make_rollout: Make) -> None:
    rng = random.Random(seed)

    async def chaos(rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        await asyncio.sleep(rng.expovariate(1.0))
        if rng.random() < 0.2:
            raise ReplicaLostError("gone")
        if rng.random() < 0.05:
            await asyncio.sleep(1e9)
        return tuple(
            Verdict(failure="timeout") if rng.random() < 0.1 else Verdict(float(rollout.index)) for rollout in rollouts
        )

    async def restart(name: str) -> FakeWorker:
        await asyncio.sleep(rng.uniform(0, 5))
        return made.setdefault(f"{name}-{len(made)}", FakeWorker(chaos))

    made: dict[str, FakeWorker] = {f"w{index}": FakeWorker(chaos) for index in range(rng.randint(1, 4))}
    slots = rng.randint(1, 3)

    async def scene() -> None:
        pool = RewardPool(
            dict(made), restart=restart, slots_per_worker=slots, call_timeout_s=lambda count: 30.0 * count
        )
        sizes = [rng.randint(1, 8) for _ in range(30)]
        groups = await score_groups(pool, [[make_rollout(index=i) for i in range(size)] for size in sizes])
        scored = [rollout for group in groups for rollout in group]
        assert [rollout.index for rollout in scored] == [index for size in sizes for index in range(size)]
        assert all(rollout.verdict.score in (None, rollout.index) for rollout in scored if rollout.verdict)
        view = pool.view()
        assert all(rollout.verdict is not None for rollout in scored)
        assert view.scored + sum(view.failures.values()) == len(scored)
        assert (view.running, view.queued) == (0, 0)
        assert max(worker.most_running for worker in made.values()) <= slots
        assert pool._dispatch.in_flight == 0
        assert pool._dispatch.limit == view.available * slots

    run_virtual(scene())


def test_the_default_deadline_of_a_call_covers_the_default_budgets() -> None:
    spec = RewardSpec(terms=(RewardTerm(plugin="exact"),))
    assert all(call_timeout_s(spec, count) < default_call_timeout_s(count) for count in (1, 8, 64))


def test_the_deadline_of_a_call_covers_every_budget_in_it() -> None:
    spec = RewardSpec(terms=(RewardTerm(plugin="exact"),), timeout_s=3.0, start_timeout_s=5.0)
    cancelled_one, start, every_rollout, a_process_after_each = 3.0, 5.0, 8 * 3.0, 8 * 5.0
    assert call_timeout_s(spec, 8) > cancelled_one + start + every_rollout + a_process_after_each


@pytest.mark.parametrize("wrong", [{"workers": {}}, {"slots_per_worker": 0}])
def test_a_pool_without_workers_or_room_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a pool needs"):
        RewardPool(**{"workers": {"a": FakeWorker()}, **wrong})
