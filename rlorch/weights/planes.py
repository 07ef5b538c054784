"""Streams of bytes that compress well: byte planes and gap-coded indices. Pure numpy, little-endian.

A *plane* holds one byte of every element: a stream is all lowest bytes, then all next ones. Exponents and the high
bytes of one-ulp flips are then neighbours, which an entropy coder likes. Loops go over blocks that stay in cache and
use whole-array shifts; the transposing one-liner is ten times slower (tests hold both against each other).

P elements of a tensor, K changed elements, N gaps.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger[Any]]

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""The unsigned type of a bit view, by bytes per element."""
ESCAPE = 0xFFFF
"""The gap that skips 65535 elements and has no value."""
_BLOCK_ELEMENTS = 1 << 16
_SCAN_ELEMENTS = 1 << 20


def to_planes(bits_P: Bits) -> list[bytes]:
    """The byte planes of a 1-D array, that of the lowest bytes first."""
    if bits_P.itemsize == 1:
        return [bits_P.tobytes()]
    planes = np.empty((bits_P.itemsize, bits_P.size), np.uint8)
    for start in range(0, bits_P.size, _BLOCK_ELEMENTS):
        block = bits_P[start : start + _BLOCK_ELEMENTS]
        for number, plane in enumerate(planes):
            np.right_shift(block, 8 * number, out=plane[start : start + block.size], casting="unsafe")
    return [plane.tobytes() for plane in planes]


def from_planes(raw: memoryview, width: int) -> Bits:
    """The inverse of `to_planes`, from joined planes, for elements of `width` bytes. Read-only for a width of 1."""
    planes = np.frombuffer(raw, np.uint8).reshape(width, len(raw) // width)
    if width == 1:
        return planes[0]
    bits_P = np.empty(planes.shape[1], UNSIGNED[width])
    for start in range(0, bits_P.size, _BLOCK_ELEMENTS):
        block = bits_P[start : start + _BLOCK_ELEMENTS]
        block[:] = planes[-1, start : start + block.size]
        for plane in planes[-2::-1]:
            block <<= 8
            block |= plane[start : start + block.size]
    return bits_P


def changed_indices(old_P: Bits, new_P: Bits) -> NDArray[np.int64]:
    """Flat indices where two contiguous 1-D bit views differ, increasing.

    Compares eight bytes at a time and looks inside only the words that differ, a cache-sized block at a time.
    """
    per_word = 8 // old_P.itemsize
    whole = old_P.size - old_P.size % per_word
    found: list[NDArray[np.int64]] = []
    for start in range(0, whole, _SCAN_ELEMENTS):
        old_W = old_P[start : min(start + _SCAN_ELEMENTS, whole)].view(np.uint64)
        new_W = new_P[start : min(start + _SCAN_ELEMENTS, whole)].view(np.uint64)
        word_H = np.flatnonzero(old_W != new_W)
        hit = np.flatnonzero((old_W[word_H] ^ new_W[word_H]).view(old_P.dtype))
        found.append(word_H[hit // per_word] * per_word + hit % per_word + start)
    found.append(np.flatnonzero(old_P[whole:] != new_P[whole:]) + whole)
    return np.concatenate(found)


def indices_to_gaps(index_K: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Gaps between increasing flat indices (the first counts from 0), with escapes; N >= K."""
    gap_K = np.diff(index_K, prepend=-1) - 1
    escapes_K = gap_K // ESCAPE
    num_escapes = int(escapes_K.sum())
    if not num_escapes:
        return gap_K.astype(np.uint16)
    gap_N = np.full(gap_K.size + num_escapes, ESCAPE, np.uint16)
    gap_N[np.cumsum(escapes_K + 1) - 1] = gap_K % ESCAPE
    return gap_N


def gaps_to_indices(gap_N: Bits, changed: int, elements: int) -> NDArray[np.int64] | None:
    """The inverse of `indices_to_gaps`; None unless it gives `changed` indices below `elements`."""
    is_value_N = gap_N != ESCAPE
    end_N = np.cumsum(gap_N + is_value_N.astype(np.int64), dtype=np.int64)
    if not gap_N.size or np.count_nonzero(is_value_N) != changed or not is_value_N[-1] or end_N[-1] > elements:
        return None
    return (end_N if gap_N.size == changed else end_N[is_value_N]) - 1
