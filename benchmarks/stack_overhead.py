"""What everything above the engine costs: tokens per second through the whole stack against vLLM called directly.

    python -m benchmarks.stack_overhead [--rounds 2] [--concurrency 64 256]

The stack is an ordinary RL run: coordinator and ledger, pool with a fixed window, Ray, the sampler actor, rewards in
their own process, journal, batches, metrics, and a weight sync per step, but with a trainer that takes no time and
publishes the same weights again. So sampling is the only work, and what is measured is how fast it can be fed.

Direct is a process that owns a vLLM engine and keeps it full from a loop: once with the settings of rlorch's sampler,
once as vLLM comes. Same model in bf16, same prompts, same group size, same number of sequences in flight, one engine
thread each. Rounds alternate; engine start and warm-up are not counted. The ratio is the stack's tokens per second over
the direct one's: 1.00 would be no overhead.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Report,
    RunOne,
    finish,
    machine,
    parser,
    ratio,
    rl_run_config,
    spread,
    task_rows,
    warm_model,
    with_kept_roles,
)
from rlorch.ports import Trainer
from rlorch.recipes.rl import RLConfig
from rlorch.specs import WeightsSpec
from rlorch.types import AdamParams, Datum, ForwardResult, LossSpec, Manifest, Normalization, StepResult
from rlorch.weights.codec import decode_update, encode_update
from rlorch.weights.store import FileWeightStore
from rlorch.weights.update import apply_update

WEIGHTS = WeightsSpec(anchor_every=1000, max_chain_fraction=1000)
SKIP = 8  # steps until slots and window are full
DIRECT = ("rlorch's settings", "as vLLM comes")


class IdleTrainer:
    """The Trainer port over another one: steps take no time, and every version has the weights of version 0."""

    def __init__(self, trainer: Trainer, store: FileWeightStore) -> None:
        self._trainer = trainer
        self._store = store
        self._version = 0
        self._bits: Mapping[str, Any] = {}
        self._dtypes: Mapping[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    async def forward_backward(self, datums: Sequence[Datum], loss: LossSpec) -> ForwardResult:
        """Nothing is computed."""
        zeros = tuple(datum.loss_inputs["logprobs"] * 0 for datum in datums)
        return ForwardResult(zeros, {"loss:sum": 0.0, "num_loss_tokens:sum": 1.0})

    async def optim_step(self, adam: AdamParams, normalization: Normalization) -> StepResult:
        """The version, and nothing else, goes on."""
        self._version += 1
        return StepResult(self._version, {})

    async def export(self, kind: str) -> Manifest:
        """Version 0 as it is; later ones as deltas without a change."""
        if self._version == 0:
            manifest = await self._trainer.export(kind)
            updates = decode_update(manifest, await self._store.get(manifest.payload))
            self._bits = apply_update(None, updates)
            self._dtypes = {entry.name: entry.dtype for entry in manifest.tensors}
            return manifest
        manifest, payload = encode_update(
            version=self._version,
            kind="delta",
            base_version=self._version - 1,
            base=self._bits,
            new=self._bits,
            dtypes=self._dtypes,
        )
        await self._store.put(manifest.payload, payload)
        return manifest

    async def published(self, version: int) -> None:
        """See `Trainer.published`."""
        if version == 0:
            await self._trainer.published(version)


class Direct:
    """A `direct_engine` process."""

    def __init__(self, work: Mapping[str, Any], log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.direct_engine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("wb"),
            env=environment,
            text=True,
            bufsize=1,
        )
        self._log = log
        self._ask(json.dumps(work))

    def tokens_per_s(self, concurrency: int) -> float:
        """One measurement."""
        return self._ask(str(concurrency))["tokens_per_s"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, line: str) -> dict[str, float]:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(line + "\n")
        requests.flush()
        if not (answer := answers.readline()):
            raise SystemExit(f"the direct engine failed, see {self._log}")
        return json.loads(answer)


def direct_work(config: RLConfig, workdir: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a `direct_engine` process is told."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model)
    rows = [json.loads(line) for line in task_rows(workdir).train.read_text().splitlines()]
    return {
        "model": config.model,
        "prompts": [tokenizer.encode(row["question"] + config.render.suffix) for row in rows],
        "group_size": config.rollout.group_size,
        "max_tokens": config.rollout.max_tokens,
        "max_model_len": config.sampler.max_model_len,
        "max_num_seqs": config.sampler.max_num_seqs,
        "kv_cache_gib": config.sampler.cpu_kv_cache_gib,
        "gpu_memory_fraction": config.sampler.gpu_memory_fraction,
        "eos": tokenizer.eos_token_id,
        "seconds": options.seconds,
        "warm_up_s": 1.5,
    }


async def stack_tokens_per_s(run: RunOne, workdir: Path, concurrency: int, steps: int) -> float:
    """One run of `steps` counted steps, its window fixed."""
    config = rl_run_config(workdir, workdir / "stack_overhead" / "run", steps=SKIP + steps, weights=WEIGHTS)
    window = {"strategy": "fixed", "initial_window": concurrency, "max_window": max(concurrency, 256)}
    rollout = config.rollout.model_copy(update={"max_staleness": 3})
    concurrency_spec = config.concurrency.model_copy(update=window)
    config = config.model_copy(update={"concurrency": concurrency_spec, "rollout": rollout})
    store = FileWeightStore(workdir / "stack_overhead" / "roles" / "weights", WEIGHTS)
    recorder = await run(config, lambda trainer: IdleTrainer(trainer, store))
    start_s, end_s = recorder.marks[SKIP].at_s, recorder.marks[-1].at_s
    return recorder.tokens_between(start_s, end_s) / (end_s - start_s)


async def measure_all(options: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Tokens per second by concurrency and side, rounds in turn."""
    workdir, folder = options.workdir, options.workdir / "stack_overhead"
    sampler = rl_run_config(workdir, folder / "run", steps=1).sampler.model_copy(update={"gpu_memory_fraction": 0.25})
    config = rl_run_config(workdir, folder / "run", steps=1, sampler=sampler)
    found = {c: {name: list[float]() for name in ("stack", *DIRECT)} for c in options.concurrency}
    folder.mkdir(parents=True, exist_ok=True)
    work = direct_work(config, workdir, options)
    engines = {
        name: Direct({**work, "plain": name == DIRECT[1]}, folder / f"direct-{number}.log")
        for number, name in enumerate(DIRECT)
    }

    async def rounds(run: RunOne) -> None:
        for _ in range(options.rounds):
            for concurrency, sides in found.items():
                for name, engine in engines.items():
                    sides[name].append(await asyncio.to_thread(engine.tokens_per_s, concurrency))
                sides["stack"].append(await stack_tokens_per_s(run, workdir, concurrency, options.steps))

    try:
        await with_kept_roles(workdir, "stack_overhead", rounds, weights=WEIGHTS, sampler=sampler)
    finally:
        for engine in engines.values():
            engine.close()
    return found


