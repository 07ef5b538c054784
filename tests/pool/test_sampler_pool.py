"""The pool over simulated replicas: admission, routing, retries, moves, deadlines, cancellation."""

import asyncio

import numpy as np
import pytest

from rlorch.errors import AbortedError, DeadlineError, OverloadedError, ReplicaLostError, WeightsError
from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.sim.loop import run_virtual
from rlorch.sim.queueing import EngineModel
from rlorch.sim.sampler import Fault, SimSampler, SimSamplerConfig
from rlorch.types import Completion, SamplingParams, Tokens


def prompt(number: int) -> Tokens:
    return np.full(64, number, dtype=np.int32)


def replica(name: str, *faults: Fault, **options: int) -> SimSampler:
    return SimSampler(name, SimSamplerConfig(faults=faults, mean_tokens=1e4, **options), version=0)  # pyright: ignore[reportArgumentType]


def fixed(window: int, **options: float) -> PoolConfig:
    return PoolConfig(strategy="fixed", initial_window=window, **options)  # pyright: ignore[reportArgumentType]


def params(n: int = 1, tokens: int = 50) -> SamplingParams:
    return SamplingParams(n=n, max_tokens=tokens)


def assert_idle(pool: SamplerPool, *samplers: SimSampler) -> None:
    view = pool.view()
    assert (view.in_flight, view.queued) == (0, 0)
    assert all(sampler.held == () for sampler in samplers)


def test_a_request_for_n_takes_n_of_the_window_and_one_larger_than_it_enters_alone():
    async def scenario() -> None:
        sampler = replica("a")
        pool = SamplerPool({"a": sampler}, fixed(8))
        async with asyncio.TaskGroup() as group:
            for i, n in enumerate((4, 4, 4, 20, 1)):
                group.create_task(pool.sample(prompt(i), params(n), str(i)))
            await asyncio.sleep(0.01)
            assert sampler.held == ("0", "1")
            while "3" not in sampler.held:
                assert pool.view().in_flight <= 8
                await asyncio.sleep(0.01)
            assert sampler.held == ("3",)
            assert pool.view().in_flight == 20
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_requests_enter_by_priority_then_in_order_of_arrival():
    async def scenario() -> list[str]:
        sampler = replica("a")
        pool, order = SamplerPool({"a": sampler}, fixed(1)), []

        async def call(name: str, priority: int) -> None:
            await pool.sample(prompt(0), params(), name, priority=priority)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for name, priority in (("first", 0), ("late", 0), ("later", 0), ("urgent", -1)):
                group.create_task(call(name, priority))
        return order

    assert run_virtual(scenario()) == ["first", "urgent", "late", "later"]


def test_load_spreads_over_replicas_and_a_session_stays_on_its_own():
    async def scenario() -> None:
        samplers = {name: replica(name) for name in "abc"}
        pool = SamplerPool(samplers, fixed(4))
        async with asyncio.TaskGroup() as group:
            for i in range(6):
                group.create_task(pool.sample(prompt(i), params(), f"r{i}", session=f"s{i}"))
            await asyncio.sleep(0.01)
            homes = {i: name for name, sampler in samplers.items() for i in range(6) if f"r{i}" in sampler.held}
            assert sorted(homes.values()) == list("aabbcc")
        for i in range(6):
            async with asyncio.TaskGroup() as group:
                group.create_task(pool.sample(prompt(100 + i), params(), f"turn2/{i}", session=f"s{i}"))
                await asyncio.sleep(0.01)
                assert samplers[homes[i]].held == (f"turn2/{i}",)
        assert_idle(pool, *samplers.values())

    run_virtual(scenario())


def test_a_session_that_waits_for_its_full_replica_does_not_hold_up_the_other_replicas():
    async def scenario() -> None:
        a, b = replica("a"), replica("b")
        pool = SamplerPool({"a": a, "b": b}, fixed(1))
        async with asyncio.TaskGroup() as group:
            group.create_task(pool.sample(prompt(0), params(tokens=200), "turn1", session="s"))
            await asyncio.sleep(0.01)
            assert a.held == ("turn1",)
            group.create_task(pool.sample(prompt(1), params(), "turn2", session="s"))
            group.create_task(pool.sample(prompt(2), params(), "other"))
            await asyncio.sleep(0.01)
            assert b.held == ("other",)
            await asyncio.sleep(0.4)
            assert (a.held, b.held) == (("turn1",), ())
        assert_idle(pool, a, b)

    run_virtual(scenario())


