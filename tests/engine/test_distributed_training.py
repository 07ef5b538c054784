"""Two and three ranks over gloo against one process."""

import numpy as np
import pytest
from ranks import on_ranks, train
from trainer_builders import tiny_model

pytestmark = pytest.mark.engine

FLOAT32 = {"compute_dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory)


def compare(model, directory, world, spec, steps, *, exact):
    """Train on one rank and on several, and hold all that they return against each other."""
    ((one, one_state, one_scored, _),) = on_ranks(1, train, directory, model, FLOAT32 | spec, steps)
    of_ranks = on_ranks(world, train, directory, model, FLOAT32 | spec, steps)
    for returned, found, scored, _ in of_ranks:
        for (one_calls, one_metrics), (calls, metrics) in zip(one, returned, strict=True):
            assert metrics == pytest.approx(one_metrics, rel=1e-5)
            for (one_logprobs, one_measured), (logprobs, measured) in zip(one_calls, calls, strict=True):
                assert measured == pytest.approx(one_measured, rel=1e-4, abs=1e-5)
                for a, b in zip(one_logprobs, logprobs, strict=True):
                    np.testing.assert_allclose(b, a, atol=0 if exact else 2e-5, rtol=0)
        assert found.keys() == one_state.keys()
        for name, value in one_state.items():
            if exact:
                np.testing.assert_array_equal(found[name], value, err_msg=name)
            elif not name.startswith("exp_avg"):
                np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
        for a, b in zip(one_scored, scored, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5 if exact else 1e-4)
    return of_ranks


def test_two_ranks_are_bit_equal_to_two_micro_batches_without_clipping(model, tmp_path):
    steps = [{"lengths": [12, 12]}] * 4
    compare(model, tmp_path, 2, {"micro_batch_tokens": 12}, steps, exact=True)
