import random
from typing import Any

import numpy as np
import pytest
from weights_world import DTYPES, SPEC, chain_of, manifest_of, same_bits, weights

from rlorch.errors import ChainBrokenError, StaleHeadError
from rlorch.types import Manifest
from rlorch.weights.chain import (
    chain_to,
    garbage,
    live_versions,
    merge,
    moves_head,
    needs_anchor,
    steps_from,
    validate_chain,
)
from rlorch.weights.codec import apply_update, decode_update, encode_update


def manifests(*steps: int) -> list[Manifest]:
    return [manifest for manifest, _ in chain_of(*steps)]


def test_an_anchor_with_linked_deltas_is_a_chain() -> None:
    validate_chain(manifests(0))
    validate_chain(manifests(0, 1, 2, 5))


@pytest.mark.parametrize(
    "chain",
    [[], manifests(0, 1)[1:], manifests(0, 1, 2)[::2], manifests(0) + manifests(1), manifests(0) * 2],
    ids=["empty", "no anchor", "gap", "two anchors", "repeated"],
)
def test_anything_else_is_a_broken_chain(chain: list[Manifest]) -> None:
    with pytest.raises(ChainBrokenError):
        validate_chain(chain)


def test_a_delta_with_other_tensors_than_its_anchor_breaks_the_chain() -> None:
    old, new = {"w": np.zeros(3, np.uint16)}, {"w": np.ones(3, np.uint16)}
    stranger, _ = encode_update(version=1, kind="delta", base_version=0, base=old, new=new, dtypes={"w": "BF16"})
    with pytest.raises(ChainBrokenError, match="other tensors"):
        validate_chain([*manifests(0), stranger])


def test_the_chain_of_a_version_starts_at_its_own_anchor() -> None:
    published = manifests(0, 1, 2) + manifests(3, 4, 5)
    assert [m.version for m in chain_to(published, 5)] == [3, 4, 5]
    assert [m.version for m in chain_to(published, 2)] == [0, 1, 2]
    with pytest.raises(ChainBrokenError, match="version 3, needed to build version 5"):
        chain_to([m for m in published if m.version != 3], 5)


def test_a_replica_steps_from_what_it_holds_or_from_the_anchor() -> None:
    chain = manifests(3, 4, 5, 6)
    assert [m.version for m in steps_from(chain[1], chain)] == [5, 6]
    assert steps_from(chain[3], chain) == ()
    assert [m.version for m in steps_from(manifests(2)[0], chain)] == [3, 4, 5, 6]
    assert [m.version for m in steps_from(None, chain)] == [3, 4, 5, 6]
    same_number_other_bits, _ = manifest_of(4, seed=9)
    assert [m.version for m in steps_from(same_number_other_bits, chain)] == [3, 4, 5, 6]


def test_an_anchor_is_due_at_the_start_after_n_versions_and_when_deltas_outgrow_it() -> None:
    assert needs_anchor([], SPEC)
    assert not needs_anchor(manifests(0, 1, 2), SPEC)
    assert needs_anchor(manifests(0, 1, 2, 3), SPEC)
    chain = manifests(0, 1, 2)
    share = (chain[1].payload_bytes + chain[2].payload_bytes) / chain[0].payload_bytes
    assert needs_anchor(chain, SPEC.model_copy(update={"max_chain_fraction": share * 0.99}))
    assert not needs_anchor(chain, SPEC.model_copy(update={"max_chain_fraction": share}))


def test_the_head_moves_once_forward_and_only_from_where_the_caller_saw_it() -> None:
    live = manifests(0, 1)
    assert moves_head([], None, live[0])
    assert moves_head(live, 1, manifest_of(2, 1)[0])
    assert moves_head(live, 1, manifest_of(7)[0])
    assert not moves_head(live, 0, live[1]), "a repeated call is fine"
    assert not moves_head(live, 0, manifest_of(1)[0]), "and so are the same weights as an anchor"
    for expected, new in [(0, manifest_of(2, 0)[0]), (None, live[0]), (1, live[0]), (1, manifest_of(1, seed=1)[0])]:
        with pytest.raises(StaleHeadError, match="head is version 1"):
            moves_head(live, expected, new)
    with pytest.raises(ChainBrokenError, match="does not follow the head"):
        moves_head(live, 1, manifest_of(2, 0)[0])