def test_a_lost_replicas_requests_move_once_and_the_loss_is_reported():
    async def scenario() -> None:
        a, b = replica("a", Fault("crash", at_s=0.1)), replica("b")
        pool = SamplerPool({"a": a, "b": b}, fixed(8))
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(pool.sample(prompt(i), params(), str(i))) for i in range(8)]
            assert await pool.lost.until(bool) == {"a"}
        assert all(len(call.result()) == 1 for call in calls)
        assert pool.view().counts["moved"] == 4
        assert [view.state.split(":")[0] for view in pool.view().replicas] == ["lost", "routable"]
        restarted = replica("a")
        pool.add("a", restarted)
        assert pool.lost.value == frozenset()
        await pool.sample(prompt(9), params(), "again")
        assert_idle(pool, b, restarted)

    run_virtual(scenario())


def test_a_request_whose_second_replica_is_lost_too_is_an_error():
    async def scenario() -> None:
        a, b = replica("a", Fault("crash", at_s=0.1)), replica("b", Fault("crash", at_s=0.2))
        pool = SamplerPool({"a": a, "b": b, "c": replica("c")}, fixed(8))
        with pytest.raises(ReplicaLostError, match="replica b"):
            await pool.sample(prompt(0), params(tokens=100), "r")
        assert_idle(pool, a, b)

    run_virtual(scenario())


def test_a_hung_replica_does_not_hang_its_callers():
    async def scenario() -> float:
        a, b = replica("a", Fault("hang", at_s=0.1)), replica("b")
        pool = SamplerPool({"a": a, "b": b}, fixed(8, stall_timeout_s=20.0))
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(pool.run())
            calls = [group.create_task(pool.sample(prompt(i), params(), str(i))) for i in range(8)]
            async with asyncio.timeout(60):
                for call in calls:
                    await asyncio.wait([call])
            watching.cancel()
        assert all(call.result() for call in calls)
        assert pool.lost.value == {"a"}
        assert "no progress" in pool.view().replicas[0].state
        assert_idle(pool, a, b)
        return asyncio.get_running_loop().time()

    assert 20 < run_virtual(scenario()) < 30


def test_long_answers_are_no_reason_to_declare_a_replica_lost():
    async def scenario() -> None:
        slow = replica("a", Fault("slow", at_s=0.0, factor=300.0))
        pool = SamplerPool({"a": slow}, fixed(8, stall_timeout_s=5.0))
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(pool.run())
            await pool.sample(prompt(0), params(tokens=100), "r")
            watching.cancel()
        assert asyncio.get_running_loop().time() > 100
        assert pool.lost.value == frozenset()

    run_virtual(scenario())


