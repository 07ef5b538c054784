"""Which finished groups the next optimizer step trains: earliest deadline first, overtaking only where it is safe.

A group admitted at version c may be trained by steps c, c+1, ..., c+K (K = max_staleness), where step s is the one
that starts from trainer version s. Its deadline is c + K. Training whatever finished first would starve a slow
group past its deadline; strict admission order would let one slow group block the rest. The rule between the two:

    feasible at step s:  for every d >= s,  #(untrained alive groups with deadline <= d)  <=  (d - s + 1) * B

B groups leave at every step. If the state is feasible now and stays so after the chosen groups have left, no group
ever misses its deadline. Choosing the B finished groups with the earliest deadlines keeps the most slack for every
d at once, so when that choice is not safe no other is, and the step waits for a slow group.

Admission keeps feasibility by the slot count (`rlorch.coordinator.ledger`): alive <= (K + 1) * B.
"""

from collections.abc import Sequence


def feasible(deadlines: Sequence[int], step: int, groups_per_batch: int) -> bool:
    """Whether every group can still be trained by its deadline.

    Args:
        deadlines: of all untrained alive groups, finished or not.
        step: the next step to train.
        groups_per_batch: B, groups that leave per step.
    """
    ordered = sorted(deadlines)
    return all(index < (deadline - step + 1) * groups_per_batch for index, deadline in enumerate(ordered))


def choose(
    ready: Sequence[tuple[int, int]],
    unfinished: Sequence[int],
    *,
    step: int,
    groups_per_batch: int,
    more_to_come: bool,
) -> tuple[int, ...] | None:
    """Pick the groups of the next step, or None to wait.

    Args:
        ready: (group id, deadline) of finished groups, in the order they finished.
        unfinished: deadlines of alive groups that have not finished.
        step: the step to fill.
        groups_per_batch: B.
        more_to_come: whether new groups will still be admitted. When not, and nothing is unfinished, what is
            left makes a last, smaller batch.

    Returns:
        Ids in ascending order (a batch's order must not depend on timing), at most B of them.
    """
    if not ready:
        return None
    if len(ready) < groups_per_batch and (more_to_come or unfinished):
        return None
    by_deadline = sorted(ready, key=lambda entry: entry[1])
    chosen, left = by_deadline[:groups_per_batch], by_deadline[groups_per_batch:]
    remaining = [deadline for _, deadline in left] + list(unfinished)
    if not feasible(remaining, step + 1, groups_per_batch):
        return None
    return tuple(sorted(group_id for group_id, _ in chosen))
