"""One thread that steps an engine, and everything around the steps that does not depend on which engine it is.

`SteppedEngine` implements `SamplerEngine` over a `Backend`. Its thread alternates: run the commands that have come in
(submit, abort, score, commit ...), then one decode step, then hand out what finished. With nothing to decode it
blocks on the command queue. So commands are step-atomic, and a commit needs no pause protocol.

Invariants: every future ends, whatever happens: finished, aborted, refused, or `ReplicaLostError` when the thread
dies (a step raised) or the engine is closed. Weights without a name serve nobody: when they are lost, the requests
in flight fail and new ones are refused until the next `load`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np

from rlorch.engine.live_weights import UNLOADED, LiveWeights, Prepared
from rlorch.engine.self_test import run_self_test
from rlorch.errors import (
    AbortedError,
    ChainBrokenError,
    DeadlineError,
    OverloadedError,
    ReplicaLostError,
    RlorchError,
    SelfTestError,
    WeightsError,
)
from rlorch.types import CommitReport, Completion, EngineStats, Floats, Manifest, SamplingParams, Tokens
from rlorch.weights.codec import decode_update
from rlorch.weights.update import apply_update

T = TypeVar("T")
Outcome = Completion | RlorchError

CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for the step that is running."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence to generate: `params.n` is 1 and the seed its own. `submitted_s` is on the monotonic clock."""

    key: str
    prompt_T: Tokens
    params: SamplingParams
    submitted_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """A backend's load as of its last step; the last two count since start."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    generated_tokens: int = 0
    preemptions: int = 0


class Backend(Protocol):
    """What a model runner must do. All calls come from the engine's thread."""

    weights: LiveWeights
    vocab_size: int
    max_model_len: int

    def add(self, sample: Sample) -> None:
        """Queue a sequence. Raises ValueError for parameters that it does not take."""
        ...

    def drop(self, keys: Sequence[str]) -> None:
        """Forget sequences that were added and have not finished."""
        ...

    def step(self) -> Sequence[tuple[str, Outcome]]:
        """One decode step; what finished, by key. Raises only what the engine cannot survive."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def score(self, tokens_T: Tokens) -> tuple[Floats, Sequence[tuple[str, Outcome]]]:
        """Score a sequence now; also whatever other sequences finished meanwhile."""
        ...

    def committed(self, version: int) -> None:
        """The live weights are `version` from here on: stamp running sequences, separate the prefix caches."""
        ...

    def load(self) -> Load:
        """Load as of the last step."""
        ...

    def close(self) -> None:
        """Free the device."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Command:
    """What the engine's thread shall run, and the future that must fail if it never does."""

    run: Callable[[], None]
    future: Future[Any]


@dataclass(slots=True, eq=False)
class _Request:
    future: Future[tuple[Completion, ...]]
    keys: tuple[str, ...]
    done: dict[str, Completion] = field(default_factory=dict[str, Completion])


@dataclass(frozen=True, slots=True, eq=False)
class _Staged:
    prepared: Prepared
    payload_bytes: int
    stage_s: float


