import numpy as np
import pytest
import torch
from trainer_builders import plain_logprobs, rows, tiny_model

from rlorch.engine.reference import TorchReference
from rlorch.engine.trainer import TorchTrainer
from rlorch.errors import ConfigError, NonFiniteError, RlorchError, UserError
from rlorch.specs import TrainerSpec, WeightsSpec
from rlorch.types import AdamParams, Datum, LossSpec

pytestmark = pytest.mark.engine

TIS = LossSpec("importance_sampling", {"tis_cap": 2.0})
ADAM = AdamParams(2e-3, weight_decay=0.1, eps=1e-8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model(tmp_path_factory)


def trainer(directory, **spec):
    return TorchTrainer(directory, TrainerSpec(**spec), WeightsSpec())


def gradients(engine):
    return {n: p.grad.clone() for n, p in engine._parameters.items() if p.grad is not None}


def weights(engine):
    return {n: p.detach().clone() for n, p in engine._parameters.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def slow_loss(logprobs, datums):
    """Truncated importance sampling, row by row; (loss, loss tokens)."""
    total, count = torch.zeros(()), 0.0
    for lp, datum in zip(logprobs, datums, strict=True):
        q, a, m = (torch.tensor(datum.loss_inputs[key]) for key in ("logprobs", "advantages", "mask"))
        total = total - (m * (lp.detach() - q).exp().clamp(max=2.0) * a * lp).sum()
        count += float(m.sum())
    return total, count


def test_the_gradient_equals_full_logits_row_by_row(directory):
    datums = rows(1, [14, 3, 9, 14, 1, 60])
    model, logprobs = plain_logprobs(directory, datums)
    loss, count = slow_loss(logprobs, datums)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for options in ({}, {"micro_batch_tokens": 30, "logprob_chunk_tokens": 4}, {"activation_checkpointing": True}):
        engine = trainer(directory, **options)
        result = engine.forward_backward(datums, TIS)
        found = gradients(engine)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        assert result.metrics["loss:sum"] == pytest.approx(_surrogate(logprobs, datums), rel=1e-4)
        assert result.metrics["num_loss_tokens:sum"] == count
        for datum, lp, wanted in zip(datums, result.logprobs, logprobs, strict=True):
            mask = datum.loss_inputs["mask"]
            assert lp.dtype == np.float32
            np.testing.assert_allclose(lp, wanted.detach().numpy() * mask, rtol=1e-4, atol=1e-5)


def _surrogate(logprobs, datums):
    """Value of the loss: the ratio to the detached current policy is 1, so -w A without the log-prob."""
    total = 0.0
    for lp, datum in zip(logprobs, datums, strict=True):
        i = datum.loss_inputs
        total -= float(
            (i["mask"] * np.minimum(np.exp(lp.detach().numpy() - i["logprobs"]), 2.0) * i["advantages"]).sum()
        )
    return total


def test_entropy_is_the_mean_over_loss_tokens_of_the_exact_one(directory):
    datums = rows(1, [9, 4])
    model, _ = plain_logprobs(directory, datums)
    expected = 0.0
    for datum in datums:
        logp = model(input_ids=torch.tensor(datum.tokens_T)[None]).logits[0].detach().log_softmax(-1)
        expected += float((-(logp.exp() * logp).sum(-1) * torch.tensor(datum.loss_inputs["mask"])).sum())
    found = trainer(directory).forward_backward(datums, TIS).metrics["entropy:sum"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_of_several_calls_add_exactly(directory):
    first, second = rows(1, [14, 9]), rows(2, [5, 6, 7])
    alone = []
    for datums in (first, second):
        engine = trainer(directory)
        engine.forward_backward(datums, TIS)
        alone.append(gradients(engine))
    both = trainer(directory)
    both.forward_backward(first, TIS)
    both.forward_backward(second, TIS)
    assert_same_bits(gradients(both), {n: alone[0][n] + alone[1][n] for n in alone[0]})


def test_equal_calls_give_equal_bits(directory):
    results = []
    for _ in range(2):
        engine = trainer(directory, micro_batch_tokens=40)
        for seed in range(3):
            engine.forward_backward(rows(seed, [14, 9, 20, 3]), TIS)
            engine.optim_step(ADAM, "num_loss_tokens")
        results.append(weights(engine))
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("normalization", "divisor"), [("num_loss_tokens", 8 + 3 + 1), ("num_sequences", 3), ("none", 1)]
)
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_a_step_is_torch_adamw_on_the_normalised_clipped_gradient(directory, normalization, divisor, clip):
    engine = trainer(directory)
    initial = weights(engine)
    parameters = {n: torch.nn.Parameter(p.clone()) for n, p in initial.items()}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step, rate in enumerate((1e-3, 5e-4, 2e-3)):
        engine.forward_backward(rows(10 + step, [11, 6]), TIS)
        engine.forward_backward(rows(20 + step, [4]), TIS)
        for name, gradient in gradients(engine).items():
            parameters[name].grad = gradient / divisor
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip or float("inf"))
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        result = engine.optim_step(AdamParams(rate, weight_decay=0.1, eps=1e-8, grad_clip_norm=clip), normalization)
        assert result.version == step + 1
        assert result.metrics["grad_norm:last"] == pytest.approx(float(norm), rel=1e-5)
        assert result.metrics["learning_rate:last"] == rate
    for name, value in weights(engine).items():
        torch.testing.assert_close(value, parameters[name].data, rtol=1e-5, atol=2e-5)
    assert any(not torch.equal(value, initial[n]) for n, value in weights(engine).items())


def test_a_step_clears_the_gradient(directory):
    engine = trainer(directory)
    engine.forward_backward(rows(1, [9]), TIS)
    engine.optim_step(ADAM, "none")
    assert gradients(engine) == {}
    with pytest.raises(UserError, match="no forward_backward came before"):
        engine.optim_step(ADAM, "none")
    assert engine.version == 1


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_dropped(directory):
    engine = trainer(directory)
    engine.forward_backward(rows(1, [9]), TIS)
    engine.optim_step(ADAM, "none")
    before, moments = weights(engine), {n: t.clone() for n, t in engine._learner.adamw.tensors().items()}
    engine.forward_backward(rows(1, [9]), TIS)
    engine._parameters["model.norm.weight"].grad[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 46 gradients are not finite, first \['model.norm.weight'\]"):
        engine.optim_step(ADAM, "none")
    assert engine.version == 1
    assert_same_bits(before, weights(engine))
    assert_same_bits(moments, engine._learner.adamw.tensors())
    engine.forward_backward(rows(1, [9]), TIS)
    assert engine.optim_step(ADAM, "none").version == 2


def test_a_refused_call_leaves_what_was_accumulated(directory):
    engine = trainer(directory)
    engine.forward_backward(rows(1, [9]), TIS)
    before = gradients(engine)
    with pytest.raises(UserError, match="datum 0"):
        engine.forward_backward([Datum(np.array([1, 2]), {})], TIS)
    with pytest.raises(ConfigError, match="did you mean"):
        engine.forward_backward(rows(1, [9]), LossSpec("ppo2"))
    assert_same_bits(before, gradients(engine))
    assert engine.optim_step(ADAM, "num_sequences").metrics["num_sequences:last"] == 1


def test_a_call_that_fails_halfway_keeps_a_part_of_a_gradient_from_being_stepped(directory):
    engine = trainer(directory, micro_batch_tokens=10)
    engine.forward_backward(rows(1, [9]), TIS)
    calls = []

    def fail_later(*_):
        calls.append(1)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("out of memory")

    hook = engine._policy.body.register_forward_pre_hook(fail_later)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.forward_backward(rows(2, [9, 9]), TIS)
    hook.remove()
    before = weights(engine)
    with pytest.raises(RlorchError, match=r"to version 1 failed .*out of memory.* repeat the forward_backward"):
        engine.optim_step(ADAM, "none")
    assert_same_bits(before, weights(engine))
    engine.forward_backward(rows(1, [9]), TIS)
    assert engine.optim_step(ADAM, "none").version == 1


def test_a_batch_with_nothing_to_learn_is_a_step_of_weight_zero(directory):
    engine = trainer(directory)
    before = weights(engine)
    datum = rows(1, [9])[0]
    empty = Datum(datum.tokens_T, {**datum.loss_inputs, "mask": np.zeros(9, dtype=np.float32)})
    result = engine.forward_backward([empty], TIS)
    assert result.metrics == {"loss:sum": 0.0, "num_loss_tokens:sum": 0.0}
    assert not result.logprobs[0].any()
    assert engine.optim_step(ADAM, "num_loss_tokens").metrics["grad_norm:last"] == 0.0
    assert_same_bits(before, weights(engine))


def test_an_untrained_policy_has_exactly_no_kl_to_the_reference(directory):
    datums = rows(5, [14, 9, 30])
    spec = TrainerSpec(micro_batch_tokens=40)
    reference = TorchReference(directory, spec).logprobs(datums)
    engine = TorchTrainer(directory, spec, WeightsSpec())
    assert all((a == b).all() for a, b in zip(engine.forward(datums).logprobs, reference, strict=True))
    engine.forward_backward(datums, TIS)
    engine.optim_step(ADAM, "num_loss_tokens")
    assert any((a != b).any() for a, b in zip(engine.forward(datums).logprobs, reference, strict=True))


def test_a_custom_loss_on_the_client_gets_its_exact_gradient(directory):
    """Tinker's protocol: forward, differentiate C(logprobs) outside, send weights = -dC/dlp as cross-entropy."""
    datums = rows(4, [8, 5], prompt=0)
    model, logprobs = plain_logprobs(directory, datums)
    sum((lp**2).sum() for lp in logprobs).backward()
    engine = trainer(directory)
    scored = engine.forward(datums).logprobs
    sent = [
        Datum(d.tokens_T, {"target_tokens": d.loss_inputs["target_tokens"], "weights": -2 * lp})
        for d, lp in zip(datums, scored, strict=True)
    ]
    engine.forward_backward(sent, LossSpec("cross_entropy"))
    found = gradients(engine)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max())
        )


def test_supervised_steps_learn_a_fixed_answer(directory):
    engine = trainer(directory)
    datums = [
        Datum(d.tokens_T, {"target_tokens": d.loss_inputs["target_tokens"], "weights": d.loss_inputs["mask"]})
        for d in rows(6, [8] * 4)
    ]
    losses = []
    for _ in range(20):
        metrics = engine.forward_backward(datums, LossSpec("cross_entropy")).metrics
        engine.optim_step(AdamParams(3e-3, grad_clip_norm=1.0), "num_loss_tokens")
        losses.append(metrics["loss:sum"] / metrics["num_loss_tokens:sum"])
    assert losses[0] > 4.5
    assert losses[-1] < 0.5
