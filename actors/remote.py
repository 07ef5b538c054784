"""One call to an actor: its deadline, its cancellation and its errors, in one place.

* An answer that does not come within the deadline is a `DeadlineError` that names actor and method.
* Cancelling the local await cancels the actor's method (`ray.cancel`); a caller that must be sure also aborts by id.
* What the method raised arrives as the class it was raised as, without Ray's wrapper; a dead actor is a
  `ReplicaLostError`.
* Ray may start two calls to an async actor in another order than they were sent. A port that promises order is
  `ordered`: its next call is sent when the one before has answered.
"""

import asyncio
from contextlib import nullcontext
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError

from rlorch.aio import deadline
from rlorch.errors import AbortedError, ReplicaLostError, RlorchError


class Remote:
    """An actor handle that never leaves its port: `await remote.call("forward", datums)`."""

    def __init__(self, name: str, handle: Any) -> None:
        self.name = name
        self._handle = handle
        self._turn: asyncio.Lock | None = None

    def ordered(self) -> "Remote":
        """The same actor, called one at a time and first in, first out."""
        ordered = Remote(self.name, self._handle)
        ordered._turn = asyncio.Lock()
        return ordered

    async def call(self, method: str, *args: Any, timeout_s: float, hint: str = "its log in logs/ says more") -> Any:
        """Call a method of the actor and return its value.

        Raises:
            DeadlineError: no answer within `timeout_s`.
            ReplicaLostError: the actor is gone.
            RlorchError: whatever the method raised.
        """
        async with self._turn or nullcontext():
            return await self._call(method, args, timeout_s, hint)

    async def _call(self, method: str, args: tuple[Any, ...], timeout_s: float, hint: str) -> Any:
        ref = getattr(self._handle, method).remote(*args)
        try:
            async with deadline(timeout_s, f"{self.name}: {method} did not answer; {hint}"):
                return await ref
        except TaskCancelledError as error:
            raise AbortedError(f"{self.name}: {method} was cancelled") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RlorchError | ValueError):
                raise cause from None
            raise RlorchError(f"{self.name}: {method} failed: {cause!r}\n{error}") from None
        except (asyncio.CancelledError, TimeoutError):  # ours: a deadline of the actor's own is a RayTaskError
            ray.cancel(ref)
            raise
        except RayActorError as error:
            raise ReplicaLostError(f"{self.name}: the actor is gone ({_first_line(error)})") from None
        except RayError as error:
            raise RlorchError(f"{self.name}: {method} failed in Ray: {_first_line(error)}") from error

    def kill(self) -> None:
        """End the actor's process now. Idempotent."""
        ray.kill(self._handle, no_restart=True)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
