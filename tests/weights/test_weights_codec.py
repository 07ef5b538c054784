import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights_world import DTYPES, same_bits, weights

from rlorch.errors import ChainBrokenError, DigestMismatchError
from rlorch.types import Manifest, TensorEntry
from rlorch.weights import planes
from rlorch.weights.codec import apply_update, decode_update, digest, encode_update, iter_update
from rlorch.weights.manifest import state_digest
from rlorch.weights.update import check_state

NAMES = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}


def encode(old: dict[str, Any] | None, new: dict[str, Any], dtypes: dict[str, str] | None = None) -> Any:
    return encode_update(
        version=2,
        kind="anchor" if old is None else "delta",
        base_version=None if old is None else 1,
        base=old,
        new=new,
        dtypes=dtypes or {name: NAMES[bits.itemsize] for name, bits in new.items()},
    )


def coding_of(old: Any, new: Any) -> str:
    return encode({"w": old}, {"w": new})[0].tensors[0].coding


@st.composite
def tensor_pairs(draw: Any) -> tuple[Any, Any]:
    """(old, new) bit views of one tensor: any width, shape, density and kind of change."""
    width = draw(st.sampled_from([1, 2, 4, 8]))
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    limit = 1 << (8 * width)
    palette = draw(st.sampled_from(["random", "zeros", "specials"]))
    special = np.array([0, 1 << (8 * width - 1), limit - 1, 0x7F % limit], dtype=np.uint64)  # 0, -0, NaN, ...
    old = {
        "random": rng.integers(0, limit, shape, dtype=np.uint64) if width == 8 else rng.integers(0, limit, shape),
        "zeros": np.zeros(shape),
        "specials": rng.choice(special, shape),
    }[palette].astype(planes.UNSIGNED[width])
    density = draw(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]))
    change = rng.integers(0, 1 << min(8 * width, draw(st.sampled_from([1, 4, 32]))), shape)
    flips = np.where(rng.random(shape) < density, change, 0).astype(old.dtype)
    return old, np.asarray(old ^ flips)


@settings(max_examples=150, deadline=None)
@given(st.lists(tensor_pairs(), min_size=1, max_size=4), st.booleans())
def test_decoding_and_applying_gives_back_every_bit(pairs: list[tuple[Any, Any]], anchor: bool) -> None:
    old = {f"t{i}": pair[0] for i, pair in enumerate(pairs)}
    new = {f"t{i}": pair[1] for i, pair in enumerate(pairs)}
    before = {name: bits.copy() for name, bits in old.items()}
    manifest, payload = encode(None if anchor else old, new)
    state = apply_update(None if anchor else old, decode_update(manifest, payload))
    assert same_bits(state, new)
    assert same_bits(old, before), "the base must not change"
    check_state(manifest, state)
    for entry in manifest.tensors:
        assert entry.digest == digest(new[entry.name].tobytes())
        if not anchor:
            assert entry.changed == np.count_nonzero(old[entry.name] != new[entry.name])
    assert manifest.full_bytes == sum(bits.nbytes for bits in new.values())


@pytest.mark.parametrize("gaps", [[65534], [65535], [65536], [0, 131069], [131070], [131071, 65535, 0, 3], [200_000]])
def test_gaps_around_the_escape_survive(gaps: list[int]) -> None:
    index_K = np.cumsum(np.array(gaps) + 1) - 1
    old = np.zeros(int(index_K[-1]) + 70_000, np.uint16)
    new = old.copy()
    new[index_K] = 0x8000
    manifest, payload = encode({"w": old}, {"w": new})
    (update,) = decode_update(manifest, payload)
    assert update.index_K is not None
    assert update.index_K.tolist() == index_K.tolist()
    assert update.index_K.dtype == np.int64


def test_indices_beyond_32_bits_survive_gap_coding() -> None:
    index_K = np.array([5, 2**32 + 7, 2**33 + 2**31], np.int64)
    gap_N = planes.indices_to_gaps(index_K)
    assert planes.gaps_to_indices(gap_N, 3, 2**33 + 2**31 + 1).tolist() == index_K.tolist()  # type: ignore[union-attr]
    assert planes.gaps_to_indices(gap_N, 3, 2**33 + 2**31) is None


