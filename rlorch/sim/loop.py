"""Virtual time: an event loop whose clock jumps to the next timer instead of waiting for it.

Unchanged asyncio code (TaskGroup, sleep, timeout, Condition) runs on it as fast as the processor allows: a simulated
day takes milliseconds, and the same program gives the same interleaving every time. It holds because:

1. The clock moves only when nothing is runnable, and then exactly to the earliest timer.
2. Work on threads (`asyncio.to_thread`, `Lane`, any executor) takes no virtual time: while a thread works for the
   loop, the clock stands still and the loop really waits for it.
3. When nothing is runnable, no thread works and no timer is set, no event can ever come: `DeadlockError`, which names
   every waiting task and the line where it waits.

Sockets and subprocesses are outside the contract: their events are delivered, but the clock does not wait for them.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rlorch.errors import InvariantError

T = TypeVar("T")

# Real seconds that one wait for a thread may take before it counts as stuck: a thread that waits for virtual time to
# pass waits for ever, because the clock waits for the thread.
THREAD_PATIENCE_S = 60.0


class DeadlockError(InvariantError, RuntimeError):
    """Every task waits for something that no task, timer or thread can bring; the message names the tasks."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock of its own, in virtual seconds, that starts at 0 and must not pass `limit_s`."""

    def __init__(self, thread_patience_s: float = THREAD_PATIENCE_S, limit_s: float = float("inf")) -> None:
        self._virtual_now = 0.0
        self._limit_s = limit_s
        self._thread_patience_s = thread_patience_s
        self._thread_calls: list[str] = []
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual_now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """As in asyncio; the clock stands still until the call has returned."""
        future = super().run_in_executor(executor, func, *args)
        name = _call_name(func)
        self._thread_calls.append(name)
        future.add_done_callback(lambda _: self._thread_calls.remove(name))
        return future

    async def shutdown_default_executor(self, *timeout: Any) -> None:
        """As in asyncio; joining the executor's threads is itself work on a thread."""
        self._thread_calls.append("join of the default executor")
        try:
            await super().shutdown_default_executor(*timeout)
        finally:
            self._thread_calls.remove("join of the default executor")

    def next_event(self, poll: Callable[[float | None], list[Any]], timeout: float | None) -> list[Any]:
        """What `select(timeout)` means here: ready events, else wait for threads, else jump, else `DeadlockError`."""
        ready = poll(0)
        if ready or timeout == 0:
            return ready
        if self._thread_calls:
            ready = poll(self._thread_patience_s)
            if not ready:
                raise DeadlockError(
                    f"at virtual time {self._virtual_now:g} s: threads did not return within "
                    f"{self._thread_patience_s:g} real seconds: {', '.join(self._thread_calls)}; a call on a thread "
                    "must not wait for virtual time to pass"
                )
            return ready
        if timeout is None:
            raise DeadlockError(
                f"deadlock at virtual time {self._virtual_now:g} s: every task waits and no timer is set. "
                f"Give the wait a deadline or wake it. {_describe_tasks(self)}"
            )
        if self._virtual_now + timeout > self._limit_s:
            limit_s, self._limit_s = self._limit_s, float("inf")  # said once: what follows is clean-up
            raise DeadlockError(
                f"virtual time passes its limit of {limit_s:g} s: a periodic task keeps the clock going while the "
                f"rest waits. {_describe_tasks(self)}"
            )
        self._virtual_now += timeout
        return ready


class _JumpingSelector(selectors.DefaultSelector):
    """Asks the loop what a wait means; holds no state."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        return self._loop.next_event(super().select, timeout)


def run_virtual(coro: Coroutine[Any, Any, T], *, limit_s: float = float("inf")) -> T:
    """Run a coroutine to its end in virtual time and return its result.

    Args:
        limit_s: virtual seconds it may take. Programs with periodic tasks (a poll of gauges) need one: their timers
            hide a deadlock, and without a limit the clock runs on for ever.

    Raises:
        DeadlockError: every task waits and nothing can wake one, or the limit is passed.
        InvariantError: the coroutine returned while tasks that it started were still alive.
    """

    async def main() -> T:
        result = await coro
        await asyncio.sleep(0)  # a task that was just cancelled or told to end gets its last step
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            raise InvariantError(f"the program returned with tasks still alive. {_describe_tasks(left=left)}")
        return result

    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(limit_s=limit_s)) as runner:
        return runner.run(main())


def _call_name(func: Callable[..., Any]) -> str:
    if isinstance(func, functools.partial):  # asyncio.to_thread passes partial(context.run, func, ...)
        inner = next((arg for arg in func.args if callable(arg)), func.func)
        return _call_name(inner)
    return getattr(func, "__qualname__", None) or repr(func)


def _describe_tasks(loop: asyncio.AbstractEventLoop | None = None, left: set[asyncio.Task[Any]] | None = None) -> str:
    tasks = asyncio.all_tasks(loop) if left is None else left
    lines = sorted(f"{task.get_name()} at {_waiting_at(task)}" for task in tasks)
    return f"{len(lines)} tasks: " + "; ".join(lines)


def _waiting_at(task: asyncio.Task[Any]) -> str:
    """`function:line` of every suspended frame, outermost first."""
    frames: list[str] = []
    coro: Any = task.get_coro()
    while coro is not None and (frame := getattr(coro, "cr_frame", None)) is not None:
        frames.append(f"{coro.__qualname__}:{frame.f_lineno}")
        coro = coro.cr_await
    return " > ".join(frames) or repr(coro)
