"""Rows are held out by what they say, so training never sees a held-out prompt."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.data import split_held_out
from rlorch.errors import DataError


def rows_of(prompts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "id": index} for index, prompt in enumerate(prompts)]


def prompts_of(rows: Any) -> list[str]:
    return [row["prompt"] for row in rows]


@given(st.lists(st.text(max_size=3), min_size=1, max_size=40), st.data())
def test_train_and_held_out_share_no_prompt_and_lose_none(prompts: list[str], data: st.DataObject) -> None:
    distinct = set(prompts)
    num_held_out = data.draw(st.integers(0, len(distinct) - 1))
    rows = rows_of(prompts)
    train, held_out = split_held_out(rows, num_held_out)
    assert len(held_out) == num_held_out
    assert len(set(prompts_of(held_out))) == num_held_out
    assert not set(prompts_of(train)) & set(prompts_of(held_out))
    assert set(prompts_of(train)) | set(prompts_of(held_out)) == distinct
    assert list(train) == [row for row in rows if row["prompt"] not in set(prompts_of(held_out))]  # order, repeats
    assert [row["id"] for row in held_out] == [prompts.index(prompt) for prompt in prompts_of(held_out)]


def test_which_prompts_are_held_out_does_not_depend_on_the_order_of_the_rows() -> None:
    prompts = [f"prompt {index % 80}" for index in range(100)]
    _, held_out = split_held_out(rows_of(prompts), 10)
    _, shuffled = split_held_out(rows_of(random.Random(0).sample(prompts, 100)), 10)
    assert set(prompts_of(held_out)) == set(prompts_of(shuffled))


def test_the_choice_never_changes_because_results_on_disk_depend_on_it() -> None:
    _, held_out = split_held_out(rows_of([f"prompt {index}" for index in range(1000)]), 3)
    assert prompts_of(held_out) == ["prompt 439", "prompt 494", "prompt 755"]


def test_two_seeds_of_a_generator_that_overlap_do_not_leak() -> None:
    items = [f"item {index}" for index in range(30)]
    rows = rows_of(items[:20] + items[5:25])  # item i of seed s is item 0 of seed s + i
    train, held_out = split_held_out(rows, 6)
    assert not set(prompts_of(train)) & set(prompts_of(held_out))
    assert len(set(prompts_of(train))) == 19


def test_messages_identify_a_prompt_whatever_the_order_of_their_keys() -> None:
    one, same = [{"role": "user", "content": "a"}], [{"content": "a", "role": "user"}]
    other = [{"role": "user", "content": "b"}]
    rows = [{"chat": one}, {"chat": other}, {"chat": same}]
    train, held_out = split_held_out(rows, 1, "chat")
    assert (len(train), len(held_out)) in ((1, 1), (2, 1))
    assert (len(train) == 1) == (held_out[0]["chat"] == one)


def test_holding_out_everything_or_by_an_absent_field_is_refused() -> None:
    rows = rows_of(["a", "b", "a"])
    with pytest.raises(DataError, match="num_prompts is 2, but the 3 rows have only 2 distinct prompts"):
        split_held_out(rows, 2)
    with pytest.raises(DataError, match=r"row 0: no field 'question' .* it has 'prompt', 'id'"):
        split_held_out(rows, 1, "question")
    assert split_held_out(rows, 0, "question") == (rows, ())
    with pytest.raises(ValueError, match="not -1"):
        split_held_out(rows, -1)
