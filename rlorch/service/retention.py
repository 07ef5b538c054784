"""Which checkpoints may go: pure decisions on their records.

A snapshot of all weights is needed by every snapshot that was made against it, so snapshots are looked at youngest
first: one that stays keeps its parent.
"""

from collections.abc import Collection, Iterable, Sequence

from rlorch.service.types import Checkpoint


def to_collect(
    checkpoints: Sequence[Checkpoint], *, now_s: float, protected: Collection[str], keep_newest: bool
) -> tuple[Checkpoint, ...]:
    """The checkpoints of one job whose time has come and that nothing needs, youngest snapshot first.

    Args:
        checkpoints: all that the job has.
        now_s: Unix time, seconds.
        protected: names that are in use.
        keep_newest: whether the newest snapshot of all weights may become the parent of another.
    """
    numbers = [checkpoint.number for checkpoint in checkpoints if checkpoint.number is not None]
    newest = max(numbers, default=None)
    needed: set[str | None] = set(protected)
    going: list[Checkpoint] = []
    for checkpoint in sorted(checkpoints, key=lambda one: -1 if one.number is None else one.number, reverse=True):
        expired = checkpoint.expires_s is not None and checkpoint.expires_s <= now_s
        is_newest = keep_newest and checkpoint.number is not None and checkpoint.number == newest
        if expired and not is_newest and checkpoint.name not in needed:
            going.append(checkpoint)
        else:
            needed.add(checkpoint.parent)
    return tuple(going)


def why_needed(
    checkpoint: Checkpoint, others: Iterable[Checkpoint], *, protected: Collection[str], keep_newest: bool
) -> str:
    """Why a checkpoint cannot be deleted now; empty when it can."""
    others = [other for other in others if other.name != checkpoint.name]
    children = [other.name for other in others if other.parent == checkpoint.name]
    if children:
        return f"snapshot {children[0]} was made against it: delete that one first"
    if checkpoint.name in protected:
        return "it is in use: load another snapshot on the deployment that serves it first"
    if keep_newest and checkpoint.number is not None:
        younger = [other for other in others if other.number is not None and other.number > checkpoint.number]
        if not younger:
            return "the next delta is made against it: save a base snapshot first, or delete the job"
    return ""
