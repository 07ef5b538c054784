"""What each call of the journal does to the tables: plain functions on a connection inside a transaction.

All are idempotent: equal content again changes nothing; different content under the same key is an `InvariantError`
and changes nothing. A group moves done -> trained or done -> dropped, or is dropped at once; never back.
"""

import sqlite3
from collections.abc import Mapping
from typing import Any

from rlorch.errors import InvariantError, ResumeError
from rlorch.journal.encoding import GroupRecord, dump_json, encode, group_cells, rollout_cells
from rlorch.types import Batch, Group


def write_run(connection: sqlite3.Connection, config_digest: str, created: str, rlorch_version: str) -> None:
    """Describe the run, once.

    Raises:
        ResumeError: the journal belongs to a run with another config.
    """
    known = connection.execute("SELECT config_digest FROM run").fetchone()
    if known is None:
        connection.execute("INSERT INTO run VALUES (1, ?, ?, ?)", (config_digest, created, rlorch_version))
    elif known[0] != config_digest:
        raise ResumeError(
            f"this run was started with config {known[0]!r} and would be resumed with {config_digest!r}: "
            f"restore the config (config.yaml in the run directory has it) or choose another run directory"
        )


def write_group_done(connection: sqlite3.Connection, group: Group) -> None:
    """A finished group. Known with the same content in any state: nothing happens."""
    record = encode(group)
    digest = record.digest()
    known = connection.execute("SELECT status, reason, digest FROM groups WHERE id = ?", (group.id,)).fetchone()
    if known is None:
        _insert_group(connection, group, record, "done", None)
    elif known[2] != digest:
        status, reason, known_digest = known
        content = "without content" if known_digest is None else "with other content"
        raise InvariantError(
            f"group {group.id} is finished, but the journal has it {content} as {status}"
            f"{f' ({reason})' if reason else ''}: it was sampled twice, or changed after it was written"
        )


def write_group_dropped(connection: sqlite3.Connection, group_id: int, reason: str, group: Group | None) -> None:
    """A group that will not be trained, with or without what was sampled of it."""
    if group is not None and not group.rollouts:
        group = None  # nothing was sampled of it
    if group is not None and group.id != group_id:
        raise InvariantError(f"group {group.id} is dropped under the id {group_id}")
    known = connection.execute("SELECT status, reason, digest FROM groups WHERE id = ?", (group_id,)).fetchone()
    if known is None:
        if group is None:
            connection.execute("INSERT INTO groups (id, status, reason) VALUES (?, 'dropped', ?)", (group_id, reason))
        else:
            _insert_group(connection, group, encode(group), "dropped", reason)
        return
    status, known_reason, digest = known
    if status == "trained":
        raise InvariantError(f"group {group_id} is in a batch and is dropped ({reason}): it has two owners")
    if status == "dropped" and known_reason != reason:
        raise InvariantError(f"group {group_id} is dropped twice, for {known_reason!r} and for {reason!r}")
    if group is not None and digest != encode(group).digest():
        raise InvariantError(f"group {group_id} is dropped ({reason}) with other content than the journal has")
    connection.execute("UPDATE groups SET status = 'dropped', reason = ? WHERE id = ?", (reason, group_id))


def write_batch(connection: sqlite3.Connection, batch: Batch, formed: str) -> None:
    """Which groups a step trains. All must be finished, in no other batch, and as the journal has them."""
    known = connection.execute("SELECT group_id FROM batch_groups WHERE step = ? ORDER BY position", (batch.step,))
    known_ids = tuple(group_id for (group_id,) in known)
    if known_ids and known_ids != batch.group_ids:
        raise InvariantError(f"step {batch.step} trains groups {batch.group_ids}, but the journal says {known_ids}")
    if not batch.groups:
        raise InvariantError(f"step {batch.step} has an empty batch")
    if len(set(batch.group_ids)) != len(batch.groups):
        raise InvariantError(f"step {batch.step} has a group twice: {batch.group_ids}")
    for group in batch.groups:
        _check_trainable(connection, group, batch.step, again=bool(known_ids))
    if known_ids:
        return
    connection.execute("INSERT INTO batches VALUES (?, ?)", (batch.step, formed))
    connection.executemany(
        "INSERT INTO batch_groups VALUES (?, ?, ?)",
        [(batch.step, position, group_id) for position, group_id in enumerate(batch.group_ids)],
    )
    connection.executemany("UPDATE groups SET status = 'trained' WHERE id = ?", [(i,) for i in batch.group_ids])


def write_event(connection: sqlite3.Connection, time: str, kind: str, payload: Mapping[str, Any]) -> None:
    """Append an event."""
    cells = (time, kind, dump_json(payload, f"event {kind!r}"))
    connection.execute("INSERT INTO events (time, kind, payload) VALUES (?, ?, ?)", cells)


def _check_trainable(connection: sqlite3.Connection, group: Group, step: int, again: bool) -> None:
    known = connection.execute("SELECT status, reason, digest FROM groups WHERE id = ?", (group.id,)).fetchone()
    if known is None:
        raise InvariantError(f"step {step} trains group {group.id}, which was never written: await group_done first")
    status, reason, digest = known
    if status == "dropped":
        raise InvariantError(f"step {step} trains group {group.id}, which was dropped ({reason})")
    if status == "trained" and not again:
        (other,) = connection.execute("SELECT step FROM batch_groups WHERE group_id = ?", (group.id,)).fetchone()
        raise InvariantError(f"step {step} trains group {group.id}, which step {other} already trains")
    if digest != encode(group).digest():
        raise InvariantError(
            f"step {step} trains group {group.id} with other content than group_done wrote: "
            f"a resumed run would train something else"
        )


def _insert_group(
    connection: sqlite3.Connection, group: Group, record: GroupRecord, status: str, reason: str | None
) -> None:
    connection.execute(
        "INSERT INTO groups (id, digest, admitted_version, ordinal, prompt_text, prompt_tokens, row, status, reason) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*group_cells(record), status, reason),
    )
    connection.executemany(
        "INSERT INTO rollouts (group_id, idx, turns, tokens, logprobs, text, verdict, score, failure, finish_reason, "
        "num_tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (group.id, *rollout_cells(row, rollout))
            for row, rollout in zip(record.rollouts, group.rollouts, strict=True)
        ],
    )
