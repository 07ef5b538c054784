"""Prompts by ordinal, and what a resumed run draws."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlorch.coordinator.source import Cursor, PromptSource, permutation
from rlorch.errors import InvariantError

# --- PromptSource -----------------------------------------------------------------------------------------


@given(num_rows=st.integers(1, 40), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_epoch_visits_every_row_once(num_rows: int, seed: int, epochs: int) -> None:
    source = PromptSource(num_rows, seed=seed, epochs=epochs)
    assert source.end == num_rows * epochs
    located = [source.locate(ordinal) for ordinal in range(num_rows * epochs)]
    for epoch in range(epochs):
        rows = [row for at, row in located if at == epoch]
        assert sorted(rows) == list(range(num_rows))


def test_an_ordinal_means_the_same_row_in_whatever_order_it_is_asked_for() -> None:
    one = PromptSource(50, seed=3)
    ordinals = list(range(200))
    in_order = [one.locate(ordinal) for ordinal in ordinals]
    another = PromptSource(50, seed=3)
    shuffled = random.Random(0).sample(ordinals, len(ordinals))
    located = {ordinal: another.locate(ordinal) for ordinal in shuffled}
    assert [located[ordinal] for ordinal in ordinals] == in_order


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(20, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_shuffle_never_changes_because_runs_on_disk_depend_on_it() -> None:
    assert permutation(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert permutation(10, 1234, 2).tolist() == [6, 5, 8, 4, 1, 3, 0, 9, 7, 2]


def test_the_shuffle_is_fair() -> None:
    first = np.bincount([permutation(8, seed, 0)[0] for seed in range(4000)], minlength=8)
    assert np.all(np.abs(first - 500) < 5 * np.sqrt(500))


def test_without_shuffle_rows_come_in_their_own_order_each_epoch() -> None:
    source = PromptSource(3, shuffle=False)
    assert [source.locate(ordinal) for ordinal in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert source.end is None


def test_ordinals_outside_the_stream_and_bad_arguments_are_refused() -> None:
    source = PromptSource(3, epochs=2)
    for ordinal in (-1, 6):
        with pytest.raises(ValueError, match=rf"ordinal {ordinal} is outside \[0, 6\)"):
            source.locate(ordinal)
    with pytest.raises(ValueError, match="at least one row"):
        PromptSource(0)
    with pytest.raises(ValueError, match="seed must be 0 or more, not -1"):
        PromptSource(3, seed=-1)
    with pytest.raises(ValueError, match="epochs"):
        PromptSource(3, epochs=0)


# --- Cursor -----------------------------------------------------------------------------------------------


def test_a_resumed_run_draws_what_was_in_flight_first_and_then_goes_on() -> None:
    cursor = Cursor([0, 1, 3, 6])
    assert [cursor.draw() for _ in range(5)] == [2, 4, 5, 7, 8]
    assert cursor.frontier == 2
    assert cursor.out_of_order == {3, 6}
    cursor.resolve(2)
    assert cursor.frontier == 4
    assert (3 in cursor, 4 in cursor, 6 in cursor) == (True, False, True)


def test_a_finite_source_is_exhausted_once_all_was_drawn() -> None:
    cursor = Cursor([1], end=3)
    assert [cursor.draw() for _ in range(4)] == [0, 2, None, None]
    assert Cursor(range(3), end=3).draw() is None


def test_resolving_what_was_never_drawn_is_a_bug() -> None:
    cursor = Cursor()
    cursor.draw()
    cursor.resolve(0)
    cursor.resolve(0)
    with pytest.raises(InvariantError, match="ordinal 1 is resolved but was never drawn"):
        cursor.resolve(1)
    with pytest.raises(ValueError, match="not -2"):
        Cursor([-2])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_over_any_number_of_lives_every_ordinal_is_resolved_exactly_once(data: st.DataObject) -> None:
    end = data.draw(st.integers(1, 40))
    resolved: set[int] = set()  # what the journal would say
    for _ in range(data.draw(st.integers(1, 5))):
        cursor = Cursor(resolved, end=end)
        alive: list[int] = []
        drawn: list[int] = []
        for _ in range(data.draw(st.integers(0, 60))):
            if alive and data.draw(st.booleans()):
                ordinal = alive.pop(data.draw(st.integers(0, len(alive) - 1)))
                assert ordinal not in resolved
                resolved.add(ordinal)
                cursor.resolve(ordinal)
            elif (ordinal := cursor.draw()) is not None:
                assert ordinal not in resolved
                alive.append(ordinal)
                drawn.append(ordinal)
            assert set(range(cursor.frontier)) | cursor.out_of_order == resolved
            assert cursor.frontier not in resolved
        assert drawn == sorted(set(drawn))
    cursor = Cursor(resolved, end=end)
    rest = list(iter(cursor.draw, None))
    assert sorted(resolved | set(rest)) == list(range(end))