def test_refused_requests_back_off_count_as_congestion_and_come_through():
    async def scenario() -> None:
        sampler = replica("a", Fault("overload", at_s=0.0, seconds=3.0))
        pool = SamplerPool({"a": sampler}, PoolConfig(strategy="adaptive", initial_window=64, max_window=64))
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(pool.sample(prompt(i), params(), str(i))) for i in range(8)]
        assert all(call.result() for call in calls)
        assert pool.view().counts["refused"] >= 8
        assert pool.window < 64
        assert asyncio.get_running_loop().time() > 3
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_a_request_refused_too_often_is_an_error():
    async def scenario() -> None:
        sampler = replica("a", Fault("overload", at_s=0.0))
        pool = SamplerPool({"a": sampler}, fixed(8, max_retries=3))
        with pytest.raises(OverloadedError):
            await pool.sample(prompt(0), params(), "r")
        assert pool.view().counts["refused"] == 4
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_a_late_request_is_aborted_in_the_engine_and_named():
    async def scenario() -> None:
        sampler = replica("a", Fault("slow", at_s=0.0, factor=1e4))
        pool = SamplerPool({"a": sampler}, fixed(8, request_timeout_s=10.0))
        with pytest.raises(DeadlineError, match=r"request r on replica a .* 10 s"):
            await pool.sample(prompt(0), params(), "r")
        assert pool.view().counts["late"] == 1
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_an_abort_in_the_engine_reaches_the_caller_and_is_not_retried():
    async def scenario() -> None:
        sampler = replica("a")
        pool = SamplerPool({"a": sampler}, fixed(8))

        async def abort_soon() -> None:
            await asyncio.sleep(0.05)
            await sampler.abort("r")

        async with asyncio.TaskGroup() as group:
            group.create_task(abort_soon())
            with pytest.raises(AbortedError):
                await pool.sample(prompt(0), params(), "r")
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_other_errors_pass_through_and_free_the_slot():
    async def scenario() -> None:
        sampler = SimSampler("a")
        pool = SamplerPool({"a": sampler}, fixed(1))
        for i in range(3):
            with pytest.raises(WeightsError):
                await pool.sample(prompt(0), params(), str(i))
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_requests_wait_for_a_routable_replica_and_their_deadline_names_every_state():
    async def scenario() -> None:
        a, b = replica("a"), replica("b")
        pool = SamplerPool({"a": a, "b": b}, fixed(8, no_replica_timeout_s=30.0))
        pool.routable("a", False)
        pool.routable("b", False)
        async with asyncio.TaskGroup() as group:
            call = group.create_task(pool.sample(prompt(0), params(), "r"))
            await asyncio.sleep(29)
            assert (a.held, b.held, pool.window) == ((), (), 0)
            pool.routable("b", True)
        assert len(call.result()) == 1
        pool.routable("b", False)
        pool.remove("a")
        pool.add("c", replica("c", Fault("crash", at_s=0.0)))
        with pytest.raises(DeadlineError, match=r"request r2.* b closed, .* c lost: ") as caught:
            await pool.sample(prompt(0), params(), "r2")
        assert "a " not in str(caught.value).split("Replicas:")[1].split(";")[0]
        assert_idle(pool, a, b)

    run_virtual(scenario())


def test_waiting_for_a_busy_pool_is_bounded_too():
    async def scenario() -> None:
        sampler = replica("a", Fault("slow", at_s=0.0, factor=1000.0))
        pool = SamplerPool({"a": sampler}, fixed(1, admission_timeout_s=20.0))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(pool.sample(prompt(0), params(), "r1"))
            await asyncio.sleep(0)
            with pytest.raises(DeadlineError, match="a routable, 1 of 1 in flight"):
                await pool.sample(prompt(0), params(), "r2")
        assert running.result()
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_a_removed_replica_finishes_what_it_runs_and_gets_nothing_new():
    async def scenario() -> None:
        a, b = replica("a"), replica("b")
        pool = SamplerPool({"a": a, "b": b}, fixed(8))
        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(pool.sample(prompt(i), params(tokens=100), str(i))) for i in range(4)]
            await asyncio.sleep(0.01)
            pool.remove("a")
            calls += [group.create_task(pool.sample(prompt(i), params(), f"new{i}")) for i in range(4)]
            await asyncio.sleep(0.01)
            assert len(a.held) == 2
            assert len(b.held) == 6
        assert all(call.result() for call in calls)
        assert pool.lost.value == frozenset()
        assert_idle(pool, a, b)

    run_virtual(scenario())


def test_cancelling_a_request_aborts_it_and_hands_its_slot_on():
    async def scenario() -> None:
        sampler = replica("a", Fault("slow", at_s=0.0, factor=100.0))
        pool = SamplerPool({"a": sampler}, fixed(1))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(pool.sample(prompt(i), params(), str(i))) for i in range(3)]
            await asyncio.sleep(1)
            tasks[0].cancel()
            tasks[1].cancel()
            await asyncio.sleep(1)
            assert sampler.held == ("2",)
            tasks[2].cancel()
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_two_live_requests_cannot_share_an_id():
    async def scenario() -> None:
        pool = SamplerPool({"a": replica("a")}, fixed(8))
        async with asyncio.TaskGroup() as group:
            group.create_task(pool.sample(prompt(0), params(), "r"))
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="request r is alive"):
                await pool.sample(prompt(0), params(), "r")
        await pool.sample(prompt(0), params(), "r")

    run_virtual(scenario())


