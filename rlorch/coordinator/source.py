"""Which prompt comes next: pure arithmetic from an ordinal to a dataset row, and the set of ordinals still to draw.

An ordinal is the position of a draw in the endless (or `epochs`-long) stream of rows. `PromptSource` maps it to
(epoch, row): each epoch is one permutation of all rows, a function of (seed, epoch) alone. So a resumed run needs no
iterator state, only the ordinals that are resolved: trained, dropped or finished. `Cursor` draws the others, oldest
first, so that a prompt whose rollouts died with the driver is sampled again and none is skipped (keyed by identity, not
by position: skipping by count is how other frameworks lose the long rollouts).

Invariant of the cursor: an ordinal is drawn at most once and never after it was resolved.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rlorch.errors import InvariantError


class PromptSource:
    """The stream of dataset rows.

    Args:
        num_rows: rows of the dataset.
        seed: of the shuffle, >= 0.
        shuffle: a new order each epoch; else the dataset's own order each epoch.
        epochs: passes over the dataset, None for no end.

    Raises:
        ValueError: no rows, a negative seed or fewer than one epoch.
    """

    def __init__(self, num_rows: int, *, seed: int = 0, shuffle: bool = True, epochs: int | None = None) -> None:
        if num_rows < 1:
            raise ValueError(f"a prompt source needs at least one row, not {num_rows}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be 1 or more, or None for no end, not {epochs}")
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._epochs = epochs
        self._epoch = -1
        self._order: NDArray[np.intp] = np.empty(0, np.intp)  # of the epoch last asked for

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return self._num_rows

    @property
    def end(self) -> int | None:
        """The first ordinal that does not exist; None when the stream has no end."""
        return None if self._epochs is None else self._epochs * self._num_rows

    def locate(self, ordinal: int) -> tuple[int, int]:
        """(epoch, row index) of an ordinal: the same for the same arguments, on any machine and numpy version.

        Raises:
            ValueError: outside [0, end).
        """
        if ordinal < 0 or (self.end is not None and ordinal >= self.end):
            raise ValueError(f"ordinal {ordinal} is outside [0, {self.end}): {self._num_rows} rows x {self._epochs}")
        epoch, position = divmod(ordinal, self._num_rows)
        if not self._shuffle:
            return epoch, position
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._num_rows, self._seed, epoch)
        return epoch, int(self._order[position])


def permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """The order of an epoch: row indices, a permutation of range(num_rows).

    Sorts 64 random bits per row. numpy keeps the raw stream of a bit generator for ever, but not what
    `Generator.permutation` makes of it (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(bits, kind="stable")


class Cursor:
    """The ordinals that are resolved and the next one to draw.

    Memory is one contiguous prefix [0, frontier) plus the resolved ordinals beyond it: about as many as groups are
    alive, because a stalled prompt holds its slot.

    Args:
        resolved: what the journal says of an earlier life of this run.
        end: the source's end; None for no end.
    """

    def __init__(self, resolved: Iterable[int] = (), *, end: int | None = None) -> None:
        self._frontier = 0
        self._beyond = set(resolved)
        self._end = end
        self._next = 0
        if self._beyond and min(self._beyond) < 0:
            raise ValueError(f"ordinals start at 0, not {min(self._beyond)}")
        self._advance()

    @property
    def frontier(self) -> int:
        """Every ordinal below it is resolved."""
        return self._frontier

    @property
    def out_of_order(self) -> frozenset[int]:
        """Resolved ordinals at or above the frontier."""
        return frozenset(self._beyond)

    def __contains__(self, ordinal: int) -> bool:
        """Whether an ordinal is resolved."""
        return 0 <= ordinal < self._frontier or ordinal in self._beyond

    def draw(self) -> int | None:
        """The lowest ordinal neither resolved nor drawn; None when the source is exhausted."""
        ordinal = max(self._next, self._frontier)
        while ordinal in self._beyond:
            ordinal += 1
        self._next = ordinal
        if self._end is not None and ordinal >= self._end:
            return None
        self._next += 1
        return ordinal

    def resolve(self, ordinal: int) -> None:
        """A drawn ordinal was trained, dropped or finished. Idempotent.

        Raises:
            InvariantError: it was never drawn.
        """
        if ordinal in self:
            return
        if not 0 <= ordinal < self._next:
            raise InvariantError(f"ordinal {ordinal} is resolved but was never drawn; the next draw is {self._next}")
        self._beyond.add(ordinal)
        self._advance()

    def _advance(self) -> None:
        while self._frontier in self._beyond:
            self._beyond.remove(self._frontier)
            self._frontier += 1
