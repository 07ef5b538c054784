"""The awaitable controllers: order, resizing, cancellation."""

import asyncio
import random

import pytest

from rlorch.aio import Limiter
from rlorch.pool.controllers import AdaptiveConcurrencyController, FixedConcurrencyController
from rlorch.pool.strategy import ResponseMetrics
from rlorch.sim.loop import run_virtual


def test_slots_are_granted_in_order_of_arrival():
    async def scenario() -> list[int]:
        controller, order = FixedConcurrencyController(2), []

        async def caller(i: int) -> None:
            await controller.acquire()
            order.append(i)
            await asyncio.sleep(1)
            controller.release()

        async with asyncio.TaskGroup() as group:
            for i in range(6):
                group.create_task(caller(i))
        assert controller.in_flight == 0
        return order

    assert run_virtual(scenario()) == list(range(6))


def test_a_shrunk_window_lets_running_attempts_finish_and_admits_nobody_until_they_have():
    async def scenario() -> None:
        controller = AdaptiveConcurrencyController(initial_window=8, clock=asyncio.get_running_loop().time)
        for _ in range(8):
            await controller.acquire()
        entered = asyncio.Event()

        async def late() -> None:
            await controller.acquire()
            entered.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(late())
            await asyncio.sleep(0)
            controller.release(ResponseMetrics(status_code=429))
            assert controller.window_size == 4
            for _ in range(3):
                controller.release()
            await asyncio.sleep(0)
            assert controller.in_flight == 4
            assert not entered.is_set()
            controller.release()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert entered.is_set()

    run_virtual(scenario())


def test_growth_at_the_end_of_a_step_wakes_those_who_wait():
    async def scenario() -> dict[str, float]:
        controller = AdaptiveConcurrencyController(initial_window=1)
        await controller.acquire()
        async with asyncio.TaskGroup() as group:
            group.create_task(controller.acquire())
            group.create_task(controller.acquire())
            await asyncio.sleep(0)
            controller.release(ResponseMetrics(0.1))
            await asyncio.sleep(0)
            assert controller.in_flight == 1
            summary = controller.step_completed()
        assert controller.in_flight == 2
        return summary

    summary = run_virtual(scenario())
    assert (summary["window"], summary["window_after"]) == (1, 5)


def test_a_release_too_many_is_an_error():
    with pytest.raises(ValueError, match="release"):
        FixedConcurrencyController(1).release()


def test_a_controller_serves_one_event_loop_after_another():
    controller = AdaptiveConcurrencyController(initial_window=1)

    async def use() -> None:
        await controller.acquire()
        controller.release(ResponseMetrics(0.1))

    asyncio.run(use())
    asyncio.run(use())
    assert controller.in_flight == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_lost_or_doubled_when_callers_are_cancelled_at_random(seed: int):
    async def scenario() -> None:
        rng = random.Random(seed)
        controller = AdaptiveConcurrencyController(initial_window=3, adjustment_interval=2)

        async def caller() -> None:
            await controller.acquire()
            try:
                assert controller.in_flight >= 1
                await asyncio.sleep(rng.choice((0, 0.5, 1.0)))
            finally:
                controller.release(ResponseMetrics(rng.choice((0.1, 9.0))))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(caller()) for _ in range(40)]
            for _ in range(30):
                await asyncio.sleep(rng.choice((0, 0.25)))
                rng.choice(tasks).cancel()
        assert controller.in_flight == 0

    run_virtual(scenario())


@pytest.mark.parametrize("kind", ["limiter", "controller"])
def test_a_waiter_cancelled_in_the_step_of_a_release_leaves_the_queue_intact(kind: str):
    async def scenario() -> None:
        slots = Limiter(1) if kind == "limiter" else FixedConcurrencyController(1)
        await slots.acquire()
        async with asyncio.TaskGroup() as group:
            unlucky, heir = group.create_task(slots.acquire()), group.create_task(slots.acquire())
            await asyncio.sleep(0)
            unlucky.cancel()
            slots.release()
        assert (unlucky.cancelled(), heir.done(), slots.in_flight) == (True, True, 1)

    run_virtual(scenario())
