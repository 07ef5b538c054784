"""A decoded update, and the reference receiver that applies it.

Invariant: a state is only ever returned whole, with every touched tensor checked against its published digest. XOR
makes an update its own inverse: applying it twice gives the base back, which is how an engine undoes a bad commit.

P elements of a tensor, K changed elements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlorch.errors import ChainBrokenError, DigestMismatchError
from rlorch.types import Manifest
from rlorch.weights.manifest import DTYPE_BYTES, digest
from rlorch.weights.planes import Bits


@dataclass(frozen=True, slots=True, eq=False)
class TensorUpdate:
    """One changed tensor of an update: `full`, or `xor_dense`, or `index_K` with `xor_K`; the others are None.

    `digest` is that of the tensor after the update. Arrays are bit views of the tensor's width: `full` and
    `xor_dense` have its shape; `index_K` are flat int64 indices, increasing, and `xor_K` what to XOR there.
    Arrays may be read-only.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str
    full: Bits | None = None
    xor_dense: Bits | None = None
    index_K: NDArray[np.int64] | None = None
    xor_K: Bits | None = None


def apply_update(base: Mapping[str, Bits] | None, updates: Sequence[TensorUpdate]) -> dict[str, Bits]:
    """The slow, obvious receiver: the state after `updates`. Engines do the same in place, faster.

    `base` is not changed, and tensors that no update names are shared with it; None stands for no weights yet.

    Raises:
        ChainBrokenError: an update needs a tensor that `base` lacks or that has another shape or width.
        DigestMismatchError: a tensor is not what was published; the base was not the version it should be.
    """
    state = dict(base or {})
    for update in updates:
        after = _apply_tensor(state.get(update.name), update)
        if digest(after) != update.digest:
            raise DigestMismatchError(
                f"tensor {update.name!r} has digest {digest(after)} after the update, not {update.digest}: "
                "the weights held are not the delta's base; re-seed from the newest anchor"
            )
        state[update.name] = after
    return state


def check_state(manifest: Manifest, state: Mapping[str, Bits]) -> None:
    """Check that `state` is, tensor by tensor and bit by bit, what the manifest names.

    Raises:
        DigestMismatchError: a tensor is missing, extra or different.
    """
    if odd := sorted(state.keys() ^ {entry.name for entry in manifest.tensors}):
        raise DigestMismatchError(f"version {manifest.version}: missing or unknown tensors {odd[:5]}: re-seed")
    for entry in manifest.tensors:
        if digest(state[entry.name]) != entry.digest:
            raise DigestMismatchError(
                f"version {manifest.version}: tensor {entry.name!r} has digest {digest(state[entry.name])}, "
                f"not {entry.digest}: re-seed from the newest anchor"
            )


def _apply_tensor(old: Bits | None, update: TensorUpdate) -> Bits:
    if update.full is not None:
        return update.full.reshape(update.shape)
    if old is None or old.shape != update.shape or old.itemsize != DTYPE_BYTES[update.dtype]:
        held = "nothing" if old is None else f"{old.dtype}{old.shape}"
        raise ChainBrokenError(
            f"a delta of {update.name!r} ({update.dtype}{update.shape}) cannot apply to {held}: re-seed from an anchor"
        )
    if update.xor_dense is not None:
        return np.asarray(old ^ update.xor_dense)
    assert update.index_K is not None, f"{update.name}: an update without content"
    assert update.xor_K is not None, f"{update.name}: indices without values"
    after = np.array(old, order="C")
    flat_P = after.reshape(-1)
    flat_P[update.index_K] ^= update.xor_K
    return after
