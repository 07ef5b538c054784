"""The tables of a journal, and the rule for opening one.

    run           one row: the config's digest, when the run began, which rlorch wrote it
    groups        one row per resolved ordinal: `done` (finished, in no batch yet), `trained` (in a batch), `dropped`
    rollouts      the trajectories of a group, one row each, in order of `idx`
    batches       one row per optimizer step; the key is the trainer's version before the step
    batch_groups  which groups a step trains, by position; a group is in at most one batch (UNIQUE)
    events        everything else, in order of arrival

Blobs are little-endian numpy bytes behind a one-byte tag (`rlorch.journal.encoding`); JSON columns are ASCII. `score`,
`failure`, `finish_reason` and `num_tokens` repeat what the verdict and the blobs say, so that a person can query them
with the sqlite3 shell. `PRAGMA user_version` is the schema's version: a newer one is refused, not guessed at.
"""

import sqlite3
from pathlib import Path

from rlorch.errors import StorageError

SCHEMA_VERSION = 1

# Pages (4 KiB) that the write-ahead log may reach before SQLite moves them into the main file: at the default of
# 1000, groups of a few hundred KiB would checkpoint every few commits.
WAL_CHECKPOINT_PAGES = 4096

TABLES = (
    """CREATE TABLE run (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        config_digest TEXT NOT NULL,
        created TEXT NOT NULL,
        rlorch_version TEXT NOT NULL)""",
    """CREATE TABLE groups (
        id INTEGER PRIMARY KEY,
        status TEXT NOT NULL CHECK (status IN ('done', 'trained', 'dropped')),
        reason TEXT,
        digest BLOB,
        admitted_version INTEGER,
        ordinal INTEGER,
        prompt_text TEXT,
        prompt_tokens BLOB,
        row TEXT,
        CHECK ((status = 'dropped') = (reason IS NOT NULL)),
        CHECK (status = 'dropped' OR digest IS NOT NULL))""",
    """CREATE TABLE rollouts (
        group_id INTEGER NOT NULL REFERENCES groups (id),
        idx INTEGER NOT NULL,
        turns TEXT NOT NULL,
        tokens BLOB NOT NULL,
        logprobs BLOB NOT NULL,
        text TEXT NOT NULL,
        verdict TEXT,
        score REAL,
        failure TEXT,
        finish_reason TEXT NOT NULL,
        num_tokens INTEGER NOT NULL,
        PRIMARY KEY (group_id, idx))""",
    "CREATE TABLE batches (step INTEGER PRIMARY KEY, formed TEXT NOT NULL)",
    """CREATE TABLE batch_groups (
        step INTEGER NOT NULL REFERENCES batches (step),
        position INTEGER NOT NULL,
        group_id INTEGER NOT NULL UNIQUE REFERENCES groups (id),
        PRIMARY KEY (step, position))""",
    """CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        time TEXT NOT NULL,
        kind TEXT NOT NULL,
        payload TEXT NOT NULL)""",
    "CREATE INDEX events_by_kind ON events (kind, seq)",
    "CREATE INDEX groups_by_status ON groups (status)",
)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """A connection that may write: created if absent, write-ahead log, every commit synced to disk.

    Transactions are begun and ended by the caller; the connection may be used from any one thread at a time.

    Raises:
        StorageError: not a journal, a newer journal, or a file system that cannot hold a write-ahead log.
    """
    connection: sqlite3.Connection | None = None
    try:
        connection = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StorageError(
                f"{path}: this file system does not support SQLite's write-ahead log (mode {mode!r}); "
                f"put the run directory on a local disk"
            )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_CHECKPOINT_PAGES}")
        if read_schema_version(connection, path) == 0:
            connection.execute("BEGIN IMMEDIATE")
            for statement in TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
    except (sqlite3.Error, StorageError) as error:
        if connection is not None:
            connection.close()
        raise error if isinstance(error, StorageError) else storage_error(error, path, "open") from error
    return connection


def open_for_reading(path: Path) -> sqlite3.Connection:
    """A read-only connection; a live writer is not disturbed. The whole read sees one moment (a transaction is open).

    Works on a run that was killed (SQLite replays its log) and on an archived one in a read-only directory.

    Raises:
        StorageError: absent, not a journal, or a newer one.
    """
    if not path.is_file():
        raise StorageError(f"{path}: there is no journal; is this a run directory?")
    uri = path.resolve().as_uri()
    has_log = path.with_name(path.name + "-wal").exists()
    # A read-only directory has no room for the log's index; without a log there is nothing to index.
    options = ("mode=ro",) if has_log else ("mode=ro", "mode=ro&immutable=1")
    failure: sqlite3.Error | None = None
    for option in options:
        connection = sqlite3.connect(f"{uri}?{option}", uri=True, timeout=30.0, isolation_level=None)
        try:
            connection.execute("BEGIN")
            if read_schema_version(connection, path) == 0:
                raise StorageError(f"{path}: an empty journal; the run ended before it began to write")
            return connection
        except sqlite3.Error as error:
            failure = error
            connection.close()
        except StorageError:
            connection.close()
            raise
    assert failure is not None
    raise storage_error(failure, path, "read") from failure


def read_schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """The schema version of an open file: 0 for an empty one.

    Raises:
        StorageError: written by a newer rlorch, or by something else.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{path}: journal schema {version} is newer than this rlorch reads ({SCHEMA_VERSION}); "
            f"upgrade rlorch to the version that wrote it"
        )
    if version == 0 and tables:
        raise StorageError(f"{path}: an SQLite file, but not a journal of rlorch; use another run directory")
    return int(version)


def storage_error(error: sqlite3.Error, path: Path, doing: str) -> StorageError:
    """What an SQLite failure means for whoever runs the job."""
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
        advice = "the disk is full or failing: free space and try again; everything acknowledged before is intact"
    elif name in ("SQLITE_CORRUPT", "SQLITE_NOTADB"):
        advice = "the file is damaged: restore it from a copy, or start a new run from the newest checkpoint"
    elif name.startswith("SQLITE_BUSY"):
        advice = "another program holds it open for writing: close it"
    elif name in ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"):
        advice = "check the permissions of the run directory"
    else:
        advice = "see the SQLite error above"
    return StorageError(f"journal {path}: could not {doing}: {error} ({name}); {advice}")
