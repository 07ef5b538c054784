import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_builders import rows

from rlorch.engine.collate import cut, lay_out, micro_batches
from rlorch.errors import UserError
from rlorch.losses import LOSSES
from rlorch.types import Datum

pytestmark = pytest.mark.engine

LIMITS = {"vocab_size": 128, "max_tokens": 512}
PPO = LOSSES["ppo"]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 500), st.integers(0, 300))
def test_every_row_is_in_one_micro_batch_within_the_budget(lengths, budget, pass_cost):
    lengths_B = np.array(lengths)
    batches = cut(lengths_B, budget, pass_cost)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch_B in batches:
        assert len(batch_B) == 1 or len(batch_B) * lengths_B[batch_B].max() <= budget


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 300))
def test_a_pass_is_added_only_where_it_saves_more_padding_than_it_costs(lengths, pass_cost):
    lengths_B = np.array(lengths)

    def padded(batches):
        return sum(len(b) * int(lengths_B[b].max()) for b in batches)

    one, several = cut(lengths_B, 10**6), cut(lengths_B, 10**6, pass_cost)
    assert len(one) == 1
    assert padded(one) - padded(several) >= 0
    if len(several) > 1:
        assert padded(one) - padded(several) > pass_cost


def test_what_micro_batches_hold_is_what_the_datums_say():
    datums = rows(0, [5, 1, 9, 9, 3, 30])
    laid = lay_out(datums, **LIMITS, loss=PPO, config={})
    seen = np.zeros(len(laid.tokens_N))
    for batch in micro_batches(laid, 20, torch.device("cpu")):
        width = batch.tokens_BT.shape[1]
        assert batch.lengths_B.sum() == len(batch.targets_N) == len(batch.positions_N)
        for i, source in enumerate(batch.sources_N):
            row = int(np.searchsorted(laid.starts_B, source, side="right")) - 1
            t = int(source - laid.starts_B[row])
            b, column = divmod(int(batch.positions_N[i]), width)
            assert column == t
            assert batch.tokens_BT[b, : t + 1].tolist() == datums[row].tokens_T[: t + 1].tolist()
            assert batch.targets_N[i] == datums[row].loss_inputs["target_tokens"][t]
            for key in ("logprobs", "advantages", "mask"):
                assert batch.inputs[key][i] == datums[row].loss_inputs[key][t]
        seen[batch.sources_N] += 1
    assert (seen == laid.selected_N).all()


def test_results_come_back_per_datum_in_order():
    laid = lay_out(rows(0, [4, 2, 7]), **LIMITS)
    assert [len(part) for part in laid.unpack(np.arange(13, dtype=np.float32))] == [4, 2, 7]
    assert laid.unpack(np.arange(13, dtype=np.float32))[1].tolist() == [4, 5]


def broken(change):
    datums = rows(0, [4, 6])
    inputs = {key: value.copy() for key, value in datums[1].loss_inputs.items()}
    tokens = change(inputs)
    return [datums[0], Datum(datums[1].tokens_T if tokens is None else tokens, inputs)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.__delitem__("advantages"), "datum 1: loss input 'advantages' is missing"),
        (lambda i: i.__delitem__("mask"), "datum 1: loss input 'mask' is missing"),
        (lambda i: i.update(logprobs=i["logprobs"][:-1]), r"datum 1: loss input 'logprobs' has shape \(5,\)"),
        (
            lambda i: i["target_tokens"].__setitem__(2, 128),
            "datum 1: target_tokens holds a token id outside .* position 2",
        ),
        (
            lambda i: i["logprobs"].__setitem__(4, np.nan),
            "datum 1: logprobs holds a value that is not finite at position 4",
        ),
        (lambda i: i["mask"].__setitem__(5, -1), "datum 1: mask holds a negative value at position 5"),
        (lambda i: i.update(target_tokens=i["target_tokens"] * 1.0), "datum 1: loss input 'target_tokens' has dtype"),
        (lambda i: np.array([], dtype=np.int64), "datum 1: tokens have shape"),
        (lambda i: np.array([-1, 2, 3, 4, 5, 6]), "datum 1: tokens holds a token id outside"),
        (lambda i: np.zeros(513, dtype=np.int64), "datum 1: 513 tokens; the model's positions end at 512"),
        (lambda i: np.zeros(6), "datum 1: tokens have dtype"),
    ],
)
def test_a_bad_datum_is_named_with_its_key(change, message):
    with pytest.raises(UserError, match=message):
        lay_out(broken(change), **LIMITS, loss=PPO, config={})


def test_a_penalised_reference_must_be_there():
    with pytest.raises(UserError, match="datum 0: loss input 'ref_logprobs' is missing"):
        lay_out(rows(0, [4]), **LIMITS, loss=PPO, config={"kl_beta": 0.1})


def test_garbage_under_the_mask_is_accepted():
    datums = broken(lambda i: i["logprobs"].__setitem__(0, np.nan))
    assert lay_out(datums, **LIMITS, loss=PPO, config={}).selected_N.sum() == 1 + 3


def test_no_datums_are_refused():
    with pytest.raises(UserError, match="no datums"):
        lay_out([], **LIMITS)