class SteppedEngine:
    """A `SamplerEngine` over a backend that is built, stepped and closed by one thread."""

    def __init__(
        self,
        name: str,
        build: Callable[[], Backend],
        *,
        start_timeout_s: float,
        timeout_s: float,
        live_digest_every: int,
    ) -> None:
        """Start the thread and wait until the backend is built; its error is raised here.

        `timeout_s` bounds every later call that waits for the thread.
        """
        self._name = name
        self._timeout_s = timeout_s
        self._live_digest_every = live_digest_every
        self._lock = threading.Lock()
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._dead: ReplicaLostError | None = None
        self._closing = False
        # The thread's own:
        self._requests: dict[str, _Request] = {}
        self._request_of: dict[str, str] = {}
        self._commits = 0
        self._tested = False
        self._last_report: CommitReport | None = None
        # Shared, under the lock:
        self._staged: dict[int, _Staged] = {}
        self._load = Load()
        self._version = UNLOADED
        self._queue_s: deque[float] = deque()

        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, ready), name=f"engine-{name}", daemon=True)
        self._thread.start()
        try:
            ready.result(start_timeout_s)
        except FutureTimeout:
            self._die(ReplicaLostError(f"engine {name} was given up while starting"))
            raise DeadlineError(
                f"engine {name} did not start within {start_timeout_s:g} s: raise sampler.start_timeout_s"
            ) from None

    # --- any thread ---------------------------------------------------------------------------------------

    def submit(self, prompt_T: Tokens, params: SamplingParams, request_id: str) -> Future[tuple[Completion, ...]]:
        """See `SamplerEngine.submit`."""
        self._check(prompt_T, params)
        future: Future[tuple[Completion, ...]] = Future()
        submitted_s = time.monotonic()
        self._post(lambda: self._submit(prompt_T, params, request_id, submitted_s, future), future)
        return future

    def abort(self, request_id: str) -> None:
        """See `SamplerEngine.abort`."""
        self._post(lambda: self._abort(request_id), Future())

    def score(self, tokens_T: Tokens) -> Future[Floats]:
        """See `SamplerEngine.score`."""
        if not 2 <= len(tokens_T) < self._max_model_len:
            raise ValueError(f"a sequence to score has 2 to {self._max_model_len - 1} tokens, not {len(tokens_T)}")
        return self._call(lambda: self._score(tokens_T))

    def load(self, updates: Sequence[tuple[Manifest, bytes]]) -> CommitReport:
        """See `SamplerEngine.load`."""
        start_s = time.monotonic()
        if not updates or updates[0][0].kind != "anchor":
            raise ChainBrokenError(f"engine {self._name}: a load begins with an anchor")
        state: Mapping[str, Any] = {}
        for position, (manifest, payload) in enumerate(updates):
            held = updates[position - 1][0].version
            if position and manifest.kind == "delta" and manifest.base_version != held:
                raise ChainBrokenError(
                    f"engine {self._name}: version {manifest.version} is a delta against {manifest.base_version}, "
                    f"but comes after {held}"
                )
            state = apply_update(state if manifest.kind == "delta" else None, decode_update(manifest, payload))
        stage_s = time.monotonic() - start_s
        payload_bytes = sum(len(payload) for _, payload in updates)
        call = self._call(lambda: self._replace(updates[-1][0], state, stage_s, payload_bytes))
        return self._wait(call, f"load version {updates[-1][0].version}")

    def stage(self, manifest: Manifest, payload: bytes) -> None:
        """See `SamplerEngine.stage`."""
        with self._lock:
            self._alive()
            if manifest.version == self._version or manifest.version in self._staged:
                return
            if self._version == UNLOADED:
                raise ChainBrokenError(f"engine {self._name} has no weights to stage onto: load an anchor first")
        start_s = time.monotonic()
        prepared = self._weights.prepare(manifest, decode_update(manifest, payload))
        staged = _Staged(prepared, len(payload), time.monotonic() - start_s)
        with self._lock:
            self._staged[manifest.version] = staged

    def commit(self, version: int) -> CommitReport:
        """See `SamplerEngine.commit`."""
        return self._wait(self._call(lambda: self._commit(version)), f"commit version {version}")

    def stats(self) -> EngineStats:
        """See `SamplerEngine.stats`."""
        with self._lock:
            self._alive()
            load, queue_s = self._load, tuple(self._queue_s)
            self._queue_s.clear()
            return EngineStats(
                version=self._version,
                running=load.running,
                waiting=load.waiting,
                kv_usage=load.kv_usage,
                generated_tokens=load.generated_tokens,
                preemptions=load.preemptions,
                queue_s=queue_s,
            )

    def self_test(self) -> None:
        """See `SamplerEngine.self_test`."""
        self._wait(self._call(self._self_test), "self-test")

    def close(self) -> None:
        """See `SamplerEngine.close`."""
        self._closing = True
        self._commands.put(_Command(lambda: None, Future()))
        self._thread.join(CLOSE_TIMEOUT_S)
        self._die(ReplicaLostError(f"engine {self._name} was closed"))

    def _check(self, prompt_T: Tokens, params: SamplingParams) -> None:
        if not 1 <= len(prompt_T) < self._max_model_len:
            raise ValueError(
                f"a prompt has 1 to {self._max_model_len - 1} tokens, not {len(prompt_T)}: shorten it or raise "
                "sampler.max_model_len"
            )
        low, high = int(np.min(prompt_T)), int(np.max(prompt_T))
        if low < 0 or high >= self._vocab_size:
            raise ValueError(f"token {low if low < 0 else high} is not in the vocabulary of {self._vocab_size}")
        if params.n < 1 or params.max_tokens < 1 or params.temperature < 0 or not 0 < params.top_p <= 1:
            raise ValueError(f"sampling parameters are out of range: {params}")

    def _post(self, command: Callable[[], None], future: Future[Any]) -> None:
        """Queue a command; one that raises ends the engine. If the engine is dead, raise."""
        with self._lock:
            self._alive()
            self._commands.put(_Command(command, future))

    def _call(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def command() -> None:
            try:
                result = call()
            except RlorchError as error:
                _fail(future, error)
            except Exception as error:
                _fail(future, ReplicaLostError(f"engine {self._name} died: {error!r}; restart the replica"))
                raise
            else:
                _finish(future, result)

        self._post(command, future)
        return future

    def _wait(self, future: Future[T], what: str) -> T:
        try:
            return future.result(self._timeout_s)
        except FutureTimeout:
            if future.done():
                raise
            raise DeadlineError(
                f"engine {self._name} did not {what} within {self._timeout_s:g} s: replace the replica"
            ) from None

    def _alive(self) -> None:
        if self._dead:
            raise ReplicaLostError(str(self._dead))

    def _die(self, error: ReplicaLostError) -> None:
        """Refuse calls from now on and fail whatever waits. Idempotent; the first error stays."""
        with self._lock:
            self._dead = self._dead or error
            error = self._dead
            self._staged.clear()
        while not self._commands.empty():
            _fail(self._commands.get().future, error)
        self._fail_all(error)

    # --- the engine's thread ------------------------------------------------------------------------------

    def _run(self, build: Callable[[], Backend], ready: Future[None]) -> None:
        try:
            self._backend = build()
        except Exception as error:
            self._dead = ReplicaLostError(f"engine {self._name} did not start: {error!r}")
            _fail(ready, error)
            return
        self._weights = self._backend.weights
        self._vocab_size, self._max_model_len = self._backend.vocab_size, self._backend.max_model_len
        _finish(ready, None)
        try:
            while not self._closing and self._dead is None:
                self._turn()
        except Exception as error:
            lost = ReplicaLostError(
                f"engine {self._name} died in a step at version {self._weights.version}: {error!r}; restart the replica"
            )
            lost.__cause__ = error
            self._die(lost)
        finally:
            self._backend.close()

    def _turn(self) -> None:
        """Commands, then a step, then what finished. Blocks while there is nothing to do."""
        if not self._backend.busy:
            self._commands.get().run()
        while not self._commands.empty():
            self._commands.get().run()
        if self._backend.busy and not self._closing and self._dead is None:
            self._deliver(self._backend.step())
        load = self._backend.load()
        with self._lock:
            self._load = load

    def _submit(
        self,
        prompt_T: Tokens,
        params: SamplingParams,
        request_id: str,
        submitted_s: float,
        future: Future[tuple[Completion, ...]],
    ) -> None:
        if request_id in self._requests:
            _fail(future, ValueError(f"request id {request_id!r} is in use"))
            return
        if self._weights.version == UNLOADED:
            _fail(future, WeightsError(f"engine {self._name} holds no weights: load an anchor first"))
            return
        keys = tuple(f"{request_id}/{index}" for index in range(params.n))
        for index, key in enumerate(keys):
            seed = None if params.seed is None else params.seed + index
            try:
                self._backend.add(Sample(key, prompt_T, replace(params, n=1, seed=seed), submitted_s))
            except ValueError as error:
                self._backend.drop(keys[:index])
                _fail(future, ValueError(f"request {request_id!r}: {error}"))
                return
        self._requests[request_id] = _Request(future, keys)
        self._request_of |= dict.fromkeys(keys, request_id)

    def _abort(self, request_id: str) -> None:
        if request_id in self._requests:
            self._forget(request_id, AbortedError(f"request {request_id!r} was aborted"))

    def _forget(self, request_id: str, error: Exception) -> None:
        request = self._requests.pop(request_id)
        left = [key for key in request.keys if key not in request.done]
        for key in request.keys:
            del self._request_of[key]
        self._backend.drop(left)
        _fail(request.future, error)

    def _deliver(self, finished: Sequence[tuple[str, Outcome]]) -> None:
        for key, outcome in finished:
            request_id = self._request_of.get(key)
            if request_id is None:
                continue  # a sibling failed and took the request with it
            if isinstance(outcome, RlorchError):
                self._forget(request_id, outcome)
                continue
            request = self._requests[request_id]
            request.done[key] = outcome
            with self._lock:
                self._queue_s.append(outcome.queue_s)
            if len(request.done) == len(request.keys):
                del self._requests[request_id]
                for other in request.keys:
                    del self._request_of[other]
                _finish(request.future, tuple(request.done[other] for other in request.keys))

    def _score(self, tokens_T: Tokens) -> Floats:
        if self._weights.version == UNLOADED:
            raise WeightsError(f"engine {self._name} holds no weights: load an anchor first")
        logprobs, finished = self._backend.score(tokens_T)
        self._deliver(finished)
        return logprobs

    def _replace(
        self, manifest: Manifest, state: Mapping[str, Any], stage_s: float, payload_bytes: int
    ) -> CommitReport:
        start_s = time.monotonic()
        try:
            verified = self._weights.replace(manifest, state)
        finally:
            self._moved()
        report = CommitReport(manifest.version, stage_s, time.monotonic() - start_s, payload_bytes, verified)
        if not self._tested:
            self._self_test()
            self._tested = True
        self._last_report = report
        return report

    def _commit(self, version: int) -> CommitReport:
        if self._last_report and version == self._weights.version:
            return self._last_report
        with self._lock:
            staged = self._staged.get(version)
        if staged is None:
            raise ChainBrokenError(
                f"engine {self._name}: version {version} is not staged (version {self._weights.version} is held)"
            )
        start_s = time.monotonic()
        verify_all = (self._commits + 1) % self._live_digest_every == 0
        try:
            verified = self._weights.commit(staged.prepared, verify_all=verify_all)
        except WeightsError:
            with self._lock:
                self._staged.pop(version, None)
            raise
        finally:
            self._moved()
        self._commits += 1
        pause_s = time.monotonic() - start_s
        self._last_report = CommitReport(version, staged.stage_s, pause_s, staged.payload_bytes, verified)
        return self._last_report

    def _moved(self) -> None:
        """Publish the version that is held now, and fail everybody if there is none."""
        version = self._weights.version
        with self._lock:
            changed, self._version = version != self._version, version
            self._staged = {v: s for v, s in self._staged.items() if v > version != UNLOADED}
        if version == UNLOADED:
            self._fail_all(ReplicaLostError(f"engine {self._name} lost its weights: sample elsewhere"))
        elif changed:
            self._backend.committed(version)

    def _fail_all(self, error: Exception) -> None:
        for request_id in list(self._requests):
            if threading.current_thread() is self._thread and self._dead is None:
                self._forget(request_id, error)
            else:
                _fail(self._requests.pop(request_id).future, error)

    def _self_test(self) -> None:
        if self._requests:
            raise OverloadedError(
                f"engine {self._name}: the self-test needs an idle engine, not {len(self._requests)} requests"
            )
        try:
            run_self_test(self._weights, self._score, self._vocab_size)
        except SelfTestError as error:
            self._die(ReplicaLostError(f"engine {self._name} failed its self-test: {error}"))
            raise


def _finish(future: Future[T], result: T) -> None:
    try:
        future.set_result(result)
    except InvalidStateError:
        return  # the caller cancelled it


def _fail(future: Future[Any], error: Exception) -> None:
    try:
        future.set_exception(error)
    except InvalidStateError:
        return  # the caller cancelled it
