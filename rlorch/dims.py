"""Dimension letters for array names (`logprobs_BT`) and a check that they agree.

B  rows of a batch (datums)        T  tokens of one row
G  rollouts of one group           N  tokens of a packed micro-batch (all rows end to end)
V  vocabulary                      D  hidden width
P  elements of one parameter       K  changed elements of one parameter
"""

from collections.abc import Mapping
from typing import Any


def check(sizes: Mapping[str, int] | None = None, /, **arrays: Any) -> dict[str, int]:
    """Check that arrays agree on the dimensions their names declare.

    Args:
        sizes: sizes known beforehand, by letter.
        arrays: arrays (anything with `.shape`) by name; the letters after the last `_` name the axes.

    Returns:
        The size of every letter seen.

    Raises:
        ValueError: an array has another rank or size than its name says.
    """
    known = dict(sizes or {})
    for name, array in arrays.items():
        letters = name.rsplit("_", 1)[-1]
        shape = tuple(array.shape)
        if len(shape) != len(letters):
            raise ValueError(f"{name} has shape {shape}, but its name says {len(letters)} axes ({letters})")
        for letter, size in zip(letters, shape, strict=True):
            if known.setdefault(letter, size) != size:
                raise ValueError(f"{name}: axis {letter} is {size}, elsewhere it is {known[letter]}")
    return known
