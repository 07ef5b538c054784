"""The requests in flight in one engine, and the futures of those who wait for them.

A request is `n` sequences of the backend; its future ends when the last one has, or with the first that fails. Owned
by the engine's thread. Invariant: a request leaves the table exactly when its future ends.
"""

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from rlorch.engine.backend import Backend, Outcome, Sample
from rlorch.errors import AbortedError, RlorchError
from rlorch.types import Completion, SamplingParams, Tokens

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What a caller wants sampled, and since when it waits (monotonic clock)."""

    prompt_T: Tokens
    params: SamplingParams
    submitted_s: float


@dataclass(slots=True, eq=False)
class _Request:
    future: Future[tuple[Completion, ...]]
    keys: tuple[str, ...]
    adapter: str | None
    done: dict[str, Completion] = field(default_factory=dict[str, Completion])


class Requests:
    """The table. `backend` is set before the first request."""

    backend: Backend

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request_id: str, ask: Ask, future: Future[tuple[Completion, ...]]) -> None:
        """Start the sequences of a request. What the backend refuses becomes the future's ValueError."""
        if request_id in self._requests:
            fail(future, ValueError(f"request id {request_id!r} is in use"))
            return
        keys = tuple(f"{request_id}/{index}" for index in range(ask.params.n))
        for index, key in enumerate(keys):
            seed = None if ask.params.seed is None else ask.params.seed + index
            try:
                self.backend.add(Sample(key, ask.prompt_T, replace(ask.params, n=1, seed=seed), ask.submitted_s))
            except ValueError as error:
                self.backend.drop(keys[:index])
                fail(future, ValueError(f"request {request_id!r}: {error}"))
                return
        self._requests[request_id] = _Request(future, keys, ask.params.adapter)
        self._request_of |= dict.fromkeys(keys, request_id)

    def uses(self, adapter: str) -> bool:
        """Whether a request in flight is of this adapter."""
        return any(request.adapter == adapter for request in self._requests.values())

    def abort(self, request_id: str) -> None:
        """End a request with `AbortedError`; unknown ids are ignored."""
        if request_id in self._requests:
            self._drop(request_id, AbortedError(f"request {request_id!r} was aborted"))

    def drop_all(self, error: Exception) -> None:
        """End every request, and its sequences in the backend."""
        for request_id in list(self._requests):
            self._drop(request_id, error)

    def lose(self, error: Exception) -> None:
        """End every future without touching the backend, which is gone."""
        for request_id in list(self._requests):
            fail(self._requests.pop(request_id).future, error)

    def deliver(self, finished: Sequence[tuple[str, Outcome]]) -> list[float]:
        """Take what the backend finished; the queue times (seconds) of the completions."""
        queue_s: list[float] = []
        for key, outcome in finished:
            request_id = self._request_of.get(key)
            if request_id is None:
                continue  # a sibling failed and took the request with it
            if isinstance(outcome, RlorchError):
                self._drop(request_id, outcome)
                continue
            request = self._requests[request_id]
            request.done[key] = outcome
            queue_s.append(outcome.queue_s)
            if len(request.done) == len(request.keys):
                self._forget(request_id)
                finish(request.future, tuple(request.done[other] for other in request.keys))
        return queue_s

    def _drop(self, request_id: str, error: Exception) -> None:
        request = self._forget(request_id)
        self.backend.drop([key for key in request.keys if key not in request.done])
        fail(request.future, error)

    def _forget(self, request_id: str) -> _Request:
        request = self._requests.pop(request_id)
        for key in request.keys:
            del self._request_of[key]
        return request


def finish(future: Future[T], result: T) -> None:
    """Set a result that the caller may no longer want."""
    try:
        future.set_result(result)
    except InvalidStateError:
        return  # the caller cancelled it


def fail(future: Future[Any], error: Exception) -> None:
    """Set an error that the caller may no longer want."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        return  # the caller cancelled it
