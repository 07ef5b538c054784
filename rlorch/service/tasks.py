"""Background work that outlives the call that began it, in one TaskGroup that the service opens and closes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from rlorch.errors import InvariantError

_log = logging.getLogger(__name__)


class Tasks:
    """A TaskGroup of its own task, so that any call may add to it. An error in one task ends that task alone.

    Between `start` and `close` only; `close` cancels what runs and waits for it.
    """

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._root: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the group."""
        opened = asyncio.get_running_loop().create_future()
        self._root = asyncio.get_running_loop().create_task(self._hold(opened), name="service")
        await opened

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run `work` beside everything else. An error that escapes it is logged with its traceback."""
        if self._group is None:
            work.close()
            raise InvariantError(f"{name} was begun before start or after close")
        task = self._group.create_task(_contained(name, work), name=name)
        task.add_done_callback(lambda _: work.close())  # of a task that was cancelled before its first step
        return task

    def every(self, name: str, seconds: float, work: Callable[[], Awaitable[object]]) -> "asyncio.Task[None]":
        """Call `work` again and again, `seconds` after the last call ended; its errors are logged."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                await _contained(name, work())

        return self.spawn(name, repeat())

    async def close(self) -> None:
        """Cancel everything and wait until it has ended. Idempotent."""
        root, self._root = self._root, None
        if root is not None:
            root.cancel()
            await asyncio.wait([root])
            if not root.cancelled() and (error := root.exception()) is not None:
                raise error

    async def _hold(self, opened: "asyncio.Future[None]") -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                opened.set_result(None)
                await asyncio.get_running_loop().create_future()  # until it is cancelled
        finally:
            self._group = None


async def _contained(name: str, work: Awaitable[object]) -> None:
    try:
        await work
    except Exception:
        _log.exception("%s failed", name)
