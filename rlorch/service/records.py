"""The service's memory: typed JSON records by (kind, id) in one SQLite file.

    put -> [one thread] COMMIT, synced to disk -> the mirror in memory -> get, list

Invariants: what `put` or `delete` returned from is on disk, whatever dies next; what `get` and `list` show is on disk;
one service writes a data directory at a time (a lock that the kernel drops with its process). Records are small, so
all of them are mirrored in memory and reads never wait.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from rlorch.aio import Lane, deadline
from rlorch.errors import ResumeError, StorageError, UserError
from rlorch.journal.lock import RunLock

FILE_NAME = "service.sqlite"
LOCK_NAME = "service.lock"
SCHEMA_VERSION = 1
_TABLE = """CREATE TABLE records (
    kind TEXT NOT NULL, id TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, id)) WITHOUT ROWID"""

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of record: its name in the file and the (data)class of its values."""

    name: str
    type: type[T]

    @cached_property
    def adapter(self) -> TypeAdapter[T]:
        """Reads and writes its JSON."""
        return TypeAdapter(self.type)


class Records:
    """Records of a data directory, which is made if need be. `close` lets others in.

    Args:
        data_dir: on a local disk; `service.sqlite` is in it.
        write_timeout_s: how long a write may take before it is a `DeadlineError` (a disk that hangs).

    Raises:
        UserError: another service writes this directory.
        StorageError: not a service's file, a newer one, or a file system that cannot hold it.
    """

    def __init__(self, data_dir: Path, *, write_timeout_s: float = 60.0) -> None:
        self._path = data_dir / FILE_NAME
        self._write_timeout_s = write_timeout_s
        self._closed = False
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = RunLock(data_dir / LOCK_NAME)
        except ResumeError as error:
            raise UserError(f"{data_dir} is served already: connect to that service or choose another data_dir "
                            f"({error})") from error  # fmt: skip
        try:
            self._connection = _open(self._path)
            rows = self._connection.execute("SELECT kind, id, value FROM records ORDER BY kind, id").fetchall()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, sqlite3.Error):
                raise _failure(self._path, "opened", error) from error
            raise
        self._rows: dict[tuple[str, str], str] = {(kind, name): value for kind, name, value in rows}
        self._lane = Lane("records")

    async def put(self, kind: Kind[T], record_id: str, value: T) -> None:
        """Write a record, replacing what has its id. It is on disk when this returns. Idempotent.

        Raises:
            StorageError: the disk is full or fails; nothing changed.
            UserError: it holds what JSON cannot.
        """
        try:
            text = kind.adapter.dump_json(value).decode()
        except ValueError as error:
            raise UserError(f"{kind.name} {record_id} cannot be kept as JSON: {error}") from error
        await self._write(
            "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (kind, id) DO UPDATE SET value = excluded.value",
            (kind.name, record_id, text),
            lambda: self._rows.__setitem__((kind.name, record_id), text),
        )

    async def delete(self, kind: Kind[Any], record_id: str) -> None:
        """Forget a record; unknown ids are ignored. Idempotent. Raises as `put`."""
        await self._write(
            "DELETE FROM records WHERE kind = ? AND id = ?",
            (kind.name, record_id),
            lambda: self._rows.pop((kind.name, record_id), None),
        )

    def get(self, kind: Kind[T], record_id: str) -> T | None:
        """The record of that id; None when there is none."""
        text = self._rows.get((kind.name, record_id))
        return None if text is None else self._parse(kind, record_id, text)

    def list(self, kind: Kind[T], prefix: str = "") -> dict[str, T]:
        """All records of a kind whose id begins with `prefix`, by id."""
        chosen = sorted(key for key in self._rows if key[0] == kind.name and key[1].startswith(prefix))
        return {key[1]: self._parse(kind, key[1], self._rows[key]) for key in chosen}

    async def close(self) -> None:
        """Close the file and let go of the directory. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            async with deadline(self._write_timeout_s, f"{self._path} does not close; is its disk reachable?"):
                await self._lane.run(self._connection.close)
        finally:
            self._lane.close()
            self._lock.release()

    def _parse(self, kind: Kind[T], record_id: str, text: str) -> T:
        try:
            return kind.adapter.validate_json(text)
        except ValueError as error:
            raise StorageError(
                f"{self._path}: {kind.name} {record_id} cannot be read ({error}); was it written by another release?"
            ) from error

    async def _write(self, statement: str, values: tuple[str, ...], mirror: Callable[[], object]) -> None:
        if self._closed:
            raise StorageError(f"{self._path}: written after close; the service is ending, call again when it is back")

        def write() -> None:
            self._connection.execute(statement, values)  # autocommit: one synced transaction
            mirror()  # here, so that a caller that was cancelled still finds memory equal to the disk

        what = f"{self._path}: a write is not on disk yet; is the disk hanging? It may still land"
        try:
            async with deadline(self._write_timeout_s, what):
                await self._lane.run(write)
        except sqlite3.Error as error:
            raise _failure(self._path, "written", error) from error


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StorageError(f"{path}: this file system has no write-ahead log; put data_dir on a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StorageError(f"{path}: schema {version} is newer than this rlorch reads ({SCHEMA_VERSION}); upgrade")
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
    except BaseException:
        connection.close()
        raise
    return connection


def _failure(path: Path, doing: str, error: sqlite3.Error) -> StorageError:
    return StorageError(
        f"{path} could not be {doing}: {error}; check free space, rights and that it is a service's file; everything "
        f"acknowledged before is intact"
    )
