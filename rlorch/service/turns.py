"""Turns on the hosts of jobs: one call at a time per job, in the order of asking, cut short when the host has gone."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rlorch.errors import ReplicaLostError

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Line:
    """What the models of a job share: whose turn it is, and why the host has gone."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    gone: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Turns:
    """The lines of all jobs. A host that comes begins a new line, one that goes ends what is asked of it."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def hosted(self, job_id: str) -> None:
        """The job has a host."""
        self._lines[job_id] = _Line()

    def unhosted(self, job_id: str, why: str) -> None:
        """The job's host has gone: what is being asked of it ends in a `ReplicaLostError` that says why. Idempotent."""
        line = self._lines.pop(job_id, None)
        if line is not None:
            line.gone.set_result(why)

    @asynccontextmanager
    async def turn(self, job_id: str) -> AsyncGenerator[None]:
        """Hold the job's turn; waits for it in the order of asking."""
        async with self._lines.setdefault(job_id, _Line()).turn:
            yield

    async def ask(self, job_id: str, call: Awaitable[T]) -> T:
        """`call`'s value. Raises `ReplicaLostError` when the host goes meanwhile: nobody would ever answer."""
        line = self._lines.get(job_id)
        if line is None:
            return await call
        scope = asyncio.timeout(None)
        waiting = True

        def cut(_: object) -> None:
            if waiting:
                scope.reschedule(asyncio.get_running_loop().time())

        try:
            async with scope:
                line.gone.add_done_callback(cut)
                try:
                    return await call
                finally:
                    waiting = False
                    line.gone.remove_done_callback(cut)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise ReplicaLostError(line.gone.result()) from error
