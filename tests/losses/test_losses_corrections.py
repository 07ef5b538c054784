import math

import pytest
import torch

from rlorch.errors import ConfigError
from rlorch.losses import LOSSES, corrections, find_loss


def tensors(**values):
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def gradient(name, logprobs, inputs, lengths, options):
    lp_N = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    result = LOSSES[name].function(lp_N, inputs, torch.tensor(lengths), LOSSES[name].configure(options))
    result.loss.backward()
    assert lp_N.grad is not None
    return lp_N.grad.tolist(), {key: value.item() for key, value in result.metrics.items()}


def test_truncated_importance_sampling_weighs_the_score_by_the_capped_ratio():
    lp, q, a = [-1.0, -1.0, -1.0], [-1.0 - math.log(8), -1.0 + math.log(2), -1.0], [1.0, -2.0, 0.5]
    found, metrics = gradient("importance_sampling", lp, tensors(logprobs=q, advantages=a), [3], {"tis_cap": 2.0})
    assert found == pytest.approx([-2.0 * 1.0, 0.5 * 2.0, -1.0 * 0.5])
    assert metrics["tis_truncated_fraction:sum"] == 1
    assert metrics["ratio:max"] == pytest.approx(8.0)
    same, _ = gradient("reinforce", lp, tensors(logprobs=q, advantages=a), [3], {"tis_cap": 2.0})
    assert same == pytest.approx(found)


def test_without_a_correction_importance_sampling_weighs_by_the_whole_ratio():
    inputs = tensors(logprobs=[-1.0 - math.log(8)], advantages=[1.0])
    assert gradient("importance_sampling", [-1.0], inputs, [1], {})[0] == pytest.approx([-8.0])


def test_the_decoupled_objective_corrects_from_sampler_to_proximal_policy():
    inputs = tensors(logprobs=[-2.0], old_logprobs=[-1.5], advantages=[1.0])
    found, _ = gradient("ppo", [-1.4], inputs, [1], {})
    assert found == pytest.approx([-math.exp(0.5) * math.exp(0.1)])
    capped, _ = gradient("ppo", [-1.4], inputs, [1], {"tis_cap": 1.2})
    assert capped == pytest.approx([-1.2 * math.exp(0.1)])


def test_sequence_and_geometric_levels_differ_by_the_length():
    lp, q = [0.1, 0.1, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0]
    inputs = tensors(logprobs=q, advantages=[1.0] * 4)
    sequence, _ = gradient("reinforce", lp, inputs, [3, 1], {"tis_cap": 50.0, "tis_level": "sequence"})
    assert sequence == pytest.approx([-math.exp(0.3)] * 3 + [-math.exp(0.2)])
    geometric, _ = gradient("reinforce", lp, inputs, [3, 1], {"tis_cap": 50.0, "tis_level": "geometric"})
    assert geometric == pytest.approx([-math.exp(0.1)] * 3 + [-math.exp(0.2)])


def test_icepop_drops_tokens_on_both_sides_and_keeps_the_bounds():
    ratios = torch.tensor([0.49, 0.5, 1.0, 2.0, 2.01])
    assert corrections.icepop_keeps(ratios, 2.0).tolist() == [False, True, True, True, False]
    lp, q = [0.0, 0.0, 0.0], [-1.0, 1.0, -0.1]
    found, metrics = gradient("reinforce", lp, tensors(logprobs=q, advantages=[1.0] * 3), [3], {"icepop": 2.0})
    assert found == pytest.approx([0.0, 0.0, -math.exp(0.1)])
    assert metrics["icepop_masked_fraction:sum"] == 2


