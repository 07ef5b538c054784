"""The ranks of one role as one remote: every call goes to all of them, in the same order, and has one answer.

Ranks compute together, so a call ends for all or for none:

* All answer: the answer is rank 0's.
* All refuse with the same error: that error; they are in step and take the next call.
* Anything else (one is gone, one failed, one does not answer, the caller was cancelled): the others wait inside a
  collective, or are a call behind. All are killed, the error names the rank, and later calls are `ReplicaLostError`.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import ray

from rlorch.errors import ReplicaLostError, RlorchError

from .remote import Remote

GRACE_S = 10.0  # between the first rank's failure and giving up on the others: a common refusal takes milliseconds


class RemoteRanks:
    """Actors that are one role, by rank, called like a `Remote`. Calls run one at a time, first in, first out."""

    def __init__(self, name: str, remotes: Sequence[Remote], grace_s: float = GRACE_S) -> None:
        self.name = name
        self._grace_s = grace_s
        self._remotes = tuple(remotes)
        self._turn = asyncio.Lock()
        self._lost: str | None = None

    def ordered(self) -> "RemoteRanks":
        """Itself: ranks are always called in order."""
        return self

    async def call(self, method: str, *args: Any, timeout_s: float, hint: str = "its log in logs/ says more") -> Any:
        """Call a method of every rank; rank 0's answer.

        Raises:
            DeadlineError: a rank did not answer within `timeout_s`.
            ReplicaLostError: a rank is gone, now or before.
            RlorchError: what all ranks raised, or what the first that failed raised.
        """
        shared = [ray.put(value) for value in args]  # one copy for all ranks of a node
        return await self.call_each(method, [shared] * len(self._remotes), timeout_s=timeout_s, hint=hint)

    async def call_each(
        self, method: str, arguments: Sequence[Sequence[Any]], *, timeout_s: float, hint: str = "see its log"
    ) -> Any:
        """`call` with arguments of its own for each rank."""
        async with self._turn:
            if self._lost is not None:
                raise ReplicaLostError(f"{self.name}: {method} after {self._lost}; all its ranks were ended")
            answers: dict[int, Any] = {}
            failures: dict[int, Exception] = {}
            failed = asyncio.Event()

            async def one(rank: int, remote: Remote) -> None:
                try:
                    answers[rank] = await remote.call(method, *arguments[rank], timeout_s=timeout_s, hint=hint)
                except Exception as error:
                    failures[rank] = error
                    failed.set()

            async def give_up(calls: list[asyncio.Task[None]]) -> None:
                await failed.wait()
                await asyncio.sleep(self._grace_s)
                for call in calls:
                    call.cancel()

            try:
                async with asyncio.TaskGroup() as tasks:
                    calls = [tasks.create_task(one(rank, remote)) for rank, remote in enumerate(self._remotes)]
                    watch = tasks.create_task(give_up(calls))
                    await asyncio.wait(calls)
                    watch.cancel()
            except asyncio.CancelledError:
                self._end(f"{method} was cancelled")
                raise
            if not failures:
                return answers[0]
            raise self._failure(method, failures)

    def kill(self) -> None:
        """End the processes of all ranks now. Idempotent."""
        for remote in self._remotes:
            remote.kill()

    def _failure(self, method: str, failures: dict[int, Exception]) -> Exception:
        """The error to raise; ends the ranks unless all refused alike."""
        rank, first = next(iter(failures.items()))
        said = {(type(error), str(error)) for error in failures.values()}
        if len(failures) == len(self._remotes) and len(said) == 1 and isinstance(first, RlorchError | ValueError):
            return first
        gone = next((error for error in failures.values() if isinstance(error, ReplicaLostError)), None)
        self._end(f"rank {rank} of {len(self._remotes)} failed in {method} ({gone or first})")
        return gone or first

    def _end(self, why: str) -> None:
        self._lost = why
        self.kill()


def meeting_point() -> str:
    """A free TCP port of this node as an init method: for rank 0 to listen on, right away."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]
    return f"tcp://{host}:{port}"
