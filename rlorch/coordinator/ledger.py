"""The ledger: who may be alive, and proof that nothing is lost or too old.

A slot is the permission for one group to exist, from its admission until every routable replica has committed the
version trained from it (or until it is dropped). There are (K + 1) * B slots, K = max_staleness and B = groups per
batch, so

    staleness of a trained group = step that trains it - version it was admitted at  <=  K

holds by construction (`rlorch.coordinator.batching` keeps it per group), without throwing finished work away.

    admit --> sampling --finished--> ready --batched--> batched --trained--> held --committed--> gone (trained)
                 |                     |
                 +------- drop --------+--> gone (dropped, with a reason)

K = 0 is exact on-policy: the next batch is admitted only when all replicas serve the version of the last step.

Invariants, checked by `check()` at every step of a run:
    admitted = trained + sum(dropped) + alive;  slots used = alive + held <= capacity;  staleness <= K.
Pure: no clock, no I/O; every method is O(alive).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rlorch.coordinator.batching import choose, feasible
from rlorch.errors import InvariantError


@dataclass(frozen=True, slots=True)
class LedgerView:
    """Counts of groups, for metrics and the live view."""

    capacity: int
    used: int
    sampling: int
    ready: int
    batched: int
    held: int
    admitted: int
    trained: int
    dropped: Mapping[str, int]

    @property
    def alive(self) -> int:
        """Groups admitted and neither trained nor dropped."""
        return self.sampling + self.ready + self.batched


class Ledger:
    """Admission, batching and release of groups.

    Args:
        groups_per_batch: B.
        max_staleness: K.
        version: the trainer's version, which every replica has committed (0, or where a run resumes).
    """

    def __init__(self, groups_per_batch: int, max_staleness: int, version: int = 0) -> None:
        if groups_per_batch < 1 or max_staleness < 0:
            raise ValueError(f"groups_per_batch={groups_per_batch} must be >= 1, max_staleness={max_staleness} >= 0")
        self.groups_per_batch = groups_per_batch
        self.max_staleness = max_staleness
        self._committed = version
        self._next_step = version
        self._trainer_version = version
        self._sampling: dict[int, int] = {}  # group id -> admitted version
        self._ready: dict[int, int] = {}
        self._batched: dict[int, int] = {}
        self._held: Counter[int] = Counter()  # version that releases -> slots
        self._admitted = 0
        self._trained = 0
        self._dropped: Counter[str] = Counter()

    @property
    def capacity(self) -> int:
        """Slots in all: (K + 1) * B."""
        return (self.max_staleness + 1) * self.groups_per_batch

    @property
    def used(self) -> int:
        """Slots taken."""
        return len(self._sampling) + len(self._ready) + len(self._batched) + self._held.total()

    @property
    def committed(self) -> int:
        """The version that every routable replica serves; new groups are admitted at it."""
        return self._committed

    @property
    def next_step(self) -> int:
        """The step that the next batch fills."""
        return self._next_step

    def can_admit(self) -> bool:
        """Whether a slot is free."""
        return self.used < self.capacity

    def admit(self, group_id: int) -> int:
        """Charge a slot; returns the version that the group is admitted at."""
        if not self.can_admit():
            raise InvariantError(f"group {group_id} admitted with no free slot: {self.view()}")
        self._refuse_known(group_id)
        self._sampling[group_id] = self._committed
        self._admitted += 1
        return self._committed

    def restore(self, group_id: int, admitted_version: int) -> None:
        """Take over a group that an earlier process finished but did not train. It keeps its age."""
        self._refuse_known(group_id)
        self._ready[group_id] = admitted_version
        self._admitted += 1
        if self.used > self.capacity or not feasible(self._deadlines(), self._next_step, self.groups_per_batch):
            raise InvariantError(
                f"restored group {group_id} (admitted at {admitted_version}) does not fit step {self._next_step} "
                f"with max_staleness {self.max_staleness} and {self.groups_per_batch} groups per batch: {self.view()}"
            )

    def finished(self, group_id: int) -> None:
        """Sampled, scored and durable: the group may be batched."""
        self._ready[group_id] = self._pop(self._sampling, group_id, "finished")

    def drop(self, group_id: int, reason: str) -> None:
        """Free the slot of a group that will not be trained."""
        self._pop(self._ready if group_id in self._ready else self._sampling, group_id, f"drop ({reason})")
        self._dropped[reason] += 1

    def next_batch(self, *, more_to_come: bool) -> tuple[int, ...] | None:
        """Take the groups of the next step out of the ready ones, or None while it is right to wait."""
        k = self.max_staleness
        ids = choose(
            [(group_id, admitted + k) for group_id, admitted in self._ready.items()],
            [admitted + k for admitted in self._sampling.values()],
            step=self._next_step,
            groups_per_batch=self.groups_per_batch,
            more_to_come=more_to_come,
        )
        if ids is None:
            return None
        for group_id in ids:
            admitted = self._batched[group_id] = self._ready.pop(group_id)
            if not 0 <= self._next_step - admitted <= k:
                raise InvariantError(
                    f"group {group_id} admitted at version {admitted} is {self._next_step - admitted} versions old at "
                    f"step {self._next_step}; the bound is {k}"
                )
        self._next_step += 1
        return ids

    def trained(self, group_ids: tuple[int, ...], version: int) -> None:
        """The step that trained these groups made `version`; their slots wait until it is served everywhere."""
        if version != self._trainer_version + 1:
            raise InvariantError(f"step made version {version} after version {self._trainer_version}")
        self._trainer_version = version
        for group_id in group_ids:
            self._pop(self._batched, group_id, "trained")
        self._trained += len(group_ids)
        if version > self._committed:
            self._held[version] += len(group_ids)

    def commit(self, version: int) -> None:
        """Every routable replica serves `version` (or newer): free what was waiting for it. Never moves back."""
        self._committed = max(self._committed, version)
        for held in [held for held in self._held if held <= self._committed]:
            del self._held[held]

    def check(self) -> None:
        """Raise `InvariantError` unless the books balance."""
        view = self.view()
        if view.admitted != view.trained + sum(view.dropped.values()) + view.alive:
            raise InvariantError(f"rollouts are not conserved: {view}")
        if view.used > view.capacity:
            raise InvariantError(f"more slots used than there are: {view}")
        if not feasible(self._deadlines(), self._next_step, self.groups_per_batch):
            raise InvariantError(f"a group cannot be trained by its deadline any more: {view}")

    def view(self) -> LedgerView:
        """The counts now."""
        return LedgerView(
            capacity=self.capacity,
            used=self.used,
            sampling=len(self._sampling),
            ready=len(self._ready),
            batched=len(self._batched),
            held=self._held.total(),
            admitted=self._admitted,
            trained=self._trained,
            dropped=dict(self._dropped),
        )

    def _deadlines(self) -> list[int]:
        return [admitted + self.max_staleness for admitted in (*self._sampling.values(), *self._ready.values())]

    def _refuse_known(self, group_id: int) -> None:
        if group_id in self._sampling or group_id in self._ready or group_id in self._batched:
            raise InvariantError(f"group {group_id} is alive already")

    @staticmethod
    def _pop(groups: dict[int, int], group_id: int, what: str) -> int:
        try:
            return groups.pop(group_id)
        except KeyError:
            raise InvariantError(f"{what}: group {group_id} is not where it should be") from None
