import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.coordinator.batching import choose, feasible
from rlorch.coordinator.ledger import Ledger
from rlorch.errors import InvariantError


def finish_batch(ledger: Ledger, first_id: int) -> tuple[int, ...]:
    for group_id in range(first_id, first_id + ledger.groups_per_batch):
        ledger.admit(group_id)
        ledger.finished(group_id)
    ids = ledger.next_batch(more_to_come=True)
    assert ids is not None
    return ids


def test_on_policy_admits_the_next_batch_only_after_the_commit_everywhere() -> None:
    ledger = Ledger(groups_per_batch=2, max_staleness=0)
    ids = finish_batch(ledger, 0)
    assert not ledger.can_admit()
    ledger.trained(ids, version=1)
    assert not ledger.can_admit(), "trained, but no replica serves version 1 yet"
    ledger.commit(1)
    assert ledger.can_admit()
    assert ledger.admit(2) == 1


def test_a_dropped_group_frees_its_slot_and_counts_under_its_reason() -> None:
    ledger = Ledger(groups_per_batch=1, max_staleness=0)
    ledger.admit(0)
    ledger.drop(0, "equal_rewards")
    assert ledger.can_admit()
    assert ledger.view().dropped == {"equal_rewards": 1}
    ledger.check()


def test_a_slow_group_is_waited_for_when_skipping_it_would_break_the_bound() -> None:
    ledger = Ledger(groups_per_batch=1, max_staleness=1)
    ledger.admit(0)  # slow, admitted at 0: must be trained by step 1
    ledger.admit(1)
    ledger.finished(1)
    assert ledger.next_batch(more_to_come=True) == (1,), "step 0 may overtake"
    ledger.trained((1,), 1)
    ledger.commit(1)
    ledger.admit(2)
    ledger.finished(2)
    assert ledger.next_batch(more_to_come=True) is None, "step 1 is the slow group's last chance"
    ledger.finished(0)
    assert ledger.next_batch(more_to_come=True) == (0,)


def test_the_last_batch_may_be_smaller_when_nothing_more_comes() -> None:
    ledger = Ledger(groups_per_batch=4, max_staleness=0)
    ledger.admit(7)
    ledger.finished(7)
    assert ledger.next_batch(more_to_come=True) is None
    assert ledger.next_batch(more_to_come=False) == (7,)


def test_a_restored_group_keeps_its_age_and_one_too_old_is_refused() -> None:
    ledger = Ledger(groups_per_batch=2, max_staleness=1, version=5)
    ledger.restore(11, admitted_version=4)
    ledger.restore(12, admitted_version=5)
    assert ledger.next_batch(more_to_come=True) == (11, 12)
    with pytest.raises(InvariantError, match="admitted at 3"):
        Ledger(groups_per_batch=2, max_staleness=1, version=5).restore(10, admitted_version=3)


def test_admission_beyond_the_slots_is_an_error() -> None:
    ledger = Ledger(groups_per_batch=1, max_staleness=0)
    ledger.admit(0)
    with pytest.raises(InvariantError, match="no free slot"):
        ledger.admit(1)


@given(
    seed=st.integers(0, 10_000),
    groups_per_batch=st.integers(1, 5),
    max_staleness=st.integers(0, 4),
)
def test_any_program_conserves_groups_keeps_the_bound_and_never_gets_stuck(
    seed: int, groups_per_batch: int, max_staleness: int
) -> None:
    """Random admissions, completions in any order, drops, late commits: the ledger's own checks must hold, and
    finishing whatever is unfinished must always let the next step be filled."""
    rng = random.Random(seed)
    ledger = Ledger(groups_per_batch, max_staleness)
    sampling: list[int] = []
    channel: list[tuple[int, ...]] = []
    admitted_at: dict[int, int] = {}
    next_id = trainer_version = 0
    for _ in range(200):
        action = rng.random()
        if action < 0.4 and ledger.can_admit():
            admitted_at[next_id] = ledger.admit(next_id)
            sampling.append(next_id)
            next_id += 1
        elif action < 0.65 and sampling:
            group_id = sampling.pop(rng.randrange(len(sampling)))
            if rng.random() < 0.2:
                ledger.drop(group_id, "equal_rewards")
            else:
                ledger.finished(group_id)
        elif action < 0.8:
            step = ledger.next_step
            if (ids := ledger.next_batch(more_to_come=True)) is not None:
                assert all(0 <= step - admitted_at[group_id] <= max_staleness for group_id in ids)
                channel.append(ids)
        elif action < 0.9 and channel:
            trainer_version += 1
            ledger.trained(channel.pop(0), trainer_version)
        elif trainer_version > ledger.committed:
            ledger.commit(rng.randint(ledger.committed + 1, trainer_version))
        ledger.check()
    for ids in channel:
        trainer_version += 1
        ledger.trained(ids, trainer_version)
    ledger.commit(trainer_version)
    while ledger.can_admit():
        ledger.admit(next_id)
        sampling.append(next_id)
        next_id += 1
    for group_id in sampling:
        ledger.finished(group_id)
    assert ledger.next_batch(more_to_come=True) is not None
    ledger.check()


@given(
    ready=st.lists(st.integers(0, 4), max_size=7),
    unfinished=st.lists(st.integers(0, 4), max_size=5),
    groups_per_batch=st.integers(1, 3),
)
def test_earliest_deadline_first_waits_only_when_no_choice_of_groups_is_safe(
    ready: list[int], unfinished: list[int], groups_per_batch: int
) -> None:
    from itertools import combinations

    entries = list(enumerate(ready))
    chosen = choose(entries, unfinished, step=0, groups_per_batch=groups_per_batch, more_to_come=True)
    any_safe = any(
        feasible([d for i, d in entries if i not in pick] + unfinished, 1, groups_per_batch)
        for pick in combinations(range(len(ready)), groups_per_batch)
    )
    assert (chosen is not None) == any_safe
