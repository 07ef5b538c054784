"""Does the engine compute with the weights it holds? Digests cannot tell; changed log-probabilities can.

An engine may keep a second, packed copy of a matrix, or a stale tied head: reading its parameters back then shows the
new weights while it samples from the old ones. So each kind of parameter is changed through the same path as a real
delta (sparse XOR into live parameters), a fixed sequence is scored, and the change undone:

    changed weights must change the log-probabilities, restored weights must restore them bit for bit.

Runs with no request in flight, between two engine steps. One layer stands for all layers of its kind.

T tokens, K changed elements.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from rlorch.engine.live_weights import LiveWeights, bits_of, layer_kinds, values_of
from rlorch.errors import SelfTestError
from rlorch.types import Floats, Tokens

PROBE_TOKENS = 16
MAX_CHANGED = 1 << 16
"""Elements changed per probe: a few rows of a large matrix shift its output visibly and cost little."""
NO_EFFECT = ("k_proj.bias", "key.bias")
"""A bias on keys adds the same score to every key of a query; without rotary embeddings it changes nothing."""


def run_self_test(weights: LiveWeights, score: Callable[[Tokens], Floats], vocab_size: int) -> None:
    """Perturb, score and restore one tensor of each kind.

    Args:
        weights: the live weights, loaded.
        score: log-probabilities of a sequence under the live weights, T - 1 values.
        vocab_size: of the model; tensors with as many rows are probed in the rows of the probe's tokens.

    Raises:
        SelfTestError: a change had no effect, or could not be undone. The engine must not serve.
    """
    probe_T = (np.arange(1, PROBE_TOKENS + 1, dtype=np.int64) * 7919 % vocab_size).astype(np.int32)
    original = score(probe_T)
    if not np.isfinite(original).all():
        raise SelfTestError(f"version {weights.version} scores {original}: its weights are not finite")
    if not np.array_equal(score(probe_T), original):
        raise SelfTestError("the engine scores one sequence differently twice: nothing it computes can be checked")
    for name in layer_kinds(weights.names).values():
        index_K, xor_K = _perturbation(weights, name, probe_T, vocab_size)
        weights.perturb(name, index_K, xor_K)
        changed = score(probe_T)
        weights.perturb(name, index_K, xor_K)
        if np.array_equal(changed, original) and not name.endswith(NO_EFFECT):
            raise SelfTestError(
                f"changing {len(index_K)} elements of {name!r} in place left every log-probability as it was: "
                "the engine computes with another (packed or stale) copy of this tensor"
            )
        if not np.array_equal(score(probe_T), original):
            raise SelfTestError(f"after {name!r} was restored bit for bit, the log-probabilities were not")


def _perturbation(
    weights: LiveWeights, name: str, probe_T: Tokens, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.unsignedinteger]]:
    """Every second element (of the probe's rows, for embeddings) negated; zeros, say in a bias, become 1/2."""
    shape, dtype = weights.place(name)
    old = weights.read(name)
    if len(shape) == 2 and shape[0] == vocab_size:
        rows = np.unique(probe_T).astype(np.int64)
        index_K = (rows[:, None] * shape[1] + np.arange(0, shape[1], 2)).reshape(-1)
    else:
        index_K = np.arange(0, len(old), 2)
    index_K = index_K[:: -(-len(index_K) // MAX_CHANGED)]
    values_K = values_of(old[index_K], dtype)
    new_K = torch.where(values_K == 0, torch.full_like(values_K, 0.5), -values_K)
    return index_K, old[index_K] ^ bits_of(new_K)
