"""The asyncio building blocks that the standard library lacks (on Python 3.11).

`Channel` is a bounded queue that closes; `Limiter` a FIFO semaphore that resizes; `Watched` a value that can be
awaited; `Lane` a thread that runs synchronous calls in order; `deadline` a timeout whose error says what to do.
State changes are synchronous; nothing here reads a clock.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Generic, ParamSpec, TypeVar

from rlorch.errors import DeadlineError

T = TypeVar("T")
P = ParamSpec("P")


class ChannelClosed(Exception):
    """`put` on a channel that was closed."""


class Channel(Generic[T]):
    """A bounded queue that can be closed: puts then fail, and iteration ends after what is buffered."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a channel needs a capacity of at least 1, not {capacity}")
        self._items: deque[T] = deque()
        self._capacity = capacity
        self._closed = False
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> None:
        """Append, waiting for room. Raises `ChannelClosed`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if self._closed:
                raise ChannelClosed
            self._items.append(item)
            self._changed.notify_all()

    async def close(self) -> None:
        """No more puts; readers drain what is left. Idempotent."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        async with self._changed:
            await self._changed.wait_for(lambda: self._items or self._closed)
            if not self._items:
                raise StopAsyncIteration
            item = self._items.popleft()
            self._changed.notify_all()
            return item


class Limiter:
    """A FIFO semaphore whose limit can change while it is held.

    Shrinking never takes a slot back: holders finish, and nobody new enters until `in_flight < limit`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = max(limit, 0)
        self._in_flight = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        """Slots in all."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """Slots held."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return sum(not waiter.done() for waiter in self._waiters)

    def resize(self, limit: int) -> None:
        """Set the limit; growth wakes waiters at once."""
        self._limit = max(limit, 0)
        self._wake()

    async def acquire(self) -> None:
        """Take a slot, in order of arrival."""
        if self._in_flight < self._limit and not self._waiters:
            self._in_flight += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release()  # granted and cancelled in the same step: hand the slot on
            elif waiter in self._waiters:  # not there when a release of the same step has already skipped it
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Give a slot back."""
        assert self._in_flight > 0, "release without acquire"
        self._in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self._in_flight < self._limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._in_flight += 1
                waiter.set_result(None)


class Watched(Generic[T]):
    """A value that tasks can wait on: `await watched.until(lambda v: v >= 3)`."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._waiters: list[tuple[Callable[[T], bool], asyncio.Future[T]]] = []

    @property
    def value(self) -> T:
        """The value now."""
        return self._value

    def set(self, value: T) -> None:
        """Change the value and wake whoever waited for it."""
        self._value = value
        waiting, self._waiters = self._waiters, []
        for predicate, future in waiting:
            if future.done():
                continue
            if predicate(value):
                future.set_result(value)
            else:
                self._waiters.append((predicate, future))

    async def until(self, predicate: Callable[[T], bool]) -> T:
        """The first value, from now on, that satisfies the predicate."""
        if predicate(self._value):
            return self._value
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        entry = (predicate, future)
        self._waiters.append(entry)
        try:
            return await future
        finally:
            if entry in self._waiters:
                self._waiters.remove(entry)


class Lane:
    """One thread that runs synchronous calls one at a time, in order: how asyncio reaches torch.

    Cancelling a caller does not stop the call that runs; the next call waits for it.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call(*args, **kwargs)` on the lane's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        """Let the running call finish and drop the queued ones. Does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@asynccontextmanager
async def deadline(seconds: float, what: str) -> AsyncGenerator[None]:
    """Bound a wait: after `seconds`, `DeadlineError(what)`. `what` names who, which phase and what to do.

    A `TimeoutError` raised inside for another reason passes unchanged.
    """
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if scope.expired() and not isinstance(error, DeadlineError):
            raise DeadlineError(f"{what} (no answer within {seconds:g} s)") from error
        raise
