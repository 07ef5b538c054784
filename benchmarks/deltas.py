"""Weight sync: bytes of a delta against all bytes, and what it costs, on the weights that real runs publish.

    python -m benchmarks.deltas [--steps 20] [--rates 2e-4 1e-6]

Two RL runs from the same warm model differ in the learning rate: the quickstart's, at which half of the bf16 values
change, and 1e-6, as used on large models. The trainer keeps float32 master weights; bf16 is served. One vLLM replica
follows each run while it samples.

* delta, full: bytes of each published delta, and of all weights in bf16.
* changed: share of values whose bits differ from the version before.
* codings: how many tensors were sent as sparse (u16 gaps and XOR), dense xor, full, or not at all (same).
* encode, decode: the codec alone, one thread, in a process of its own, on the run's own payloads; every decoded state
  is compared with the next one bit for bit.
* stage, pause: as the replica reports them: preparing a version beside running requests, and the time between two
  engine steps in which it stood still to apply and verify it.
"""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Report,
    RunOne,
    finish,
    machine,
    parser,
    rl_run_config,
    spread,
    warm_model,
    with_kept_roles,
)
from rlorch.specs import WeightsSpec
from rlorch.types import Manifest
from rlorch.weights.codec import decode_update, encode_update
from rlorch.weights.store import FileWeightStore
from rlorch.weights.update import apply_update

REPEATS = 3
WEIGHTS = WeightsSpec(anchor_every=1000, max_chain_fraction=1000)  # one anchor, then deltas only


@dataclass
class Measured:
    """One run; lists have one entry per delta, times in seconds."""

    full_bytes: int
    delta_bytes: list[int]
    changed: list[float]
    codings: dict[str, int]
    encode_s: list[float]
    decode_s: list[float]
    stage_s: list[float]
    pause_s: list[float]


def best(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of a few calls, and its result."""
    seconds, result = float("inf"), None
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = call()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


async def measure(run: RunOne, workdir: Path, rate: float, steps: int) -> Measured:
    """One RL run, then the codec on everything that it published."""
    config = rl_run_config(workdir, workdir / "deltas" / f"lr-{rate:g}", steps=steps, weights=WEIGHTS)
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
    recorder = await run(config.model_copy(update={"optimizer": optimizer}))
    store = FileWeightStore(workdir / "deltas" / "roles" / "weights", WEIGHTS)
    chain = await store.chain(steps)
    payloads = [await store.get(manifest.payload) for manifest in chain]
    sizes = codec(chain, payloads)
    commits = [commit for commit in recorder.commits if commit.version > 1]
    stage_s, pause_s = [commit.stage_s for commit in commits], [commit.pause_s for commit in commits]
    return Measured(**sizes, stage_s=stage_s, pause_s=pause_s)


def codec(chain: Sequence[Manifest], payloads: Sequence[bytes]) -> dict[str, Any]:
    """Sizes and codec times of an anchor's deltas."""
    state = apply_update(None, decode_update(chain[0], payloads[0]))
    dtypes = {entry.name: entry.dtype for entry in chain[0].tensors}
    elements, codings = sum(bits.size for bits in state.values()), Counter[str]()
    encode_s, decode_s = list[float](), list[float]()
    for manifest, payload in zip(chain[1:], payloads[1:], strict=True):
        seconds, updates = best(lambda m=manifest, p=payload: decode_update(m, p))
        decode_s.append(seconds)
        new = apply_update(state, updates)
        seconds, (again, bytes_again) = best(
            lambda m=manifest, base=state, new=new: encode_update(
                version=m.version, kind="delta", base_version=m.base_version, base=base, new=new, dtypes=dtypes
            )
        )
        encode_s.append(seconds)
        assert (again.digest, bytes_again) == (manifest.digest, payload), f"version {manifest.version}: other bytes"
        codings.update(entry.coding for entry in manifest.tensors)
        state = new
    return {
        "full_bytes": chain[0].full_bytes,
        "delta_bytes": [manifest.payload_bytes for manifest in chain[1:]],
        "changed": [manifest.changed / elements for manifest in chain[1:]],
        "codings": dict(codings),
        "encode_s": encode_s,
        "decode_s": decode_s,
    }


def make_report(runs: Mapping[float, Measured], settings: Mapping[str, Any], before: Mapping[str, Any]) -> Report:
    """One row per learning rate."""
    rows: list[tuple[str, ...]] = []
    for rate, run in runs.items():
        deltas = len(run.delta_bytes)
        codings = " + ".join(f"{count / deltas:.0f} {name}" for name, count in sorted(run.codings.items()))
        rows.append(
            (
                f"{rate:g}",
                str(deltas),
                spread([100 * share for share in run.changed], "%"),
                f"{run.full_bytes / 1e3:.0f} kB",
                spread([size / 1e3 for size in run.delta_bytes], "kB"),
                f"{run.full_bytes / statistics.median(run.delta_bytes):.1f}x",
                codings,
                spread([1e3 * s for s in run.encode_s], "ms"),
                spread([1e3 * s for s in run.decode_s], "ms"),
                spread([1e3 * s for s in run.stage_s], "ms"),
                f"{1e3 * statistics.median(run.pause_s):.2f} / {1e3 * max(run.pause_s):.2f} ms",
            )
        )
    return Report(
        name="deltas",
        question="bytes of a weight sync against all bytes, and how long sampling stands still for it",
        columns=(
            "learning rate",
            "deltas",
            "changed",
            "full",
            "delta",
            "full / delta",
            "tensors by coding",
            "encode",
            "decode",
            "stage",
            "pause p50 / max",
        ),
        rows=tuple(rows),
        notes=(
            "Median (min-max) over the syncs of one run. Pauses are a vLLM replica's own, with requests in flight; "
            "every tenth commit digests all live tensors.",
        ),
        settings=settings,
        machine=before,
        raw={f"{rate:g}": asdict(run) for rate, run in runs.items()},
    )


async def measure_all(options: argparse.Namespace) -> dict[float, Measured]:
    """The runs, one after the other on the same roles."""

    async def work(run: RunOne) -> dict[float, Measured]:
        return {rate: await measure(run, options.workdir, rate, options.steps) for rate in options.rates}

    return await with_kept_roles(options.workdir, "deltas", work, weights=WEIGHTS)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=20, help="versions per run")
    arguments.add_argument("--rates", type=float, nargs="+", default=[2e-4, 1e-6], help="learning rates")
    options = arguments.parse_args()
    before = machine()
    warm_model(options.workdir)
    runs = asyncio.run(measure_all(options))
    finish(make_report(runs, {"steps": options.steps, "served": "bf16"}, before), options.json)


if __name__ == "__main__":
    main()
