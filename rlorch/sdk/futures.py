"""What a training call returns: a future that blocks, awaits, and does not swallow its error.

The surface is that of tinker's `APIFuture`. Without `.result()` an error would pass unseen, so a future that is dropped
before anybody asked for its outcome logs the error that it ended with, at once or when it ends.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Generator
from typing import Any, Generic, TypeVar

from rlorch.errors import DeadlineError

T = TypeVar("T")

log = logging.getLogger(__name__)


class ApiFuture(Generic[T]):
    """The outcome of one operation. `what` names it in messages."""

    def __init__(self, future: "concurrent.futures.Future[T]", what: str) -> None:
        self._future = future
        self._what = what
        self._collected = False

    def result(self, timeout: float | None = None) -> T:
        """Wait for the outcome and return it, or raise its error.

        Raises:
            DeadlineError: `timeout` seconds passed; the operation goes on, ask again.
        """
        self._collected = True
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            if self._future.done():
                raise
            raise self._late(timeout) from error

    async def result_async(self, timeout: float | None = None) -> T:
        """`result`, awaited on the caller's event loop. A timeout does not cancel the operation."""
        self._collected = True
        waiter = asyncio.wrap_future(self._future)
        scope = asyncio.timeout(timeout)
        try:
            async with scope:
                return await asyncio.shield(waiter)
        except TimeoutError as error:
            if not scope.expired():
                raise
            waiter.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise self._late(timeout) from error

    def done(self) -> bool:
        """Whether the outcome is there."""
        return self._future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the outcome and return its error, None where it has a result."""
        self._collected = True
        return self._future.exception(timeout)

    def future(self) -> "concurrent.futures.Future[T]":
        """The underlying future, for `concurrent.futures.wait` and callbacks."""
        self._collected = True
        return self._future

    async def coroutine(self) -> T:
        """This future as a coroutine."""
        return await self.result_async()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __del__(self) -> None:
        if not getattr(self, "_collected", True):
            what = self._what
            self._future.add_done_callback(lambda ended: _log_lost_error(ended, what))

    def _late(self, timeout: float | None) -> DeadlineError:
        return DeadlineError(f"{self._what}: not done within {timeout:g} s; it goes on, ask for its result again")


def _log_lost_error(future: "concurrent.futures.Future[Any]", what: str) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("%s failed and nobody asked for its result: %s: %s", what, type(error).__name__, error)