def test_feed_forward_admission_keeps_expected_contexts_within_the_kv_cache():
    async def scenario() -> int:
        engine = EngineModel(max_num_seqs=64, kv_tokens=2000)
        sampler = SimSampler("a", SimSamplerConfig(engine, mean_tokens=1e4), version=0)
        pool = SamplerPool({}, PoolConfig(strategy="knee", initial_window=64))
        pool.add("a", sampler, kv_tokens=2000)
        async with asyncio.TaskGroup() as group:
            for i in range(30):
                group.create_task(pool.sample(prompt(i), params(tokens=136), f"warm{i}"))
        await pool.sample(prompt(0), params(tokens=136), "length is known now")
        before = (await sampler.stats()).preemptions
        async with asyncio.TaskGroup() as group:
            for i in range(60):
                group.create_task(pool.sample(prompt(i), params(tokens=136), str(i)))
            await asyncio.sleep(0.1)
            assert pool.view().in_flight == int(0.85 * 2000 // 200)
        return (await sampler.stats()).preemptions - before

    assert run_virtual(scenario()) == 0


def test_the_view_and_the_step_summary_carry_every_replicas_numbers():
    async def scenario() -> None:
        samplers = {"a": replica("a"), "b": replica("b")}
        pool = SamplerPool(samplers, PoolConfig(strategy="adaptive", stats_period_s=0.05))
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(pool.run())
            calls = [group.create_task(pool.sample(prompt(i), params(n=4, tokens=100), str(i))) for i in range(8)]
            await asyncio.sleep(0.3)
            view = pool.view()
            assert [(r.name, r.window, r.in_flight, r.routable, r.version) for r in view.replicas] == [
                ("a", 8, 8, True, 0),
                ("b", 8, 8, True, 0),
            ]
            assert (view.window, view.in_flight, view.queued) == (16, 16, 4)
            assert all(r.tokens_per_s > 500 for r in view.replicas)
            for call in calls:
                await asyncio.wait([call])
            watching.cancel()
        summary = pool.step_completed()
        assert summary["a/requests"] + summary["b/requests"] == 32
        assert summary["window"] == summary["a/window_after"] + summary["b/window_after"]
        assert pool.view().counts["completed"] == 8

    run_virtual(scenario())


def test_an_engine_that_takes_no_abort_cannot_keep_the_caller():
    async def scenario() -> tuple[Completion, ...]:
        sampler = replica("a", Fault("hang", at_s=0.1, seconds=10.0))
        pool = SamplerPool({"a": sampler}, fixed(1))
        async with asyncio.TaskGroup() as group:
            stuck = group.create_task(pool.sample(prompt(0), params(tokens=1000), "r"))
            await asyncio.sleep(0.2)
            stuck.cancel()
            await asyncio.wait([stuck])
            assert pool.view().counts["abort_failed"] == 1
            await asyncio.sleep(10)
        return await pool.sample(prompt(0), params(), "next")

    assert run_virtual(scenario())


def test_a_request_that_is_granted_and_cancelled_in_one_step_gives_its_slot_back():
    async def scenario() -> None:
        sampler = replica("a")
        pool = SamplerPool({"a": sampler}, fixed(1))
        pool.routable("a", False)
        async with asyncio.TaskGroup() as group:
            unlucky = group.create_task(pool.sample(prompt(0), params(), "unlucky"))
            heir = group.create_task(pool.sample(prompt(1), params(), "heir"))
            await asyncio.sleep(1)
            pool.routable("a", True)
            assert pool.view().in_flight == 1
            unlucky.cancel()
        assert unlucky.cancelled()
        assert heir.result()
        assert_idle(pool, sampler)

    run_virtual(scenario())


def test_a_replica_that_closes_between_grant_and_sending_gets_nothing():
    async def scenario() -> None:
        sampler = replica("a")
        pool = SamplerPool({"a": sampler}, fixed(4))
        pool.routable("a", False)
        async with asyncio.TaskGroup() as group:
            call = group.create_task(pool.sample(prompt(0), params(), "r"))
            await asyncio.sleep(1)
            pool.routable("a", True)
            assert pool.view().in_flight == 1
            pool.routable("a", False)
            await asyncio.sleep(1)
            assert (sampler.held, pool.view().in_flight, pool.view().queued) == ((), 0, 1)
            pool.routable("a", True)
        assert call.result()
        assert_idle(pool, sampler)

    run_virtual(scenario())
