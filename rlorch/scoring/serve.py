"""The loop of a worker process: load the plug-ins, then answer rollouts, one at a time, in the order they came.

    <- {terms: [{plugin, weight, options}], memory_mb}
    -> {ready: [{name, timeout_s}], pid}     or {error, kind} and the end
    <- {prompt}, {id, rollout}, {id, rollout} ...   a rollout's prompt is the last one before it
    -> {id, term: k} before term k, where a term can have a budget of its own, then {id, verdict} at once
    <- {drop}                                what has come and has not begun is forgotten
    -> {dropped}

After a rollout that ran out of memory nothing more is answered: the state of the process cannot be trusted. Nothing
that a plug-in raises ends the loop. User code prints to the log: the wire is a file descriptor of its own.
"""

import inspect
import os
import resource
import socket
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from rlorch.errors import RlorchError
from rlorch.plugins import describe_exception
from rlorch.scoring.plugin import RewardTermCall, combine, load_term, to_verdict
from rlorch.scoring.wire import Message, Unpacker, pack, rollout_from_json, verdict_to_json
from rlorch.types import Rollout, Verdict

# Details go into journals and logs; a plug-in may raise with a whole completion in the message.
MAX_DETAIL_CHARS = 2000
_RECV_BYTES = 1 << 18


def serve(wire_fd: int) -> None:
    """Serve until the other side closes the wire."""
    with socket.socket(fileno=wire_fd) as wire:
        inbox = _Inbox(wire)
        order = inbox.take()
        if order is None:
            return
        try:
            if order["memory_mb"] is not None:
                _limit_memory(order["memory_mb"])
            terms = _load(order["terms"])
        except (Exception, SystemExit) as error:
            if not isinstance(error, RlorchError) or error.__cause__ is not None:
                traceback.print_exc()
            wire.sendall(pack(_load_error(error, order["memory_mb"])))
            return
        ready = [{"name": term.name, "timeout_s": term.timeout_s} for term in terms]
        wire.sendall(pack({"ready": ready, "pid": os.getpid()}))
        _answer(inbox, terms, wire)


def _answer(inbox: "_Inbox", terms: list[RewardTermCall], wire: socket.socket) -> None:
    run = _AsyncRunner()
    tells_terms = len(terms) > 1 or terms[0].timeout_s is not None
    prompt: Message = {}

    def begin(place: int, term: int) -> None:
        if tells_terms:
            wire.sendall(pack({"id": place, "term": term}))

    while (message := inbox.take()) is not None:
        if "prompt" in message:
            prompt = message["prompt"]
            continue
        started = time.perf_counter()
        rollout = rollout_from_json(message["rollout"], prompt)
        verdict = _score(terms, rollout, partial(begin, message["id"]), run)
        verdict = replace(verdict, seconds=time.perf_counter() - started)
        wire.sendall(pack({"id": message["id"], "verdict": verdict_to_json(verdict)}))
        if verdict.failure == "memory":
            return


class _Inbox:
    """What the parent has sent and is not yet done. It looks at the wire before each message, so a drop is quick."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._unpacker = Unpacker()
        self._waiting: deque[Message] = deque()

    def take(self) -> Message | None:
        """The next message, waiting for one; None when the parent has closed the wire."""
        while True:
            try:
                data = self._wire.recv(_RECV_BYTES, socket.MSG_DONTWAIT if self._waiting else 0)
            except BlockingIOError:
                return self._waiting.popleft()
            if not data:
                return None
            for message in self._unpacker.feed(data):
                if "drop" in message:
                    self._waiting.clear()
                    self._wire.sendall(pack({"dropped": True}))
                else:
                    self._waiting.append(message)


def _limit_memory(memory_mb: int) -> None:
    limit = memory_mb << 20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _load(orders: list[Message]) -> list[RewardTermCall]:
    """The terms, in order; a name that is already taken gets a number: `format`, `format#2`."""
    terms: list[RewardTermCall] = []
    for order in orders:
        term = load_term(order["plugin"], order["weight"], order["options"])
        taken = sum(other.name.partition("#")[0] == term.name for other in terms)
        terms.append(replace(term, name=f"{term.name}#{taken + 1}") if taken else term)
    return terms


def _load_error(error: BaseException, memory_mb: int | None) -> Message:
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        text = f"loading the rewards needs more than rewards.memory_mb={memory_mb}; raise it"
        return {"error": text, "kind": "PluginError"}
    text = str(error) if isinstance(error, RlorchError) else f"loading the rewards failed: {describe_exception(error)}"
    return {"error": text, "kind": type(error).__name__}


def _score(terms: list[RewardTermCall], rollout: Rollout, begin: Callable[[int], None], run: "_AsyncRunner") -> Verdict:
    done: list[tuple[RewardTermCall, Verdict]] = []
    for index, term in enumerate(terms):
        begin(index)
        verdict = _call(term, rollout, run)
        done.append((term, verdict))
        if verdict.failure is not None:
            break
    verdict = combine(done)
    return replace(verdict, detail=verdict.detail[:MAX_DETAIL_CHARS])


def _call(term: RewardTermCall, rollout: Rollout, run: "_AsyncRunner") -> Verdict:
    try:
        answer = term.call(rollout)
        return to_verdict(run(answer) if inspect.isawaitable(answer) else answer)
    except MemoryError as error:
        return Verdict(
            failure="memory", detail=f"needs more than rewards.memory_mb: {describe_exception(error, term.file)}"
        )
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a plug-in that leaves is a failed plug-in
        traceback.print_exc()
        return Verdict(failure="raised", detail=describe_exception(error, term.file))


class _AsyncRunner:
    """Runs awaitables of async plug-ins on one event loop, made at first use, so that sessions they open live on."""

    def __init__(self) -> None:
        self._run: Callable[[Any], object] | None = None

    def __call__(self, answer: Awaitable[object]) -> object:
        if self._run is None:
            import asyncio  # only async plug-ins pay for the import

            self._run = asyncio.Runner().run

        async def wait() -> object:
            return await answer

        return self._run(wait())
