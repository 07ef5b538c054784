"""Weights to bytes and back, bit for bit: the payload of an anchor or of a delta.

Pure: arrays in, bytes out. Tensors are *bit views*: unsigned integers of the element's width (uint16 for BF16) with
the tensor's shape, so NaN payloads and -0.0 are ordinary bits. Deltas are XOR with the base, hence exact and their
own undo. Little-endian throughout.

Per tensor, the coding that is smaller (TensorEntry.coding):

    same    no bit changed; no bytes
    sparse  K changed elements: N u16 gaps between changed flat indices, then the K XOR values. A gap of 65535 is an
            escape: it skips 65535 elements and has no value, so N >= K and indices have no width limit
    xor     XOR of all elements
    full    the elements themselves (all tensors of an anchor)

Each stream is stored as byte planes (all low bytes, then all high bytes): a flipped BF16 value is mostly one ulp
away, so the high plane is almost all zeros, and exponents of `full` are far from uniform (arXiv 2602.03839 and
others report 1-3% of values changed per step). Below 2% changed, sparse always won in measurement; above it the
codings are compared by the real compressed size of a sample from the middle of the tensor. A delta uses `full`
only where it beats `xor` by a fifth, because `full` has no undo.

`rlorch.weights.frames` packs the streams; TensorEntry.offset and length count raw bytes. Decoding trusts nothing:
payload digest first, then every length against coding, shape and changed count.

P elements of a tensor, K changed elements, N gaps, S elements of a sample.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlorch.errors import DigestMismatchError
from rlorch.types import Manifest, ManifestKind, TensorEntry
from rlorch.weights.frames import FrameWriter, compress, read_frames
from rlorch.weights.manifest import DTYPE_BYTES, digest, payload_key, state_digest, tensor_bytes
from rlorch.weights.planes import (
    UNSIGNED,
    Bits,
    changed_indices,
    from_planes,
    gaps_to_indices,
    indices_to_gaps,
    to_planes,
)
from rlorch.weights.update import TensorUpdate, apply_update

__all__ = ["TensorUpdate", "apply_update", "decode_update", "digest", "encode_update", "iter_update"]

Coding = Literal["same", "full", "xor", "sparse"]


@dataclass(frozen=True, slots=True, eq=False)
class TensorChange:
    """A tensor to encode: its bits and, in a delta, the increasing flat indices that changed with what to XOR there
    (what was there is the XOR of both)."""

    name: str
    dtype: str
    new: Bits
    index_K: NDArray[np.int64] | None = None
    xor_K: Bits | None = None


SURELY_SPARSE = 0.02
"""Changed fraction below which sparse is smaller than xor in every measurement (benchmarks/delta_codec.py)."""
SURELY_DENSE = 0.5
"""Changed fraction above which sparse cannot win: its gaps alone cost more than the zero bytes they save."""
FULL_MARGIN = 0.8
"""A delta takes `full` only below this share of the size of `xor`."""
SAMPLE_ELEMENTS = 1 << 16
_MAX_ELEMENTS = 1 << 59


# --- encode -----------------------------------------------------------------------------------------------


def encode_update(
    *,
    version: int,
    kind: ManifestKind,
    base_version: int | None,
    base: Mapping[str, Bits] | None,
    new: Mapping[str, Bits],
    dtypes: Mapping[str, str],
    zstd_level: int = 1,
) -> tuple[Manifest, bytes]:
    """Encode `new`, whole (an anchor) or against `base` (a delta).

    Args:
        version: the version of `new`.
        kind: "anchor" ignores `base` and `base_version`.
        base_version: the version of `base`.
        base: bit views of the last published tensors.
        new: bit views of the tensors, by name, in the order of the manifest.
        dtypes: dtype of each tensor, by safetensors or torch name (`rlorch.weights.manifest.DTYPE_BYTES`).
        zstd_level: 1 is fastest; more costs time for a few percent.

    Returns:
        The manifest and the payload to store under `manifest.payload`. Equal inputs give equal bytes.

    Raises:
        ValueError: `new` does not match `dtypes`, or (delta) has other tensors, shapes or widths than `base`: those
            changes need an anchor.
    """
    _check_inputs(kind, version, base_version, base, new, dtypes)

    def changes() -> Iterator[TensorChange]:
        for name, bits in new.items():
            old = None if kind == "anchor" or base is None else base[name]
            index_K, xor_K = (None, None) if old is None else changed_bits(old, bits)
            yield TensorChange(name, dtypes[name], bits, index_K, xor_K)

    return encode_changes(
        version=version, kind=kind, base_version=base_version, tensors=changes(), zstd_level=zstd_level
    )


def changed_bits(old: Bits, new: Bits) -> tuple[NDArray[np.int64], Bits]:
    """Flat indices where two bit views differ, increasing, and what to XOR there."""
    old_P, new_P = np.ascontiguousarray(old).reshape(-1), np.ascontiguousarray(new).reshape(-1)
    index_K = changed_indices(old_P, new_P)
    return index_K, old_P[index_K] ^ new_P[index_K]


def encode_changes(
    *, version: int, kind: ManifestKind, base_version: int | None, tensors: Iterable[TensorChange], zstd_level: int = 1
) -> tuple[Manifest, bytes]:
    """`encode_update` of tensors that come one at a time, with what changed in each. Equal tensors and changes give
    equal bytes."""
    writer = FrameWriter(zstd_level)
    entries: list[TensorEntry] = []
    full_bytes = 0
    for tensor in tensors:
        new_P = np.ascontiguousarray(tensor.new).reshape(-1)
        if tensor.index_K is None or tensor.xor_K is None:
            coding, streams, changed = "full", to_planes(new_P), new_P.size
        else:
            coding, streams = _encode_tensor(new_P, tensor.index_K, tensor.xor_K, zstd_level)
            changed = tensor.index_K.size
        offset, length = writer.add(streams)
        full_bytes += new_P.nbytes
        shape = tuple(tensor.new.shape)
        entries.append(TensorEntry(tensor.name, tensor.dtype, shape, digest(new_P), coding, offset, length, changed))
    payload = writer.payload()
    payload_digest = digest(payload)
    manifest = Manifest(
        version=version,
        kind=kind,
        base_version=None if kind == "anchor" else base_version,
        digest=state_digest(entries),
        payload=payload_key(version, kind, payload_digest),
        payload_digest=payload_digest,
        payload_bytes=len(payload),
        full_bytes=full_bytes,
        tensors=tuple(entries),
    )
    return manifest, payload


def _check_inputs(
    kind: ManifestKind,
    version: int,
    base_version: int | None,
    base: Mapping[str, Bits] | None,
    new: Mapping[str, Bits],
    dtypes: Mapping[str, str],
) -> None:
    for name, bits in new.items():
        width = DTYPE_BYTES.get(dtypes.get(name, ""))
        if width is None:
            raise ValueError(f"tensor {name!r} has dtype {dtypes.get(name)!r}; known: {[*DTYPE_BYTES]}")
        if bits.dtype != UNSIGNED[width]:
            raise ValueError(f"{name!r} ({dtypes[name]}) must come as {UNSIGNED[width].__name__}, not {bits.dtype}")
    if kind == "anchor":
        return
    if base is None or base_version is None:
        raise ValueError(f"a delta to version {version} needs a base and its version; encode an anchor instead")
    if base_version >= version:
        raise ValueError(f"a delta goes forward, not from version {base_version} to {version}")
    if base.keys() != new.keys():
        odd = sorted(base.keys() ^ new.keys())[:5]
        raise ValueError(f"tensors were added or removed since version {base_version} ({odd}): an anchor is needed")
    for name, bits in new.items():
        old = base[name]
        if old.shape != bits.shape or old.dtype != bits.dtype:
            raise ValueError(
                f"{name!r} was {old.dtype}{old.shape} in version {base_version} and is {bits.dtype}{bits.shape}: "
                "an anchor is needed"
            )


def _encode_tensor(new_P: Bits, index_K: NDArray[np.int64], xor_K: Bits, zstd_level: int) -> tuple[Coding, list[bytes]]:
    """The smallest coding of a tensor, and its streams."""
    if not index_K.size:
        return "same", []
    coding = _choose(new_P, index_K, xor_K, zstd_level)
    if coding == "sparse":
        return coding, _sparse_streams(index_K, xor_K)
    return coding, to_planes(new_P if coding == "full" else _dense(new_P.size, index_K, xor_K))


def _dense(elements: int, index_K: NDArray[np.int64], xor_K: Bits) -> Bits:
    """XOR of all elements."""
    xor_P = np.zeros(elements, xor_K.dtype)
    xor_P[index_K] = xor_K
    return xor_P


def _choose(new_P: Bits, index_K: NDArray[np.int64], xor_K: Bits, zstd_level: int) -> Coding:
    """Which coding is smallest, by the changed share and, where that is not decisive, by compressing a sample."""
    changed = index_K.size
    if changed < SURELY_SPARSE * new_P.size and new_P.size > SAMPLE_ELEMENTS:
        return "sparse"
    start = max(0, (new_P.size - SAMPLE_ELEMENTS) // 2)
    new_S = new_P[start : start + SAMPLE_ELEMENTS]
    inside = slice(*np.searchsorted(index_K, (start, start + new_S.size)))
    sampled_K = index_K[inside] - start
    xor_S = _dense(new_S.size, sampled_K, xor_K[inside])
    xor_size = len(compress(to_planes(xor_S), zstd_level))
    if changed <= SURELY_DENSE * new_P.size:
        sparse_size = len(compress(_sparse_streams(sampled_K, xor_K[inside]), zstd_level))
        return "sparse" if sparse_size <= xor_size else "xor"
    return "full" if len(compress(to_planes(new_S), zstd_level)) < FULL_MARGIN * xor_size else "xor"


def _sparse_streams(index_K: NDArray[np.int64], xor_K: Bits) -> list[bytes]:
    return to_planes(indices_to_gaps(index_K)) + to_planes(xor_K)


# --- decode -----------------------------------------------------------------------------------------------


def decode_update(manifest: Manifest, payload: bytes) -> list[TensorUpdate]:
    """All changed tensors of a payload, verified as far as possible without the base. See `iter_update`."""
    return list(iter_update(manifest, payload))


def iter_update(manifest: Manifest, payload: bytes) -> Iterator[TensorUpdate]:
    """Decode a payload tensor by tensor, with one frame in memory; unchanged tensors are left out.

    Raises:
        DigestMismatchError: the payload or its manifest is not what was published: digests, lengths or contents
            disagree. Tensors yielded before it must be discarded.
    """
    if len(payload) != manifest.payload_bytes or digest(payload) != manifest.payload_digest:
        raise _malformed(manifest, f"{len(payload)} bytes with digest {digest(payload)} came, "
                         f"not {manifest.payload_bytes} with {manifest.payload_digest}")  # fmt: skip
    if state_digest(manifest.tensors) != manifest.digest:
        raise _malformed(manifest, "its tensor entries do not have its digest")
    frames = read_frames(payload, partial(_malformed, manifest))
    raw, start, stop = memoryview(b""), 0, 0
    for entry in manifest.tensors:
        _check_entry(manifest, entry)
        if not entry.length:
            if entry.coding == "full":
                yield _decode_tensor(manifest, entry, memoryview(b""))
            continue
        if entry.offset == stop:
            raw = next(frames, memoryview(b""))
            start, stop = stop, stop + len(raw)
        if entry.offset < start or entry.offset + entry.length > stop:
            raise _malformed(manifest, f"tensor {entry.name!r} is not inside one frame")
        yield _decode_tensor(manifest, entry, raw[entry.offset - start : entry.offset - start + entry.length])
    if next(frames, None) is not None:
        raise _malformed(manifest, "it has frames that belong to no tensor")


def _malformed(manifest: Manifest, what: str) -> DigestMismatchError:
    return DigestMismatchError(
        f"payload {manifest.payload!r} of version {manifest.version}: {what}; fetch it again or re-seed from an anchor"
    )


def _check_entry(manifest: Manifest, entry: TensorEntry) -> None:
    """Lengths must follow from coding, shape and changed count, before anything is allocated for them."""
    elements, total = prod(entry.shape), tensor_bytes(entry)
    if entry.coding == "sparse":
        gap_bytes = entry.length - entry.changed * DTYPE_BYTES[entry.dtype]
        fits = 0 < entry.changed <= elements and gap_bytes % 2 == 0 and gap_bytes // 2 >= entry.changed
    elif entry.coding == "same":
        fits = entry.length == 0 == entry.changed
    else:
        fits = entry.length == total and 0 <= entry.changed <= elements
    if manifest.kind == "anchor" and entry.coding != "full":
        fits = False
    if len(entry.shape) > 64 or min(entry.shape, default=0) < 0 or prod(max(1, d) for d in entry.shape) > _MAX_ELEMENTS:
        fits = False  # no array can have this shape
    if not fits:
        raise _malformed(manifest, f"tensor {entry.name!r} ({entry.coding}, {entry.shape}, {entry.changed} changed) "
                         f"cannot take {entry.length} bytes")  # fmt: skip


def _decode_tensor(manifest: Manifest, entry: TensorEntry, raw: memoryview) -> TensorUpdate:
    width = DTYPE_BYTES[entry.dtype]
    if entry.coding == "sparse":
        num_gaps = (entry.length - entry.changed * width) // 2
        index_K = gaps_to_indices(from_planes(raw[: 2 * num_gaps], 2), entry.changed, prod(entry.shape))
        xor_K = from_planes(raw[2 * num_gaps :], width)
        if index_K is None or not xor_K.all():
            raise _malformed(manifest, f"tensor {entry.name!r} does not list {entry.changed} changed elements")
        return TensorUpdate(entry.name, entry.dtype, entry.shape, entry.digest, index_K=index_K, xor_K=xor_K)
    bits = from_planes(raw, width).reshape(entry.shape)
    if entry.coding == "xor":
        return TensorUpdate(entry.name, entry.dtype, entry.shape, entry.digest, xor_dense=bits)
    if digest(bits) != entry.digest:
        raise _malformed(manifest, f"tensor {entry.name!r} has digest {digest(bits)}, not {entry.digest}")
    return TensorUpdate(entry.name, entry.dtype, entry.shape, entry.digest, full=bits)
