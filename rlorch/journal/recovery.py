"""Reading a journal back: the state that a resumed run starts from, and iteration for replay and inspection.

Every function opens the file read-only and sees one moment of it, beside a live writer too. Each group that is read is
checked against its digest, so that damage is an error and not another training set. Checked on the way: every batch's
groups exist and are whole, no group is in two batches or both dropped and in a batch, steps have no gaps.
"""

import json
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlorch.errors import InvariantError, StorageError
from rlorch.journal.encoding import GroupRecord, RolloutRecord, decode, text_of, unpack
from rlorch.journal.schema import open_for_reading, storage_error
from rlorch.types import Batch, Group


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a run. `time` is ISO 8601, UTC."""

    seq: int
    time: str
    kind: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class RecoveredRun:
    """What a journal says of a run.

    `trained` are the ids in any batch; `dropped` maps ids to reasons; `finished` are whole groups in no batch yet, by
    id; `batches` those of steps >= the `from_step` asked for, in order; `last_step` the newest batch's step.
    `last_events` has the newest event of each kind.
    """

    path: Path
    config_digest: str
    created: str
    rlorch_version: str
    trained: frozenset[int]
    dropped: Mapping[int, str]
    finished: tuple[Group, ...]
    batches: tuple[Batch, ...]
    last_step: int | None
    last_events: Mapping[str, Event]

    @property
    def resolved(self) -> frozenset[int]:
        """Ordinals that must not be drawn again: trained, dropped or finished."""
        return self.trained | self.dropped.keys() | {group.id for group in self.finished}


def read_state(path: Path, *, from_step: int = 0) -> RecoveredRun:
    """The state of the run at `path` (a journal file).

    Args:
        path: the journal.
        from_step: the version of the checkpoint that the run resumes from; earlier batches are not loaded.

    Raises:
        StorageError: absent, damaged or written by a newer rlorch.
        InvariantError: the journal contradicts itself.
    """
    with _reading(path) as connection:
        return _read_state(connection, path, from_step)


def iter_batches(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """The batches of steps [start, stop), in order, one in memory at a time.

    Raises:
        StorageError, InvariantError: as `read_state`.
    """
    with _reading(path) as connection:
        steps = connection.execute(
            "SELECT step FROM batches WHERE step >= ? AND (? IS NULL OR step < ?) ORDER BY step", (start, stop, stop)
        ).fetchall()
        for (step,) in steps:
            yield _read_batch(connection, path, step)


def iter_groups(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Group]]:
    """(step, group) of the batches of steps [start, stop), in training order.

    Raises:
        StorageError, InvariantError: as `read_state`.
    """
    for batch in iter_batches(path, start, stop):
        for group in batch.groups:
            yield batch.step, group


def iter_dropped(path: Path) -> Iterator[tuple[int, str, Group | None]]:
    """(id, reason, what was sampled) of every dropped group, by id.

    Raises:
        StorageError: as `read_state`.
    """
    with _reading(path) as connection:
        rows = connection.execute(
            "SELECT id, reason, digest IS NOT NULL FROM groups WHERE status = 'dropped' ORDER BY id"
        ).fetchall()
        for group_id, reason, has_content in rows:
            yield group_id, reason, _read_group(connection, path, group_id) if has_content else None


def iter_events(path: Path, kind: str | None = None) -> Iterator[Event]:
    """Events in order of arrival, of one kind or of all.

    Raises:
        StorageError: as `read_state`.
    """
    with _reading(path) as connection:
        query = "SELECT seq, time, kind, payload FROM events WHERE ? IS NULL OR kind = ? ORDER BY seq"
        for row in connection.execute(query, (kind, kind)):
            yield _event(row)


@contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    with closing(open_for_reading(path)) as connection:
        try:
            yield connection
        except sqlite3.Error as error:
            raise storage_error(error, path, "read") from error


def _read_state(connection: sqlite3.Connection, path: Path, from_step: int) -> RecoveredRun:
    run = connection.execute("SELECT config_digest, created, rlorch_version FROM run").fetchone()
    if run is None:
        raise StorageError(f"{path}: a journal without a run; the run ended before it began to write")
    _check_invariants(connection, path)
    steps = [step for (step,) in connection.execute("SELECT step FROM batches ORDER BY step")]
    finished = connection.execute("SELECT id FROM groups WHERE status = 'done' ORDER BY id").fetchall()
    last_events = connection.execute(
        "SELECT seq, time, kind, payload FROM events WHERE seq IN (SELECT max(seq) FROM events GROUP BY kind)"
    )
    return RecoveredRun(
        path=path,
        config_digest=run[0],
        created=run[1],
        rlorch_version=run[2],
        trained=frozenset(i for (i,) in connection.execute("SELECT group_id FROM batch_groups")),
        dropped=dict(connection.execute("SELECT id, reason FROM groups WHERE status = 'dropped'")),
        finished=tuple(_read_group(connection, path, group_id) for (group_id,) in finished),
        batches=tuple(_read_batch(connection, path, step) for step in steps if step >= from_step),
        last_step=steps[-1] if steps else None,
        last_events={event.kind: event for event in map(_event, last_events)},
    )


# What must never be found, and how it reads when it is. The tables' own constraints forbid most of it; a file that
# was edited or damaged does not obey them.
_CONTRADICTIONS = (
    (
        "SELECT step, group_id FROM batch_groups WHERE group_id NOT IN (SELECT id FROM groups)",
        "batch {} trains group {}, which is not there",
    ),
    (
        "SELECT group_id, count(*) FROM batch_groups GROUP BY group_id HAVING count(*) > 1",
        "group {} is in {} batches",
    ),
    (
        "SELECT step, group_id, status FROM batch_groups JOIN groups ON id = group_id WHERE status != 'trained'",
        "batch {} trains group {}, whose status is {}",
    ),
    (
        "SELECT id, status FROM groups WHERE status = 'trained' AND id NOT IN (SELECT group_id FROM batch_groups)",
        "group {} is {}, but in no batch",
    ),
    (
        "SELECT step, 0 FROM batches WHERE step NOT IN (SELECT step FROM batch_groups)",
        "batch {} has {} groups",
    ),
    (
        "SELECT min(step), max(step), count(*) FROM batches HAVING count(*) > 0 "
        "AND max(step) - min(step) + 1 != count(*)",
        "batches run from step {} to {}, but there are {}: a step is missing",
    ),
)


def _check_invariants(connection: sqlite3.Connection, path: Path) -> None:
    for query, message in _CONTRADICTIONS:
        found = connection.execute(query).fetchone()
        if found is not None:
            raise InvariantError(f"{path}: {message.format(*found)}; the journal cannot be trusted to resume from")


def _read_batch(connection: sqlite3.Connection, path: Path, step: int) -> Batch:
    rows = connection.execute("SELECT group_id FROM batch_groups WHERE step = ? ORDER BY position", (step,)).fetchall()
    return Batch(step, tuple(_read_group(connection, path, group_id) for (group_id,) in rows))


def _read_group(connection: sqlite3.Connection, path: Path, group_id: int) -> Group:
    try:
        record, digest = _read_record(connection, group_id)
        if record.digest() == digest:
            return decode(record)
    except (StorageError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: group {group_id} is damaged: {error}") from error
    raise StorageError(f"{path}: group {group_id} is damaged: its content does not match its digest")


def _read_record(connection: sqlite3.Connection, group_id: int) -> tuple[GroupRecord, bytes]:
    row = connection.execute(
        "SELECT admitted_version, ordinal, prompt_text, prompt_tokens, row, digest FROM groups WHERE id = ?",
        (group_id,),
    ).fetchone()
    if row is None:
        raise StorageError("it is not there")
    rollouts = connection.execute(
        "SELECT idx, turns, tokens, logprobs, text, verdict FROM rollouts WHERE group_id = ? ORDER BY idx", (group_id,)
    )
    record = GroupRecord(
        id=group_id,
        admitted_version=row[0],
        ordinal=row[1],
        prompt_text=text_of(row[2]),
        prompt_tokens=unpack(row[3]),
        row=row[4],
        rollouts=tuple(
            RolloutRecord(idx, turns, unpack(tokens), unpack(logprobs), text_of(text), verdict)
            for idx, turns, tokens, logprobs, text, verdict in rollouts
        ),
    )
    return record, row[5]


def _event(row: tuple[int, str, str, str]) -> Event:
    seq, time, kind, payload = row
    return Event(seq, time, kind, json.loads(payload))
