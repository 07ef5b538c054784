"""Decisions about chains of versions: what follows what, when to anchor, what may go.

A chain is an anchor (all tensors) and the deltas after it, each against the version before. Published versions form a
log; the *live* versions are those that a rewind has not forgotten, oldest first, and the head is the last of them.

Invariants:
    versions grow along the live log, and each delta's base is the version right before it;
    a chain that `garbage` leaves is whole: no kept delta loses a parent;
    `merge(a, b)` applied to a state equals applying `a`, then `b`.

Pure: no I/O, no clock.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rlorch.errors import ChainBrokenError, StaleHeadError
from rlorch.specs import WeightsSpec
from rlorch.types import Manifest
from rlorch.weights.planes import Bits
from rlorch.weights.update import TensorUpdate


def describe(manifest: Manifest | None) -> str:
    """`version 7 (delta on 6)`, for messages."""
    if manifest is None:
        return "nothing"
    base = "" if manifest.base_version is None else f" on {manifest.base_version}"
    return f"version {manifest.version} ({manifest.kind}{base})"


# --- order ------------------------------------------------------------------------------------------------


def validate_chain(chain: Sequence[Manifest]) -> None:
    """Check that `chain` starts with an anchor and that each delta after it builds on the one before.

    Raises:
        ChainBrokenError: it is empty, does not start with an anchor, has a gap, or a tensor changes its shape.
    """
    if not chain or chain[0].kind != "anchor":
        raise ChainBrokenError(f"a chain starts with an anchor, not {describe(chain[0] if chain else None)}")
    layout = _layout(chain[0])
    for before, after in pairwise(chain):
        if after.kind != "delta" or after.base_version != before.version:
            raise ChainBrokenError(f"{describe(after)} cannot follow {describe(before)}: fetch the chain again")
        if _layout(after) != layout:
            raise ChainBrokenError(f"{describe(after)} has other tensors than {describe(chain[0])}: publish an anchor")


def chain_to(published: Iterable[Manifest], version: int) -> tuple[Manifest, ...]:
    """The anchor at or before `version` and the deltas up to it, in the order to apply.

    Raises:
        ChainBrokenError: one of them is not among `published`.
    """
    by_version = {manifest.version: manifest for manifest in published}
    links: list[Manifest] = []
    wanted: int | None = version
    while wanted is not None:
        link = by_version.get(wanted)
        if link is None:
            raise ChainBrokenError(
                f"version {wanted}, needed to build version {version}, is not in the store (it has "
                f"{sorted(by_version)[-5:]}): ask for the newest version"
            )
        links.append(link)
        wanted = link.base_version
    chain = tuple(reversed(links))
    validate_chain(chain)
    return chain


def steps_from(held: Manifest | None, chain: Sequence[Manifest]) -> tuple[Manifest, ...]:
    """What a replica that holds `held` still has to stage, in order, to reach the end of `chain`.

    The rest of the chain where `held` is part of it, else all of it from its anchor.
    """
    for position, link in enumerate(chain):
        if held is not None and link.version == held.version and link.digest == held.digest:
            return tuple(chain[position + 1 :])
    return tuple(chain)


def moves_head(live: Sequence[Manifest], expected: int | None, new: Manifest) -> bool:
    """Whether `new` may become the head; False when these very weights already are.

    Raises:
        StaleHeadError: the head is not `expected`, or `new` is not newer.
        ChainBrokenError: `new` is a delta against another version than the head.
    """
    head = live[-1] if live else None
    if head is not None and head.version == new.version and head.digest == new.digest:
        return False
    current = head.version if head else None
    if current != expected or (current is not None and new.version <= current):
        raise StaleHeadError(
            f"cannot publish {describe(new)} over version {expected}: the head is {describe(head)}. Another trainer "
            "publishes here, or this one went back to an older checkpoint: give it a store of its own or rewind"
        )
    if new.kind == "delta" and new.base_version != current:
        raise ChainBrokenError(f"{describe(new)} does not follow the head, {describe(head)}: publish an anchor")
    return True


def live_versions(log: Iterable[Manifest | None]) -> list[Manifest]:
    """The versions of a log, oldest first, that no later entry took back.

    An entry forgets every version at or after its own; None (a rewind to nothing) forgets all.
    """
    live: list[Manifest] = []
    for entry in log:
        while live and (entry is None or live[-1].version >= entry.version):
            live.pop()
        if entry is not None:
            live.append(entry)
    return live


# --- when to anchor, what to delete -----------------------------------------------------------------------


def needs_anchor(chain: Sequence[Manifest], spec: WeightsSpec) -> bool:
    """Whether the version after `chain` should be an anchor.

    Yes when there is no chain, when it has `anchor_every` versions, or when its deltas together are larger than
    `max_chain_fraction` of its anchor: a late joiner then fetches at most that much more than an anchor.
    """
    if not chain or len(chain) >= spec.anchor_every:
        return True
    delta_bytes = sum(manifest.payload_bytes for manifest in chain[1:])
    return delta_bytes > spec.max_chain_fraction * chain[0].payload_bytes


def garbage(live: Sequence[Manifest], keep_anchors: int) -> list[Manifest]:
    """The versions that may be deleted: older than the newest `keep_anchors` chains and needed by none of them."""
    anchors = [manifest for manifest in live if manifest.kind == "anchor"]
    if not anchors:
        return []
    # Also with few anchors: a collection that was cut short may have left deltas before the first of them.
    oldest_kept = anchors[-min(keep_anchors, len(anchors))].version
    needed: set[int] = set()
    for manifest in live:
        if manifest.version >= oldest_kept:
            needed.update(link.version for link in chain_to(live, manifest.version))
    return [manifest for manifest in live if manifest.version not in needed]


def unneeded(live: Sequence[Manifest], versions: Collection[int]) -> list[Manifest]:
    """What may be deleted when only `versions`, the head, and what those were made against must stay."""
    if not live:
        return []
    needed: set[int] = set()
    bases = {manifest.version: manifest.base_version for manifest in live}
    for version in (*versions, live[-1].version):
        link: int | None = version
        while link is not None and link not in needed:
            needed.add(link)
            link = bases.get(link)
    return [manifest for manifest in live if manifest.version not in needed]


# --- merging ----------------------------------------------------------------------------------------------


def merge(*updates: Sequence[TensorUpdate]) -> list[TensorUpdate]:
    """Consecutive updates, oldest first, as one: a late joiner touches each tensor once.

    A tensor that ends where it began is left out.

    Raises:
        ChainBrokenError: a tensor changes its dtype or shape between updates.
    """
    merged: dict[str, TensorUpdate] = {}
    for update in updates:
        for later in update:
            earlier = merged.get(later.name)
            merged[later.name] = later if earlier is None else _merge_tensor(earlier, later)
    return [update for update in merged.values() if not _is_empty(update)]


def _merge_tensor(earlier: TensorUpdate, later: TensorUpdate) -> TensorUpdate:
    if (earlier.dtype, earlier.shape) != (later.dtype, later.shape):
        raise ChainBrokenError(
            f"{later.name!r} goes from {earlier.dtype}{earlier.shape} to {later.dtype}{later.shape} inside one chain: "
            "re-seed from the newest anchor"
        )
    identity = (later.name, later.dtype, later.shape, later.digest)
    if later.full is not None:
        return later
    if earlier.full is not None:
        return TensorUpdate(*identity, full=_xored(earlier.full, later))
    if earlier.xor_dense is not None:
        return TensorUpdate(*identity, xor_dense=_xored(earlier.xor_dense, later))
    if later.xor_dense is not None:
        return TensorUpdate(*identity, xor_dense=_xored(later.xor_dense, earlier))
    (early_K, early_xor_K), (late_K, late_xor_K) = _changes(earlier), _changes(later)
    both_K = np.concatenate([early_K, late_K])
    order_K = np.argsort(both_K, kind="stable")
    index_K, starts_K = np.unique(both_K[order_K], return_index=True)
    xor_K = np.bitwise_xor.reduceat(np.concatenate([early_xor_K, late_xor_K])[order_K], starts_K)
    return TensorUpdate(*identity, index_K=index_K[xor_K != 0], xor_K=xor_K[xor_K != 0])


def _changes(update: TensorUpdate) -> tuple[NDArray[np.int64], Bits]:
    assert update.index_K is not None, f"{update.name}: an update without content"
    assert update.xor_K is not None, f"{update.name}: indices without values"
    return update.index_K, update.xor_K


def _xored(bits: Bits, change: TensorUpdate) -> Bits:
    """`bits` with an XOR update applied."""
    if change.xor_dense is not None:
        return np.asarray(bits ^ change.xor_dense)
    after = np.array(bits, order="C")
    index_K, xor_K = _changes(change)
    after.reshape(-1)[index_K] ^= xor_K
    return after


def _is_empty(update: TensorUpdate) -> bool:
    if update.full is not None:
        return False
    change = update.xor_dense if update.xor_dense is not None else update.xor_K
    return change is None or not change.any()


def _layout(manifest: Manifest) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    return {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}
