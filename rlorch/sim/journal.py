"""A journal in memory, for simulated runs: the same order of events, without a disk."""

from collections.abc import Mapping
from typing import Any

from rlorch.errors import InvariantError
from rlorch.types import Batch, Group


class MemoryJournal:
    """The Journal port. Checks the rules that the file journal checks on reading back."""

    def __init__(self) -> None:
        self.done: dict[int, Group] = {}
        self.dropped: dict[int, str] = {}
        self.batches: list[Batch] = []
        self.events: list[tuple[str, Mapping[str, Any]]] = []

    async def group_done(self, group: Group) -> None:
        """See `Journal.group_done`."""
        self.done[group.id] = group

    async def group_dropped(self, group_id: int, reason: str, group: Group | None = None) -> None:
        """See `Journal.group_dropped`."""
        if group_id in self.done:
            raise InvariantError(f"group {group_id} was finished and cannot be dropped ({reason})")
        self.dropped[group_id] = reason

    async def batch_formed(self, batch: Batch) -> None:
        """See `Journal.batch_formed`."""
        trained = {group_id for earlier in self.batches for group_id in earlier.group_ids}
        if missing := set(batch.group_ids) - self.done.keys():
            raise InvariantError(f"batch {batch.step} holds groups that are not durable: {sorted(missing)}")
        if twice := trained & set(batch.group_ids):
            raise InvariantError(f"batch {batch.step} trains groups again: {sorted(twice)}")
        self.batches.append(batch)

    async def event(self, kind: str, payload: Mapping[str, Any]) -> None:
        """See `Journal.event`."""
        self.events.append((kind, payload))
