"""One child process that runs reward plug-ins, as its parent sees it.

States: loading -> idle <-> busy -> gone. `loaded` and `gone` are futures; `ask` makes it busy until every rollout it
was sent is answered. A caller that leaves early drops the rest, and the process is busy until it has confirmed that:
what it says in between is for nobody. `kill` ends the process and all its descendants (`rlorch.scoring.child`) and
returns at once; if they are not gone after a grace period they are killed from here.

Nothing here depends on signals, on threads or on forking the parent: it works inside a Ray actor.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlorch.scoring.wire import Message, PackedRollout, Unpacker, pack, to_stream
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


@dataclass(slots=True)
class _Call:
    """Rollouts that were sent. `owed` are the ids without an answer, the last one first; `heard` gets what comes."""

    owed: list[int]
    heard: Callable[[Message], bool]
    done: "asyncio.Future[bool]"


class RewardProcess:
    """A started child; make one with `spawn`."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        loop = asyncio.get_running_loop()
        self.spawned_at = loop.time()
        self.loaded: asyncio.Future[Message | None] = loop.create_future()
        self.gone: asyncio.Future[str] = loop.create_future()
        self.busy_until = 0.0
        self._popen = popen
        self._worker_pid: int | None = None
        self._call: _Call | None = None
        self._dropped: asyncio.Future[None] | None = None
        self._end: str | None = None
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
        return self.loaded.done() and not self.gone.done() and self._call is None and self._dropped is None

    async def ask(self, packed: Sequence[PackedRollout], heard: Callable[[Message], bool]) -> bool:
        """Send rollouts to an idle process and wait until all are answered; False when the process ends first.

        `heard` is called with each `{id, term}` and `{id, verdict}` as it comes, in the order of `packed`, and says
        whether to go on. The caller sets the deadline, and says in `busy_until` how long the rollout that runs may
        go on after the caller is cancelled: see `settled`.
        """
        assert self.idle, "one call at a time"
        assert self._wire is not None, "spawned"
        owed = [one.id for one in reversed(packed)]
        call = self._call = _Call(owed, heard, asyncio.get_running_loop().create_future())
        self._wire.writelines(to_stream(packed))
        try:
            return await call.done
        finally:
            if self._call is call:
                self._drop()

    async def settled(self) -> None:
        """Wait until the rollouts of a caller that left are done or dropped, or the process has gone."""
        if self._dropped is not None:
            await asyncio.shield(self._dropped)

    def _drop(self) -> None:
        assert self._wire is not None, "spawned"
        self._call = None
        self._dropped = asyncio.get_running_loop().create_future()
        self._wire.write(pack({"drop": True}))

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
        """Raises ValueError for what the loop of the worker does not say."""
        if "id" in message:
            self._heard(message)
        elif "dropped" in message:
            self._settle()
        elif not self.loaded.done():
            self._worker_pid = message.get("pid")
            self.loaded.set_result(message)

    def _heard(self, message: Message) -> None:
        call = self._call
        if call is None or call.done.done():  # its caller has left
            return
        if message["id"] != call.owed[-1]:
            raise ValueError(f"answer {message['id']!r:.50} where {call.owed[-1]} was asked for")
        if "verdict" in message:
            call.owed.pop()
        goes_on = call.heard(message)
        if not goes_on or not call.owed:
            call.done.set_result(goes_on)
            if not call.owed:
                self._call = None

    def _settle(self) -> None:
        if self._dropped is not None and not self._dropped.done():
            self._dropped.set_result(None)
        self._dropped = None

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
        if self._call is not None and not self._call.done.done():
            self._call.done.set_result(False)
        self._call = None
        self._settle()
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
            for message in self._unpacker.feed(data):
                self._received(message)
        except ValueError as error:
            self._broken(str(error))


class _Lifeline(asyncio.Protocol):
    """Nothing is sent on it; that it closes is the message."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()