def make_report(
    found: Mapping[int, Mapping[str, list[float]]], settings: Mapping[str, Any], before: Mapping[str, Any]
) -> Report:
    """One row per concurrency."""
    rows: list[tuple[str, ...]] = []
    for concurrency, sides in found.items():
        stack = statistics.median(sides["stack"])
        rates = tuple(spread(sides[name], digits=4) for name in ("stack", *DIRECT))
        ratios = tuple(ratio(stack, statistics.median(sides[name])) for name in DIRECT)
        rows.append((str(concurrency), *rates, *ratios))
    return Report(
        name="stack_overhead",
        question="tokens/s of one engine through coordinator, pool, Ray, rewards and journal, and called directly",
        columns=(
            "sequences",
            "rlorch tok/s",
            f"vLLM direct, {DIRECT[0]}",
            f"vLLM direct, {DIRECT[1]}",
            "rlorch / first",
            "rlorch / second",
        ),
        rows=tuple(rows),
        notes=(
            "A model of 0.8M parameters and answers of at most 8 tokens: one engine step takes milliseconds, so this "
            "is the hardest case for what is around it. All sides share the machine; the direct loop uses one core.",
        ),
        settings=settings,
        machine=before,
        raw={str(key): dict(value) for key, value in found.items()},
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--concurrency", type=int, nargs="+", default=[64, 256], help="sequences in flight")
    arguments.add_argument("--steps", type=int, default=16, help="counted steps of 256 rollouts per run")
    arguments.add_argument("--seconds", type=float, default=4.0, help="of each direct measurement")
    options = arguments.parse_args()
    before = machine()
    warm_model(options.workdir)
    found = asyncio.run(measure_all(options))
    settings = {"rounds": options.rounds, "steps": options.steps, "direct seconds": options.seconds}
    finish(make_report(found, settings, before), options.json)


if __name__ == "__main__":
    main()