def test_changing_nothing_a_little_a_lot_and_everything_picks_the_fitting_coding() -> None:
    rng = np.random.default_rng(0)
    old = rng.normal(0, 0.02, 200_000).astype(np.float32).view(np.uint32) >> 16
    old = old.astype(np.uint16)
    little, lot = old.copy(), old.copy()
    little[rng.choice(old.size, 1000)] ^= 1
    lot[rng.random(old.size) < 0.5] ^= 1
    other = rng.permutation(old)
    assert coding_of(old, old.copy()) == "same"
    assert coding_of(old, little) == "sparse"
    assert coding_of(old, lot) == "xor"
    assert coding_of(old, other) in ("full", "xor")
    assert coding_of(rng.integers(0, 1 << 16, old.size, dtype=np.uint16), np.zeros_like(old)) == "full"


def test_the_sparse_coding_beats_plain_index_and_value_by_a_wide_margin() -> None:
    rng = np.random.default_rng(0)
    old = (rng.normal(0, 0.02, 1_000_000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    new = old.copy()
    changed = rng.choice(old.size, 8000, replace=False)
    new[changed] ^= 1
    _, payload = encode({"w": old}, {"w": new})
    assert len(payload) < 0.3 * changed.size * (4 + 2)


@given(st.binary(max_size=100).filter(lambda b: len(b) % 4 == 0), st.sampled_from([1, 2, 4]))
def test_byte_planes_are_the_plain_transposition(raw: bytes, width: int) -> None:
    bits_P = np.frombuffer(raw, planes.UNSIGNED[width])
    reference = np.frombuffer(raw, np.uint8).reshape(-1, width).T.tobytes()
    assert b"".join(planes.to_planes(bits_P)) == reference
    assert planes.from_planes(memoryview(reference), width).tobytes() == raw


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, (1 << 16) + 3, (1 << 20) + 9])
def test_changed_indices_are_those_of_the_plain_comparison(size: int) -> None:
    rng = np.random.default_rng(size)
    old = rng.integers(0, 1 << 16, size, dtype=np.uint16)
    new = np.where(rng.random(size) < 0.1, old ^ 5, old).astype(np.uint16)
    assert planes.changed_indices(old, new).tolist() == np.flatnonzero(old != new).tolist()
    blocks = planes.from_planes(memoryview(b"".join(planes.to_planes(new))), 2)
    assert (blocks == new).all()


def test_equal_inputs_give_equal_bytes_and_the_state_digest_ignores_the_coding() -> None:
    first, second = encode(weights(0), weights(3), DTYPES), encode(weights(0), weights(3), DTYPES)
    assert first == second
    assert first[0].digest == encode(None, weights(3), DTYPES)[0].digest
    assert first[0].digest != encode(None, weights(4), DTYPES)[0].digest


def test_applying_a_delta_twice_gives_the_base_back() -> None:
    old, new = weights(0)["embed"], weights(3)["embed"]
    (update,) = decode_update(*encode({"w": old}, {"w": new}))
    back = apply_update({"w": new}, [dataclasses.replace(update, digest=digest(old))])
    assert same_bits(back, {"w": old})


@pytest.mark.parametrize(
    "new",
    [
        {"w": np.zeros((3, 2), np.uint16)},
        {"w": np.zeros((2, 3), np.uint32)},
        {"w": np.zeros((2, 3), np.uint16), "extra": np.zeros(1, np.uint16)},
        {},
    ],
    ids=["shape", "dtype", "added", "removed"],
)
def test_a_delta_between_different_layouts_asks_for_an_anchor(new: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="an anchor is needed"):
        encode({"w": np.zeros((2, 3), np.uint16)}, new)


def test_arrays_that_are_not_bit_views_are_refused() -> None:
    with pytest.raises(ValueError, match="must come as uint16"):
        encode(None, {"w": np.zeros(3, np.float32)}, {"w": "BF16"})
    with pytest.raises(ValueError, match="known"):
        encode(None, {"w": np.zeros(3, np.uint16)}, {"w": "BF17"})


def test_a_delta_on_the_wrong_base_is_noticed() -> None:
    manifest, payload = encode(weights(1), weights(2), DTYPES)
    updates = decode_update(manifest, payload)
    with pytest.raises(DigestMismatchError, match="re-seed"):
        apply_update(weights(0), updates)
    with pytest.raises(ChainBrokenError, match="nothing"):
        apply_update(None, updates)
    with pytest.raises(DigestMismatchError, match="embed"):
        check_state(manifest, weights(1))
    with pytest.raises(DigestMismatchError, match="missing"):
        check_state(manifest, {})


