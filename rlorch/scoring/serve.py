"""The loop of a worker process: load the plug-ins, then answer one rollout at a time.

    <- {terms: [{plugin, weight, options}], memory_mb}
    -> {ready: [{name, timeout_s}], pid}     or {error, kind} and the end
    <- {id, rollout}
    -> {id, term: k} before each term k      then {id, verdict}

Nothing that a plug-in raises ends the loop. User code prints to the log: the wire is a file descriptor of its own.
"""

import inspect
import os
import resource
import socket
import traceback
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
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
        messages = _messages(wire)
        order = next(messages)
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
        run = _AsyncRunner()
        for message in messages:
            verdict = _score(terms, message, wire, run)
            wire.sendall(pack({"id": message["id"], "verdict": verdict_to_json(verdict)}))


def _messages(wire: socket.socket) -> Iterator[Message]:
    unpacker = Unpacker()
    while data := wire.recv(_RECV_BYTES):
        yield from unpacker.feed(data)


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


def _score(terms: list[RewardTermCall], message: Message, wire: socket.socket, run: "_AsyncRunner") -> Verdict:
    rollout = rollout_from_json(message["rollout"])
    done: list[tuple[RewardTermCall, Verdict]] = []
    for index, term in enumerate(terms):
        wire.sendall(pack({"id": message["id"], "term": index}))
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
