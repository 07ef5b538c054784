"""How micro-batches are dealt to ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_builders import rows

from rlorch.engine.collate import cut, deal, lay_out, micro_batches

pytestmark = pytest.mark.engine

LIMITS = {"vocab_size": 128, "max_tokens": 512}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 200),
    pass_cost=st.integers(0, 60),
    world=st.integers(1, 5),
)
def test_every_rank_makes_as_many_passes_and_every_row_is_dealt_once(lengths, budget, pass_cost, world):
    laid = lay_out(rows(0, lengths), **LIMITS)
    dealt = [deal(laid, budget, pass_cost, rank, world) for rank in range(world)]
    alone = cut(laid.lengths_B, budget, pass_cost)
    assert {len(batches) for batches in dealt} == {-(-len(alone) // world)}, "no more passes than were needed"
    found = [batch_B for batches in dealt for batch_B in batches if len(batch_B)]
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for batch_B in found:
        assert len(batch_B) == 1 or len(batch_B) * laid.lengths_B[batch_B].max() <= budget
    if world == 1:
        assert all((a == b).all() for a, b in zip(found, alone, strict=True)), "in the order of one process"
        return
    padded = [[len(b) * int(laid.lengths_B[b].max()) if len(b) else 0 for b in batches] for batches in dealt]
    for turn in range(len(padded[0]) - 1):
        assert min(of_rank[turn] for of_rank in padded) >= max(of_rank[turn + 1] for of_rank in padded), (
            "alike in a pass"
        )


def test_equal_rows_are_shared_evenly_where_one_micro_batch_would_hold_them_all():
    laid = lay_out(rows(0, [10] * 12), **LIMITS)
    assert [len(deal(laid, 8192, 128, rank, 4)[0]) for rank in range(4)] == [3, 3, 3, 3]


def test_micro_batches_without_a_selected_position_are_not_dealt():
    from rlorch.losses import LOSSES

    datums = rows(0, [10] * 4)
    for datum in datums[1:]:
        datum.loss_inputs["mask"][:] = 0
    laid = lay_out(datums, **LIMITS, loss=LOSSES["ppo"], config={})
    first, second = (list(micro_batches(laid, 10, torch.device("cpu"), rank, 2)) for rank in range(2))
    assert len(first) == len(second) == 1
    (work,), (empty,) = first, second
    assert len(work.sources_N) == 7
    assert len(empty.sources_N) == len(empty.targets_N) == len(empty.positions_N) == 0
    assert empty.tokens_BT.shape == (1, 1)
