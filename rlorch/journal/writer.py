"""The one thread that writes a journal, many writes per sync (group commit).

    submit -> pending -> [thread] BEGIN, write 1, write 2, ..., COMMIT (one fsync) -> all their futures resolve

A write is acknowledged only after the commit that contains it. While one commit waits for the disk the next writes
gather, so the number of syncs adapts to the disk and no timer is needed. A write that fails on its own account (a
conflict) is undone alone, by savepoint; a failure of the disk fails every write of that commit, and the thread lives
on. Nothing is bounded here: each caller waits for its own write, so there are never more than callers.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlorch.errors import InvariantError
from rlorch.journal.schema import storage_error

Write = Callable[[sqlite3.Connection], None]

# Writes per transaction: enough to hide a sync, few enough that the first of them does not wait long.
MAX_WRITES_PER_COMMIT = 256

# What SQLite says of a value or a constraint, not of the disk.
_OWN_FAULT = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError, sqlite3.InterfaceError)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    write: Write
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[None]"


class CommitThread:
    """Runs writes in order of submission on its own thread and owns the connection while it runs.

    Args:
        connection: in autocommit mode, usable from another thread.
        path: for messages.
        on_end: called on the thread after the connection was closed.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._path = path
        self._on_end = on_end
        self._pending: list[_Job] = []
        self._ended: list[_Job] = []
        self._closing = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    async def submit(self, write: Write) -> None:
        """Run `write` inside a transaction; returns when it is on disk, raises what it raised or `StorageError`.

        Cancelling the caller does not undo the write.
        """
        job = self._job(write)
        with self._changed:
            if self._closing:
                raise InvariantError(f"journal {self._path}: a write after close")
            self._pending.append(job)
            self._changed.notify()
        await job.done

    async def close(self) -> None:
        """Commit what is pending, close the connection, end the thread. Idempotent."""
        job = self._job(lambda _: None)
        with self._changed:
            self._closing = True
            if self._closed:
                return
            self._ended.append(job)
            self._changed.notify()
        await job.done

    def _job(self, write: Write) -> _Job:
        loop = asyncio.get_running_loop()
        return _Job(write, loop, loop.create_future())

    def _run(self) -> None:
        while jobs := self._take():
            _resolve(jobs, self._commit(jobs))
        try:
            self._connection.close()
        finally:
            self._on_end()
            with self._changed:
                self._closed = True
                ended, self._ended = self._ended, []
            _resolve(ended, [None] * len(ended))

    def _take(self) -> Sequence[_Job]:
        """The next writes, or none when it is time to end."""
        with self._changed:
            while not self._pending and not self._closing:
                self._changed.wait()
            jobs = self._pending[:MAX_WRITES_PER_COMMIT]
            del self._pending[:MAX_WRITES_PER_COMMIT]
            return jobs

    def _commit(self, jobs: Sequence[_Job]) -> list[Exception | None]:
        """One transaction; the outcome of each write."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            outcomes = [self._apply(job.write) for job in jobs]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # what is still wrong then, the next BEGIN says
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            return [storage_error(error, self._path, "write") for _ in jobs]
        return outcomes

    def _apply(self, write: Write) -> Exception | None:
        """Run one write; undo it alone when it fails on its own account. A failing disk concerns all: it passes."""
        self._connection.execute("SAVEPOINT write")
        failure: Exception | None = None
        try:
            write(self._connection)
        except _OWN_FAULT as error:
            failure = storage_error(error, self._path, "write")
        except sqlite3.Error:
            raise
        except Exception as error:
            failure = error
        if failure is not None:
            self._connection.execute("ROLLBACK TO write")
        self._connection.execute("RELEASE write")
        return failure


def _resolve(jobs: Sequence[_Job], outcomes: Sequence[Exception | None]) -> None:
    """Tell the callers, with one wake-up per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Exception | None]]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        by_loop.setdefault(job.loop, []).append((job, outcome))
    for loop, pairs in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, pairs)


def _settle(pairs: Sequence[tuple[_Job, Exception | None]]) -> None:
    for job, outcome in pairs:
        if job.done.done():  # the caller was cancelled
            continue
        if outcome is None:
            job.done.set_result(None)
        else:
            job.done.set_exception(outcome)
