"""The two processes behind a reward worker, started by `rlorch.scoring.process` as a script.

    parent --lifeline, wire--> supervisor (this file, standard library only) --fork--> worker (runs user code)

The supervisor runs no user code, so nothing that a plug-in does can stop it from acting:
* The lifeline closes (the parent wants a kill, or has died, by kill -9 too): it kills the worker's process group and
  every descendant that left the group, then ends.
* The worker ends: it kills what the worker left behind, then ends in the same way (status or signal), which the
  parent sees as the end of its side of the lifeline.

Descendants that leave the group are found because they are inherited by the supervisor when their parent dies
(PR_SET_CHILD_SUBREAPER, Linux). Elsewhere the process group is what is killed.

The fork happens while the interpreter is bare and has one thread. Argument: JSON with `wire` and `lifeline` (file
descriptors), `path` (sys.path of the parent).
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Any, cast

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Become the supervisor, fork the worker."""
    start: dict[str, Any] = json.loads(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, _wake)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        for fd in (start["lifeline"], wake_read, wake_write):
            os.close(fd)
        _work(start, supervisor)
        return
    os.close(start["wire"])
    with contextlib.suppress(PermissionError, ProcessLookupError):
        os.setpgid(worker, worker)  # the worker does the same: whoever comes first
    _supervise(worker, start["lifeline"], wake_read)


def _work(start: dict[str, Any], supervisor: int) -> None:
    """User code's process: its own group, dies with its supervisor, prints to the log."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(1)
    os.set_inheritable(start["wire"], False)
    sys.path[:] = start["path"]
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(line_buffering=True)  # what a killed process printed is in the log
    from rlorch.scoring.serve import serve

    serve(start["wire"])


def _wake(number: int, frame: FrameType | None) -> None:
    """A Python-level handler, so that SIGCHLD writes to the wake-up descriptor."""


def _supervise(worker: int, lifeline: int, wake: int) -> None:
    """Wait for the end of the worker or of the lifeline; leave nothing behind."""
    status: int | None = None
    while status is None:
        ready, _, _ = select.select([lifeline, wake], [], [])  # no deadline: it ends with the parent at the latest
        if lifeline in ready:
            break
        os.read(wake, 4096)
        status = _reap(worker)
    _kill_descendants(worker)
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(0 if status is None else os.WEXITSTATUS(status))


def _reap(worker: int) -> int | None:
    """Collect every child that has ended; the worker's wait status when it is one of them."""
    status: int | None = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == worker:
            status = ended


def _kill_descendants(worker: int) -> None:
    """SIGKILL the worker's group, then, generation by generation, whoever is inherited by this process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)  # every child there is has been sent SIGKILL
        except ChildProcessError:
            return


def _children() -> list[int]:
    """Process ids whose parent is this process (Linux; elsewhere none)."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            # pid (command) state ppid ...; the command may hold spaces and parentheses
            if int(entry.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    main()
