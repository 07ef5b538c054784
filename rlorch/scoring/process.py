"""One child process that runs reward plug-ins, as its parent sees it.

States: loading -> idle <-> busy -> gone. `loaded` and `gone` are futures; `ask` makes it busy until the answer of that
request is in. An answer that nobody waits for any more is dropped by its id. `kill` ends the process and all its
descendants (`rlorch.scoring.child`) and returns at once; if they are not gone after a grace period they are killed
from here.

Nothing here depends on signals, on threads or on forking the parent: it works inside a Ray actor.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlorch.scoring.wire import Message, Unpacker, pack
from rlorch.specs import RewardSpec

# How long the supervisor may take to end its descendants before the parent does it.
KILL_GRACE_S = 5.0
# Reward code is one of several workers of a machine: numeric libraries must not start a thread per core each.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RewardProcess:
    """A started child; make one with `spawn`."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        loop = asyncio.get_running_loop()
        self.spawned_at = loop.time()
        self.loaded: asyncio.Future[Message | None] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.busy_until = 0.0
        self.term = 0
        self._popen = popen
        self._worker_pid: int | None = None
        self._next_id = 0
        self._answer: asyncio.Future[Message | None] | None = None
        self._end: str | None = None
        self._on_term: Callable[[int], None] | None = None
        self._force: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None
        self._lifeline: asyncio.Transport | None = None

    @classmethod
    async def spawn(cls, spec: RewardSpec, log: Path | None) -> "RewardProcess":
        """Start a child and tell it what to load; does not wait for `loaded`.

        What the plug-ins print goes to the file `log`, or to this process's stderr. Raises OSError.
        """
        loop = asyncio.get_running_loop()
        wire, child_wire = socket.socketpair()
        lifeline, child_lifeline = socket.socketpair()
        try:
            with child_wire, child_lifeline:
                process = cls(_launch(child_wire.fileno(), child_lifeline.fileno(), log))
            connected, _ = await loop.create_connection(
                lambda: _Wire(process._received, process._desynchronised), sock=wire
            )
            process._wire = connected
            held, _ = await loop.create_connection(lambda: _Lifeline(process._ended), sock=lifeline)
            process._lifeline = held
        except BaseException:
            lifeline.close()  # which ends the child, if there is one
            wire.close()
            raise
        terms = [term.model_dump() for term in spec.terms]
        process._wire.write(pack({"terms": terms, "memory_mb": spec.memory_mb}))
        return process

    @property
    def idle(self) -> bool:
        """Whether it has loaded, lives, and owes no answer."""
        return self.loaded.done() and not self.gone.done() and self._answer is None

    async def ask(
        self, rollout: Mapping[str, Any], busy_until: float, on_term: Callable[[int], None]
    ) -> Message | None:
        """Send a rollout to an idle process and wait for its answer; None when the process ends first.

        `on_term(k)` is called when term k begins. The caller sets the deadline. When the caller is cancelled the
        process stays busy with this request, until `busy_until` at the latest: see `settled`.
        Raises TypeError or ValueError, and stays idle, for a rollout that JSON cannot hold.
        """
        assert self.idle, "one rollout at a time"
        assert self._wire is not None, "spawned"
        message = pack({"id": self._next_id, "rollout": rollout})
        answer = self._answer = asyncio.get_running_loop().create_future()
        self._on_term, self.busy_until, self.term = on_term, busy_until, 0
        self._wire.write(message)
        try:
            return await asyncio.shield(answer)
        finally:
            self._on_term = None

    async def settled(self) -> None:
        """Wait until the answer that is still owed to a cancelled caller has come, or the process has gone."""
        if self._answer is not None:
            await asyncio.shield(self._answer)

    def kill(self) -> None:
        """End the process and its descendants. Idempotent; `gone` says when."""
        if self.gone.done() or self._lifeline is None or self._force is not None:
            return
        self._lifeline.write_eof()
        self._force = asyncio.get_running_loop().call_later(KILL_GRACE_S, self._kill_from_here)

    def _kill_from_here(self) -> None:
        if self._worker_pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._worker_pid, signal.SIGKILL)
        self._popen.kill()

    def _desynchronised(self, why: str) -> None:
        self._end = f"wrote into the connection of its worker ({why})"
        self.kill()

    def _received(self, message: Message) -> None:
        if "id" not in message:
            self._worker_pid = message.get("pid")
            if not self.loaded.done():
                self.loaded.set_result(message)
        elif message["id"] != self._next_id or self._answer is None:
            return
        elif "term" in message:
            self.term = message["term"]
            if self._on_term is not None:
                self._on_term(self.term)
        else:
            self._settle(message)

    def _settle(self, message: Message | None) -> None:
        if self._answer is not None:
            if not self._answer.done():
                self._answer.set_result(message)
            self._answer = None
            self._next_id += 1

    def _ended(self) -> None:
        try:
            code = self._popen.wait(1.0)  # its descriptors are closed already: this is the last instant of its exit
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = None
        if self._force is not None:
            self._force.cancel()
        if self._lifeline is not None:
            self._lifeline.close()
        self.gone.set_result(self._end or _describe_exit(code))
        # An answer that was sent just before the end may be in the socket still: let it be read first.
        asyncio.get_running_loop().call_soon(self._finish)

    def _finish(self) -> None:
        if not self.loaded.done():
            self.loaded.set_result(None)
        self._settle(None)
        if self._wire is not None:
            self._wire.close()


def _launch(wire: int, lifeline: int, log: Path | None) -> "subprocess.Popen[bytes]":
    path = [entry or os.getcwd() for entry in sys.path]
    argument = json.dumps({"wire": wire, "lifeline": lifeline, "path": path})
    script = Path(__file__).with_name("child.py")
    output = 2 if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", str(script), argument],  # -P: the script's folder stays off sys.path
            pass_fds=(wire, lifeline),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**_ENVIRONMENT, **os.environ},
        )
    finally:
        if log is not None:
            os.close(output)


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "ended in an unknown way"
    if code >= 0:
        return f"exited with status {code}"
    names = {int(known): known.name for known in signal.Signals}
    by = names.get(-code, f"signal {-code}")
    return f"was killed by {by}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


class _Wire(asyncio.Protocol):
    """Messages from the worker."""

    def __init__(self, received: Callable[[Message], None], broken: Callable[[str], None]) -> None:
        self._received = received
        self._broken = broken
        self._unpacker = Unpacker()

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._unpacker.feed(data)
        except ValueError as error:
            self._broken(str(error))
            return
        for message in messages:
            self._received(message)


class _Lifeline(asyncio.Protocol):
    """Nothing is sent on it; that it closes is the message."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()