def test_a_rewind_forgets_later_versions_until_they_are_published_again() -> None:
    v0, v1, v2 = manifests(0, 1, 2)
    assert live_versions([v0, v1, v2]) == [v0, v1, v2]
    assert live_versions([v0, v1, v2, v1]) == [v0, v1]
    assert live_versions([v0, v1, v2, v1, v2]) == [v0, v1, v2]
    assert live_versions([v0, v1, None]) == []
    assert live_versions([v0, v1, None, v1]) == [v1]


@pytest.mark.parametrize("seed", range(20))
def test_garbage_never_takes_a_parent_of_a_kept_version(seed: int) -> None:
    rng = random.Random(seed)
    live, version = manifests(0), 0
    for _ in range(25):
        base, version = version, version + rng.randint(1, 3)
        live.append(manifest_of(version, None if rng.random() < 0.3 else base)[0])
    keep = rng.randint(1, 3)
    dead = {manifest.version for manifest in garbage(live, keep)}
    kept = [manifest for manifest in live if manifest.version not in dead]
    assert kept[-1] is live[-1]
    for manifest in kept:
        validate_chain(chain_to(kept, manifest.version))
    anchors = sum(manifest.kind == "anchor" for manifest in live)
    assert sum(manifest.kind == "anchor" for manifest in kept) == min(keep, anchors)


def state_of(rng: np.random.Generator, old: dict[str, Any]) -> dict[str, Any]:
    """A next state whose changes are dense for some tensors, sparse for others, and sometimes undone."""
    new = {name: bits.copy() for name, bits in old.items()}
    for bits in new.values():
        if bits.size and rng.random() < 0.8:
            few = rng.choice(bits.size, rng.integers(1, bits.size + 1), replace=False)
            bits.reshape(-1)[few] ^= bits.dtype.type(rng.choice([1, 1, 3, 128]))
    return new


@pytest.mark.parametrize("seed", range(30))
def test_a_merged_update_equals_its_parts_one_after_another(seed: int) -> None:
    rng = np.random.default_rng(seed)
    states = [weights(0)]
    updates = []
    for version in range(1, 6):
        states.append(weights(0) if rng.random() < 0.2 else state_of(rng, states[-1]))
        anchor = rng.random() < 0.1
        manifest, payload = encode_update(
            version=version,
            kind="anchor" if anchor else "delta",
            base_version=version - 1,
            base=states[-2],
            new=states[-1],
            dtypes=DTYPES,
        )
        updates.append(decode_update(manifest, payload))
    cut = int(rng.integers(0, 5))
    merged = merge(merge(*updates[:cut]), *updates[cut:])
    assert same_bits(apply_update(states[0], merged), states[-1])
    for update in merged:
        if update.index_K is not None:
            assert (np.diff(update.index_K) > 0).all(), "one XOR per element, in order"


def test_merging_forth_and_back_leaves_nothing_to_do() -> None:
    forth = decode_update(*encode_update(version=1, kind="delta", base_version=0, base=weights(0), new=weights(1),
                                         dtypes=DTYPES))  # fmt: skip
    back = decode_update(*encode_update(version=2, kind="delta", base_version=1, base=weights(1), new=weights(0),
                                        dtypes=DTYPES))  # fmt: skip
    assert forth
    assert merge(forth, back) == []


def test_merging_different_shapes_is_a_broken_chain() -> None:
    def update(shape: tuple[int, ...]) -> Any:
        state = {"w": np.ones(shape, np.uint16)}
        return decode_update(*encode_update(version=0, kind="anchor", base_version=None, base=None, new=state,
                                            dtypes={"w": "BF16"}))  # fmt: skip

    with pytest.raises(ChainBrokenError, match="inside one chain"):
        merge(update((2, 3)), update((3, 2)))
