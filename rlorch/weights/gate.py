"""The gate between those who need a version to stay and those who change it.

Two sides: *pins* (an evaluation that wants one version from first to last token) and *commits* (a replica switching
weights). Any number of one side may be inside together, never both sides: commits of different replicas do not wait
for each other.

Fair: arrivals queue in order, and nobody passes a waiter of the other side. So a commit waits for the pins before it
and no others, and a stream of pins cannot starve it, nor a stream of commits a pin. Every wait has a deadline whose
error names who holds the gate.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal

from rlorch.aio import deadline

Side = Literal["pin", "commit"]


class Gate:
    """Pins against commits, in order of arrival."""

    def __init__(self) -> None:
        self._side: Side = "pin"
        self._holders: Counter[str] = Counter()
        self._queue: deque[tuple[Side, str, asyncio.Future[None]]] = deque()

    @property
    def holders(self) -> tuple[str, ...]:
        """Who is inside."""
        return tuple(self._holders.elements())

    @property
    def waiting(self) -> int:
        """How many wait to enter."""
        return len(self._queue)

    def pin(self, who: str, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """Hold every version in place. Raises `DeadlineError` when not let in within `timeout_s`."""
        return self._pass("pin", who, timeout_s)

    def commit(self, who: str, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """Keep pins out while a replica switches. Raises `DeadlineError` when not let in within `timeout_s`."""
        return self._pass("commit", who, timeout_s)

    @asynccontextmanager
    async def _pass(self, side: Side, who: str, timeout_s: float) -> AsyncGenerator[None]:
        await self._enter(side, who, timeout_s)
        try:
            yield
        finally:
            self._leave(who)

    async def _enter(self, side: Side, who: str, timeout_s: float) -> None:
        if not self._queue and (not self._holders or self._side == side):
            self._admit(side, who)
            return
        ticket = (side, who, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        held = ", ".join(self.holders) or "others in the queue"
        try:
            async with deadline(timeout_s, f"{who} waits at the gate for {held}: end those, or raise the deadline"):
                await ticket[2]
        except BaseException:
            if ticket[2].done() and not ticket[2].cancelled():
                self._leave(who)  # let in and cancelled in the same step: hand the place on
            elif ticket in self._queue:
                self._queue.remove(ticket)
                self._let_in()
            raise

    def _admit(self, side: Side, who: str) -> None:
        self._side = side
        self._holders[who] += 1

    def _leave(self, who: str) -> None:
        self._holders[who] -= 1
        self._holders += Counter()  # drops zeros
        self._let_in()

    def _let_in(self) -> None:
        """Admit from the front of the queue as long as the side fits."""
        while self._queue and (not self._holders or self._queue[0][0] == self._side):
            side, who, future = self._queue.popleft()
            if not future.done():
                self._admit(side, who)
                future.set_result(None)