def test_large_tensors_come_in_frames_of_their_own_and_stream() -> None:
    rng = np.random.default_rng(0)
    new = {f"t{i}": rng.integers(0, 1 << 16, 1_500_000, dtype=np.uint16) for i in range(3)}
    manifest, payload = encode(None, new)
    assert struct.unpack_from("<I", payload, 4) == (2,)
    assert [update.name for update in iter_update(manifest, payload)] == ["t0", "t1", "t2"]
    assert same_bits(apply_update(None, decode_update(manifest, payload)), new)


# --- damage ---------------------------------------------------------------------------------------------------------


def resigned(manifest: Manifest, payload: bytes, tensors: tuple[TensorEntry, ...] | None = None) -> Manifest:
    """A manifest that vouches for damaged content, so that the decoder's own checks are on trial."""
    tensors = manifest.tensors if tensors is None else tensors
    return dataclasses.replace(
        manifest,
        payload_digest=digest(payload),
        payload_bytes=len(payload),
        tensors=tensors,
        digest=state_digest(tensors),
    )


def harmless(manifest: Manifest, payload: bytes, base: dict[str, Any]) -> None:
    """Decode and apply; the only errors allowed are those that make a replica re-seed."""
    try:
        apply_update(base, decode_update(manifest, payload))
    except (DigestMismatchError, ChainBrokenError):
        return


def test_a_damaged_payload_is_refused_before_it_is_decoded() -> None:
    manifest, payload = encode(weights(0), weights(1), DTYPES)
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 1
        with pytest.raises(DigestMismatchError, match="digest"):
            decode_update(manifest, bytes(damaged))
    with pytest.raises(DigestMismatchError):
        decode_update(manifest, payload[:-1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_that_carries_a_valid_digest_raises_nothing_but_weights_errors(data: Any) -> None:
    old, new = weights(0), weights(1)
    old["xored"], new["xored"] = weights(0, 1)["norm"], weights(0, 2)["norm"] & 0xFF
    manifest, payload = encode(old, new, {**DTYPES, "xored": "F32"})
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        action = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        position = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if action == "flip" and damaged:
            damaged[position] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del damaged[position : position + data.draw(st.integers(1, 40))]
        else:
            damaged[position:position] = data.draw(st.binary(max_size=20))
    harmless(resigned(manifest, bytes(damaged)), bytes(damaged), old)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_lying_manifest_raises_nothing_but_weights_errors(data: Any) -> None:
    old = weights(0)
    manifest, payload = encode(old if data.draw(st.booleans()) else None, weights(1), DTYPES)
    tensors = list(manifest.tensors)
    which = data.draw(st.integers(0, len(tensors) - 1))
    number = st.one_of(st.integers(0, 100), st.integers(0, 2**62))
    lies = {
        "shape": st.lists(number, max_size=3).map(tuple),
        "offset": number,
        "length": number,
        "changed": number,
        "coding": st.sampled_from(["same", "full", "xor", "sparse"]),
        "dtype": st.sampled_from(["BF16", "F32", "U8", "I64", "nonsense"]),
    }
    for key in data.draw(st.lists(st.sampled_from(sorted(lies)), min_size=1, max_size=4)):
        tensors[which] = dataclasses.replace(tensors[which], **{key: data.draw(lies[key])})
    harmless(resigned(manifest, payload, tuple(tensors)), payload, old)


@pytest.mark.parametrize("shape", [(0, 2**62, 4), (0, 2**63), (0,) * 70, (0, -1)])
def test_an_empty_tensor_of_an_impossible_shape_is_refused(shape: tuple[int, ...]) -> None:
    manifest, payload = encode(None, {"w": np.zeros(0, np.uint8)}, {"w": "U8"})
    with pytest.raises(DigestMismatchError, match="cannot take"):
        decode_update(resigned(manifest, payload, (dataclasses.replace(manifest.tensors[0], shape=shape),)), payload)


def test_a_tiny_payload_cannot_claim_a_huge_tensor() -> None:
    manifest, payload = encode(None, {"w": np.zeros(100, np.uint8)}, {"w": "U8"})
    huge = dataclasses.replace(manifest.tensors[0], shape=(2**50,), length=2**50)
    claim = bytearray(payload)
    struct.pack_into("<Q", claim, 16, 2**50)
    with pytest.raises(DigestMismatchError, match="cannot hold"):
        decode_update(resigned(manifest, bytes(claim), (huge,)), bytes(claim))
