"""Between tinker's types and rlorch's."""

import numpy as np
import pytest
import tinker
import torch

from rlorch.errors import DataError, UserError
from rlorch.sdk import tinker_types
from rlorch.types import AdamParams, ForwardResult, StepResult


def row(length: int = 3, **inputs: object) -> tinker.Datum:
    inputs = {"target_tokens": torch.arange(length)} | inputs
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(range(length))), loss_fn_inputs=inputs)  # type: ignore[arg-type]


def test_tensors_arrays_and_lists_become_arrays_of_the_right_kind() -> None:
    one = row(weights=torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16), advantages=[1, 2, 3])
    (datum,) = tinker_types.to_datums([one])
    assert datum.tokens_T.dtype == np.int64
    assert datum.loss_inputs["target_tokens"].dtype == np.int64
    assert {key: value.tolist() for key, value in datum.loss_inputs.items()} == {
        "target_tokens": [0, 1, 2], "weights": [0.0, 1.0, 1.0], "advantages": [1.0, 2.0, 3.0],
    }  # fmt: skip
    assert datum.loss_inputs["advantages"].dtype == np.float32


def test_soft_targets_keep_their_second_axis_also_when_sparse() -> None:
    weights = torch.zeros(8, 8)
    weights[1, 0], weights[5, 1] = 0.25, 0.75
    one = row(8, target_tokens=torch.ones(8, 8, dtype=torch.int64), weights=weights)
    assert one.loss_fn_inputs["weights"].sparse_crow_indices is not None
    (datum,) = tinker_types.to_datums([one])
    np.testing.assert_array_equal(datum.loss_inputs["weights"], weights.numpy())
    assert datum.loss_inputs["target_tokens"].shape == (8, 8)


def test_only_the_keys_that_are_asked_for_are_taken() -> None:
    odd = row(anything=torch.zeros(2, 5, 7))
    (datum,) = tinker_types.to_datums([odd], keys=())
    assert set(datum.loss_inputs) == {"target_tokens"}
    with pytest.raises(DataError, match="datum 0: 'anything' has shape"):
        tinker_types.to_datums([odd])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(weights=torch.ones(2)), "datum 1: 'weights' has shape"),
        (row(target_tokens=torch.tensor([1, 2])), "datum 1: 'target_tokens' has shape"),
        (row(target_tokens=torch.tensor([1, -100, 2])), "holds -100; token ids are not negative"),
        (row(weights=torch.tensor([1.0, float("nan"), 1.0])), "'weights' holds NaN"),
        (row(target_tokens=torch.ones(3, 2, dtype=torch.int64), weights=torch.ones(3)), "one weight for each"),
        (tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs={}), "loss_fn_inputs has no"),
        (tinker.Datum(model_input=tinker.ModelInput.empty(), loss_fn_inputs={}), "datum 1: the model input is empty"),
        ({"tokens": [1]}, "datum 1: it is a dict"),
    ],
)  # fmt: skip
def test_a_bad_datum_is_named_by_its_index_and_key(bad: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        tinker_types.to_datums([row(), bad])


def test_no_data_and_a_single_datum_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        tinker_types.to_datums([])
    with pytest.raises(DataError, match="must be a list"):
        tinker_types.to_datums(row())  # type: ignore[arg-type]


def test_adam_parameters_keep_every_value() -> None:
    adam = tinker.AdamParams(learning_rate=1e-5, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.01, grad_clip_norm=2)
    assert tinker_types.to_adam(adam) == AdamParams(1e-5, 0.8, 0.9, 1e-8, 0.01, 2.0)
    with pytest.raises(UserError, match="AdamW"):
        tinker_types.to_adam({"learning_rate": 1.0})


def test_results_come_back_as_tinkers_types() -> None:
    logprobs = np.array([-0.5, -1.5], np.float32)
    top = (np.array([[3], [4]]), np.array([[-0.1], [-0.2]], np.float32))
    output = tinker_types.from_forward(ForwardResult((logprobs,), {"loss:sum": 2.0}, (top,)), {"loss:sum": 3.0})
    assert output.metrics == {"loss:sum": 3.0}
    assert output.loss_fn_outputs[0]["logprobs"].tolist() == [-0.5, -1.5]
    assert output.loss_fn_outputs[0]["top_k_indices"].tolist() == [[3], [4]]
    np.testing.assert_array_equal(tinker_types.forward_logprobs(output)[0], logprobs)
    assert tinker_types.from_step(StepResult(4, {"grad_norm": 0.5})).metrics == {"grad_norm": 0.5, "step": 4.0}


def test_a_sequence_with_weights_becomes_a_shifted_row_cut_to_length() -> None:
    datum = tinker_types.datum_from_model_input_weights(
        tinker.ModelInput.from_ints([5, 6, 7, 8]), torch.tensor([0.0, 0.0, 1.0, 1.0]), max_length=3
    )
    assert datum.model_input.to_ints() == [5, 6]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7]
    assert datum.loss_fn_inputs["weights"].tolist() == [0.0, 1.0]
