import asyncio
import random
from typing import Any

import pytest

from rlorch.errors import DeadlineError
from rlorch.sim.loop import run_virtual
from rlorch.weights.gate import Gate


async def hold(gate: Gate, side: str, who: str, seconds: float, log: list[str], timeout_s: float = 1e6) -> None:
    enter = gate.pin if side == "pin" else gate.commit
    async with enter(who, timeout_s):
        log.append(f"+{who}")
        await asyncio.sleep(seconds)
    log.append(f"-{who}")


def timeline(*arrivals: tuple[float, str, str, float]) -> list[str]:
    """(arrival, side, who, how long) each; the order of entries and exits."""
    log: list[str] = []
    gate = Gate()

    async def arrive(at: float, side: str, who: str, seconds: float) -> None:
        await asyncio.sleep(at)
        await hold(gate, side, who, seconds, log)

    async def world() -> None:
        async with asyncio.TaskGroup() as group:
            for arrival in arrivals:
                group.create_task(arrive(*arrival))
        assert gate.holders == ()
        assert gate.waiting == 0

    run_virtual(world())
    return log


def test_pins_share_and_commits_share_but_they_exclude_each_other() -> None:
    assert timeline((0, "pin", "a", 9), (1, "pin", "b", 3), (2, "commit", "c", 2), (3, "commit", "d", 1)) == [
        "+a", "+b", "-b", "-a", "+c", "+d", "-d", "-c",
    ]  # fmt: skip


def test_a_waiting_commit_is_not_passed_by_later_pins() -> None:
    log = timeline((0, "pin", "a", 5), (1, "commit", "c", 1), (2, "pin", "late", 5), (3, "pin", "later", 5))
    assert log == ["+a", "-a", "+c", "-c", "+late", "+later", "-late", "-later"]


def test_a_waiting_pin_is_not_passed_by_later_commits() -> None:
    log = timeline((0, "commit", "a", 5), (1, "pin", "p", 1), (2, "commit", "late", 5))
    assert log == ["+a", "-a", "+p", "-p", "+late", "-late"]


def test_an_endless_stream_of_pins_does_not_starve_a_commit() -> None:
    pins = [(float(start), "pin", f"p{start}", 2.5) for start in range(40)]
    log = timeline(*pins, (10.5, "commit", "c", 0.5))
    assert log.index("+c") < log.index("+p11")


def test_a_wait_at_the_gate_ends_with_the_holders_names() -> None:
    async def world() -> None:
        gate, log = Gate(), list[str]()
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(gate, "pin", "evaluation of step 3", 100, log))
            await asyncio.sleep(1)
            with pytest.raises(DeadlineError, match=r"sampler-0 .* evaluation of step 3.*10 s"):
                await hold(gate, "commit", "sampler-0", 1, log, timeout_s=10)
            assert asyncio.get_running_loop().time() == 11
            async with gate.pin("late", 1):
                assert gate.holders == ("evaluation of step 3", "late"), "the queue forgot the commit that gave up"

    run_virtual(world())


def test_those_behind_a_cancelled_waiter_are_let_in() -> None:
    async def world() -> list[str]:
        gate, log = Gate(), list[str]()
        async with asyncio.TaskGroup() as group:
            group.create_task(hold(gate, "pin", "a", 10, log))
            await asyncio.sleep(1)
            commit = group.create_task(hold(gate, "commit", "c", 1, log))
            await asyncio.sleep(1)
            group.create_task(hold(gate, "pin", "b", 1, log))
            await asyncio.sleep(1)
            commit.cancel()
        return log

    assert run_virtual(world()) == ["+a", "+b", "-b", "-a"]


@pytest.mark.parametrize("seed", range(20))
def test_no_random_program_mixes_the_sides_or_leaves_anyone_inside(seed: int) -> None:
    rng = random.Random(seed)
    inside: dict[str, str] = {}
    gate = Gate()

    async def visitor(number: int) -> None:
        await asyncio.sleep(rng.random() * 20)
        side = rng.choice(["pin", "commit"])
        try:
            async with (gate.pin if side == "pin" else gate.commit)(f"v{number}", rng.choice([0.0, 1, 1e6])):
                inside[f"v{number}"] = side
                assert len(set(inside.values())) == 1, inside
                try:
                    await asyncio.sleep(rng.random() * 3)
                finally:
                    del inside[f"v{number}"]
        except DeadlineError:
            pass

    async def world() -> Any:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(visitor(number)) for number in range(30)]
            for task in tasks:
                await asyncio.sleep(rng.random())
                if rng.random() < 0.3:
                    task.cancel()
        assert gate.holders == ()
        assert gate.waiting == 0

    run_virtual(world())
