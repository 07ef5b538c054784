"""Custom losses as weights of a cross-entropy: the model's gradient is autograd's, whatever the loss couples."""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from rlorch.engine.tiny import make_tiny_model
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import NonFiniteError, UserError
from rlorch.losses.custom import linearize
from rlorch.specs import TrainerSpec, WeightsSpec
from rlorch.types import Datum, LossSpec

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("custom") / "model"
    make_tiny_model(str(path))
    return str(path)


def rows(seed, lengths):
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, 100, length + 1) for length in lengths]
    return [
        Datum(t[:-1], {"target_tokens": t[1:], "weights": (np.arange(len(t) - 1) >= 2).astype(np.float32)})
        for t in tokens
    ]


def soft_rows(seed, lengths, columns):
    rng = np.random.default_rng(seed)
    datums = []
    for length in lengths:
        weights = rng.dirichlet(np.ones(columns), length).astype(np.float32)
        weights[:2] = 0
        targets = rng.integers(3, 100, (length, columns))
        datums.append(Datum(rng.integers(3, 100, length), {"target_tokens": targets, "weights": weights}))
    return datums


def pairs(datums, logprobs):
    """DPO-like: chosen and rejected alternate, and every row enters through its sum."""
    sums = torch.stack([(lp * torch.tensor(d.loss_inputs["weights"])).sum() for d, lp in zip(datums, logprobs)])  # noqa: B905
    margin = 0.3 * (sums[0::2] - sums[1::2])
    return -logsigmoid(margin).mean(), {"margin": margin.detach().mean().item()}


def variance(datums, logprobs):
    """Couples every token with every other."""
    return torch.cat(logprobs).exp().var() * 50, {}


def first_row_only(datums, logprobs):
    return (logprobs[0] ** 2).sum(), {"rows": len(datums)}


def model_logprobs(model, datums):
    result = []
    for datum in datums:
        logits = model(input_ids=torch.tensor(datum.tokens_T)[None], use_cache=False).logits[0].float()
        targets = torch.tensor(datum.loss_inputs["target_tokens"])
        shaped = targets if targets.ndim == 2 else targets[:, None]
        result.append(logits.log_softmax(-1).gather(-1, shaped).view_as(targets))
    return result


def assert_close(found, model):
    for name, parameter in model.named_parameters():
        expected = parameter.grad
        torch.testing.assert_close(found[name].grad, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("loss", [pairs, variance, first_row_only])
def test_the_gradient_of_all_weights_is_autograd_through_the_model(directory, loss):
    datums = rows(1, [14, 5, 9, 30])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected, _ = loss(datums, model_logprobs(model, datums))
    expected.backward()
    engine = TorchTrainer(directory, TrainerSpec(micro_batch_tokens=32, logprob_chunk_tokens=8), WeightsSpec())
    linear = linearize(datums, engine.forward(datums).logprobs, loss)
    engine.forward_backward(linear.datums, LossSpec("cross_entropy"))
    assert linear.loss == pytest.approx(expected.item(), rel=1e-4)
    assert_close(engine._parameters, model)


def test_soft_targets_have_the_gradient_of_full_logits_row_by_row(directory):
    datums = soft_rows(2, [14, 5, 9], 4)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logprobs = model_logprobs(model, datums)
    weighted = [(lp * torch.tensor(d.loss_inputs["weights"])).sum() for d, lp in zip(datums, logprobs, strict=True)]
    loss = -torch.stack(weighted).sum()
    loss.backward()
    for options in ({}, {"micro_batch_tokens": 20, "logprob_chunk_tokens": 4}):
        engine = TorchTrainer(directory, TrainerSpec(**options), WeightsSpec())
        result = engine.forward_backward(datums, LossSpec("cross_entropy"))
        assert_close(engine._parameters, model)
        assert result.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
        assert result.metrics["num_loss_tokens:sum"] == 12 + 3 + 7, "positions, not position times target"
        scored = engine.forward(datums).logprobs
        for lp, forward, wanted in zip(result.logprobs, scored, logprobs, strict=True):
            assert lp.shape == forward.shape == wanted.shape
            np.testing.assert_allclose(lp[2:], wanted.detach().numpy()[2:], rtol=1e-4)
            np.testing.assert_allclose(forward, wanted.detach().numpy(), rtol=1e-4)


def test_soft_targets_that_do_not_fit_are_refused_with_their_datum(directory):
    engine = TorchTrainer(directory, TrainerSpec(), WeightsSpec())
    mixed = [*soft_rows(0, [5], 3), *rows(0, [5])]
    with pytest.raises(UserError, match=r"datum 1: .*shape \(5,\).*3 targets per token"):
        engine.forward_backward(mixed, LossSpec("cross_entropy"))
    with pytest.raises(UserError, match=r"datum 1: .*shape \(4, 2\)"):
        engine.forward([*soft_rows(0, [5], 3), *soft_rows(0, [4], 2)])
    with pytest.raises(UserError, match="only cross_entropy takes several"):
        engine.forward_backward(soft_rows(0, [5], 3), LossSpec("ppo"))
    (datum,) = soft_rows(0, [5], 3)
    broken = datum.loss_inputs["target_tokens"].copy()
    broken[3, 1] = 10_000
    with pytest.raises(UserError, match=r"datum 0: target_tokens holds a token id outside \[0, 128\) at position 3"):
        engine.forward([Datum(datum.tokens_T, {"target_tokens": broken})])


def test_metrics_and_rows_that_do_not_matter_come_back_as_they_are():
    datums = rows(3, [4, 6])
    logprobs = [np.full(len(d.tokens_T), -2.0, np.float32) for d in datums]
    linear = linearize(datums, logprobs, first_row_only)
    assert (linear.loss, linear.metrics) == (16.0, {"rows": 2.0})
    assert linear.datums[0].loss_inputs["weights"].tolist() == [4.0] * 4
    assert linear.datums[1].loss_inputs["weights"].tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        (lambda d, lp: (lp[0], {}), UserError, "0-d tensor"),
        (lambda d, lp: (1.5, {}), UserError, "0-d tensor"),
        (lambda d, lp: (lp[0].sum().detach(), {}), UserError, "requires_grad False"),
        (lambda d, lp: (lp[1].sum() / 0.0, {}), NonFiniteError, "custom loss is -inf"),
        (lambda d, lp: ((lp[1] * 0).sqrt().sum(), {}), NonFiniteError, "datum 1 is not finite"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_says_why(loss, error, said):
    datums = rows(3, [4, 6])
    logprobs = [np.full(len(d.tokens_T), -2.0, np.float32) for d in datums]
    with pytest.raises(error, match=said):
        linearize(datums, logprobs, loss)