@pytest.mark.parametrize(("divergence", "delta"), [("tv", 0.15), ("kl", 0.05)])
def test_dppo_stops_only_tokens_that_moved_far_in_probability_and_would_move_further(divergence, delta):
    was, now = [0.001, 0.9, 0.9, 0.5, 0.5], [0.004, 0.6, 0.6, 0.9, 0.52]
    lp, q = [math.log(p) for p in now], [math.log(p) for p in was]
    advantages = [1.0, -1.0, 1.0, 1.0, 1.0]
    options = {"divergence": divergence, "delta_low": delta, "delta_high": delta}
    found, metrics = gradient("dppo", lp, tensors(logprobs=q, advantages=advantages), [5], options)
    assert found == pytest.approx([-4.0, 0.0, -0.6 / 0.9, 0.0, -0.52 / 0.5])
    assert metrics["clip_fraction:sum"] == 2
    ppo, _ = gradient("ppo", lp, tensors(logprobs=q, advantages=advantages), [5], {})
    assert ppo[0] == 0.0, "a ratio of 4 is clipped, though only 0.003 of probability moved"


def test_gspo_shares_one_ratio_per_sequence_and_keeps_token_advantages():
    lp, q = [-1.0, -1.2, -0.5], [-1.1, -1.1, -0.9]
    found, metrics = gradient("gspo", lp, tensors(logprobs=q, advantages=[1.0, 0.5, 1.0]), [2, 1], {})
    assert found == pytest.approx([-1.0, -0.5, 0.0])
    assert metrics["clip_fraction:sum"] == 1


def test_drift_metrics_are_the_estimators_they_are_named_for():
    inputs = tensors(logprobs=[-1.0, -1.0, -9.0], advantages=[0.0, 0.0, 0.0], mask=[1.0, 1.0, 0.0])
    _, metrics = gradient("reinforce", [-1.5, -0.9, -1.0], inputs, [3], {})
    assert metrics["kl_behaviour:sum"] == pytest.approx(0.5 - 0.1)
    assert metrics["kl_behaviour_k3:sum"] == pytest.approx(math.exp(-0.5) + 0.5 - 1 + math.exp(0.1) - 0.1 - 1)
    assert metrics["ratio:max"] == pytest.approx(math.exp(0.1))
    assert metrics["num_loss_tokens:sum"] == 2


def test_the_reference_kl_is_reported_even_when_it_is_not_penalised():
    inputs = tensors(logprobs=[-1.0], advantages=[0.0], ref_logprobs=[-1.5])
    found, metrics = gradient("ppo", [-1.0], inputs, [1], {})
    assert found == [0.0]
    assert metrics["ref_kl:sum"] == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_sums_of_empty_rows_are_zero():
    values, lengths = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0, 1, 0])
    assert corrections.sequence_sums(values, lengths).tolist() == [0, 3, 0, 4, 0]
    assert corrections.sequence_sums(values[:0], lengths * 0).tolist() == [0] * 5


def test_an_unknown_loss_or_option_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'importance_sampling'"):
        find_loss("importance_samplin")
    with pytest.raises(ConfigError, match="did you mean 'clip_high_threshold'"):
        LOSSES["ppo"].configure({"clip_high_treshold": 1.3})
    with pytest.raises(ConfigError, match="it has none"):
        LOSSES["cross_entropy"].configure({"x": 1})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {"clip_high_threshold": 0.9}),
        ("ppo", {"dual_clip": 0.5}),
        ("reinforce", {"tis_level": "word"}),
        ("reinforce", {"tis_cap": -1.0}),
        ("reinforce", {"kl_beta": math.nan}),
        ("reinforce", {"icepop": 0.5}),
        ("dro", {"beta": "much"}),
        ("dppo", {"divergence": "js"}),
        ("dppo", {"delta_low": -0.1}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_range(name, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))!r} of loss '{name}' is"):
        LOSSES[name].configure(options)


def test_a_correction_turned_off_by_zero_is_off():
    assert LOSSES["reinforce"].configure({"tis_cap": 0, "icepop": 0})["tis_cap"] == 0.0


def test_only_a_penalised_reference_is_required():
    assert LOSSES["ppo"].needs({"kl_beta": 0.1}) == ("logprobs", "advantages", "ref_logprobs")
    assert LOSSES["ppo"].needs({"kl_beta": 0.0}) == ("logprobs", "advantages")
    assert LOSSES["cross_entropy"].needs({}) == ()
