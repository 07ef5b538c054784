"""One writer per run directory: an advisory lock on a file in it.

The kernel drops the lock when the holder dies, however it dies, so nothing is ever left to clean up. It is a
`flock` rather than a POSIX record lock, because it must also hold against a second journal in the same process (two
runs in one notebook). A child made by `fork` would inherit it and keep it after the parent's death: it lets go at
birth.
"""

import fcntl
import os
import socket
import weakref
from pathlib import Path

from rlorch.errors import ResumeError, StorageError


class RunLock:
    """The exclusive right to write a run directory, from construction to `release`.

    Raises:
        ResumeError: another process (or another journal of this one) has it; the message names the pid.
        StorageError: the lock file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot make the run's lock file: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "an unknown process"
            self._close()
            if not isinstance(error, BlockingIOError):
                raise StorageError(f"{path}: this file system has no file locks: {error.strerror}") from error
            raise ResumeError(
                f"{path.parent} is being written by {holder}: two drivers must not write one run. "
                f"Wait for it, end it, or choose another run directory"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        lock: weakref.ref[RunLock] = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(lock))

    def release(self) -> None:
        """Let others in. Idempotent. The file stays: removing it would let two holders lock two files."""
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def _let_go(reference: "weakref.ref[RunLock]") -> None:
    lock = reference()
    if lock is not None:
        lock.release()
