"""The reference's summed log-probs of fixed rows, computed once and kept in the run directory.

    cache on disk, of these very rows and this model? -> use it, start nothing
    otherwise: start the reference -> score all rows -> write the cache -> release the reference

The reference's memory is thus free before the trainer starts, and a resumed run needs no reference at all.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from rlorch.errors import StorageError
from rlorch.ports import Runtime
from rlorch.types import Datum

log = logging.getLogger(__name__)

FILE = "reference.npz"
ROWS_PER_CALL = 128
"""A call of the reference is short enough to be stopped after, and long enough to fill its micro-batches."""


async def reference_sums(
    run_dir: Path, model: str, datums: Sequence[Datum], runtime: Runtime, stop: asyncio.Event
) -> NDArray[np.float64] | None:
    """The reference's log-probs of each row, weighted by the row's `weights` and summed: one float64 per row.

    Args:
        run_dir: holds the cache.
        model: the reference; part of what the cache is checked against.
        datums: rows with `target_tokens` and `weights`.
        runtime: starts the reference, if need be.
        stop: ends the computation between two calls.

    Returns:
        The sums, or None when `stop` came first.

    Raises:
        StorageError: the cache cannot be written.
    """
    path, digest = run_dir / FILE, await asyncio.to_thread(_digest, model, datums)
    if (cached := await asyncio.to_thread(_read, path, digest)) is not None:
        return cached
    reference = await runtime.reference()
    sums: list[float] = []
    for start in range(0, len(datums), ROWS_PER_CALL):
        if stop.is_set():
            return None
        rows = datums[start : start + ROWS_PER_CALL]
        for datum, logprobs_T in zip(rows, await reference.logprobs(rows), strict=True):
            sums.append(float(np.dot(logprobs_T.astype(np.float64), datum.loss_inputs["weights"])))
    await runtime.release("reference")
    found = np.asarray(sums)
    await asyncio.to_thread(_write, path, digest, found)
    log.info("reference log-probs of %d rows are in %s; the reference has ended", len(found), path)
    return found


def _digest(model: str, datums: Sequence[Datum]) -> str:
    """Of everything that the sums depend on."""
    state = xxhash.xxh3_128(model.encode())
    for datum in datums:
        for array in (datum.tokens_T, datum.loss_inputs["target_tokens"], datum.loss_inputs["weights"]):
            state.update(np.ascontiguousarray(array).tobytes() + b"|")
    return state.hexdigest()


def _read(path: Path, digest: str) -> NDArray[np.float64] | None:
    """The cached sums, or None where there are none, they are damaged, or they are of other rows."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["sums"] if str(stored["digest"]) == digest else None
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file; it can be computed again
        log.warning("%s cannot be read (%s: %s); computing it again", path, type(error).__name__, error)
        return None


def _write(path: Path, digest: str, sums: NDArray[np.float64]) -> None:
    partial = path.with_name(f".{path.name}.partial.npz")
    try:
        np.savez(partial, digest=np.asarray(digest), sums=sums)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}; make room, then --resume") from error
