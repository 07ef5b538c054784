"""The Journal port on SQLite: what it returned from is on disk, whatever dies next."""

import sqlite3
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlorch import __version__
from rlorch.aio import deadline
from rlorch.errors import InvariantError
from rlorch.journal.lock import RunLock
from rlorch.journal.schema import open_for_writing, storage_error
from rlorch.journal.writer import CommitThread
from rlorch.journal.writes import write_batch, write_event, write_group_done, write_group_dropped, write_run
from rlorch.types import Batch, Group

LOCK_NAME = "run.lock"

Now = Callable[[], datetime]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class SqliteJournal:
    """The durable record of a run, in one SQLite file; the only writer of its run directory.

    Construction takes the run's lock and opens or creates the file (milliseconds, before the run begins). Every method
    returns after the commit that holds its write was synced to disk; concurrent calls share a sync. Each is
    idempotent; writing different content under the same key raises `InvariantError`. A full disk raises `StorageError`
    and changes nothing: the same call works again once there is space.

    Use as `async with SqliteJournal(run_dir / "journal.sqlite", config_digest=digest) as journal:`.

    Args:
        path: the file; its directory must exist, on a local disk.
        config_digest: names the config; a run goes on only with the one it was started with.
        write_timeout_s: how long a write may take before it is a `DeadlineError` (a disk that hangs).
        now: stamps of batches and events.

    Raises:
        ResumeError: another driver writes this run directory, or the run was started with another config.
        StorageError: not a journal, a newer one, or a file system that cannot hold it.
    """

    def __init__(
        self, path: Path, *, config_digest: str = "", write_timeout_s: float = 60.0, now: Now = _utc_now
    ) -> None:
        self._path = path
        self._write_timeout_s = write_timeout_s
        self._now = now
        lock = RunLock(path.parent / LOCK_NAME)
        try:
            connection = _open(path, config_digest, now().isoformat())
        except BaseException:
            lock.release()
            raise
        self._thread = CommitThread(connection, path, on_end=lock.release)

    async def group_done(self, group: Group) -> None:
        """All rollouts of a group and their verdicts.

        Raises:
            InvariantError: a rollout has no verdict, or the id is known with other content.
        """
        unscored = [rollout.index for rollout in group.rollouts if rollout.verdict is None]
        if unscored:
            raise InvariantError(f"group {group.id} is not finished: rollouts {unscored} have no verdict")
        await self._write(f"group {group.id}", lambda connection: write_group_done(connection, group))

    async def group_dropped(self, group_id: int, reason: str, group: Group | None = None) -> None:
        """A group that will never be trained, why, and what was sampled of it.

        Raises:
            InvariantError: it is in a batch, or known with another reason or other content.
        """
        await self._write(
            f"the drop of group {group_id}",
            lambda connection: write_group_dropped(connection, group_id, reason, group),
        )

    async def batch_formed(self, batch: Batch) -> None:
        """Which groups, in which order, the optimizer step to `batch.step + 1` trains.

        Raises:
            InvariantError: a group was not written, was dropped, is in another batch or differs from what was
                written; or the step is known with other groups.
        """
        formed = self._now().isoformat()
        await self._write(f"batch {batch.step}", lambda connection: write_batch(connection, batch, formed))

    async def event(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Append an event. Not idempotent: each call is one row.

        Raises:
            InvariantError: the payload is not JSON.
        """
        time = self._now().isoformat()
        await self._write(f"event {kind}", lambda connection: write_event(connection, time, kind, payload))

    async def close(self) -> None:
        """Finish the pending writes, close the file and let go of the run directory. Idempotent."""
        async with deadline(self._write_timeout_s, f"journal {self._path} does not close; is its disk reachable?"):
            await self._thread.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _write(self, what: str, write: Callable[[sqlite3.Connection], None]) -> None:
        message = f"journal {self._path}: {what} is not on disk yet; is the disk hanging? The write may still land"
        async with deadline(self._write_timeout_s, message):
            await self._thread.submit(write)


def _open(path: Path, config_digest: str, created: str) -> sqlite3.Connection:
    """The connection of a journal that describes this run."""
    connection = open_for_writing(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        write_run(connection, config_digest, created, __version__)
        connection.execute("COMMIT")
    except BaseException as error:
        connection.close()  # and with it the transaction
        if isinstance(error, sqlite3.Error):
            raise storage_error(error, path, "open") from error
        raise
    return connection
