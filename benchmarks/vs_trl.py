"""rlorch against TRL's GRPOTrainer on the same work, on the CPU: seconds per step, and seconds to a held-out accuracy.

    python -m benchmarks.vs_trl [--rounds 2] [--steps 40] [--target 0.8] [--peer .venv-trl/bin/python]

The same: model directory, prompts in the same order, prompts per step, samples per prompt, token limit, reward, AdamW
settings, no KL, token-mean loss, held-out words and the code that scores them. Rounds interleave TRL on one thread,
TRL on two, rlorch. rlorch always runs one thread for the trainer and one for the engine, so its peer on two cores is
TRL with two threads; TRL with one thread shows what it does with half the machine.

Three comparisons:

* training step: `forward_backward` + `optim_step` of `TorchTrainer`, alone in a process, on batches that a run
  sampled, against TRL's step without its generation and rewards.
* whole step: publish to publish in a real run, sampling and rewards included, against TRL's whole step.
* time to target: wall time from the first request (first step) until a checkpoint with that accuracy exists. Both sides
  are scored by `held_out.py`, every `eval_every` steps, outside the timed part (rlorch: after the run, from its
  checkpoints, whose cost is in its time).
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import (
    SEED,
    Report,
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
from benchmarks.recording import Recorder
from rlorch.coordinator.source import PromptSource
from rlorch.recipes.rl import RLConfig

SKIP = 3
PEER = Path(".venv-trl/bin/python")
EVAL_SAMPLES = 2  # per held-out word: 1024 completions, standard error 1.3%
THREADS = (1, 2)


@dataclass
class Side:
    """Medians of each round's steps, and when the target was reached (None: not within the steps)."""

    train_step_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    generation_s: list[float] = field(default_factory=list)
    target_s: list[float | None] = field(default_factory=list)
    target_step: list[int | None] = field(default_factory=list)
    curves: list[list[Mapping[str, float]]] = field(default_factory=list)

    def reached(self, curve: list[Mapping[str, float]], target: float) -> None:
        """Note the first point of a curve at or above the target."""
        first = next((point for point in curve if point["accuracy"] >= target), None)
        self.curves.append(curve)
        self.target_s.append(first["clock_s"] if first else None)
        self.target_step.append(int(first["step"]) if first else None)


def peer_work(config: RLConfig, workdir: Path, options: Any) -> dict[str, Any]:
    """What the peer is told: everything that `config` says and both sides share."""
    rows, optimizer = task_rows(workdir), config.optimizer
    source = PromptSource(sum(1 for _ in rows.train.open()), seed=config.seed)
    return {
        "model": config.model,
        "rows": str(rows.train),
        "held_out": str(rows.held_out),
        "order": [source.locate(i)[1] for i in range(options.steps * config.rollout.groups_per_batch)],
        "output_dir": str(workdir / "vs_trl" / "trl"),
        "steps": options.steps,
        "min_steps": options.min_steps,
        "eval_every": options.eval_every,
        "eval_samples": EVAL_SAMPLES,
        "target": options.target,
        "groups_per_batch": config.rollout.groups_per_batch,
        "group_size": config.rollout.group_size,
        "max_tokens": config.rollout.max_tokens,
        "suffix": config.render.suffix,
        "eos": 1,
        "seed": SEED,
        "optimizer": optimizer.model_dump(exclude={"schedule"}) | {"warmup_steps": optimizer.schedule.warmup_steps},
    }


def run_peer(peer: Path, work: Mapping[str, Any], threads: int, folder: Path, side: Side) -> Mapping[str, str]:
    """One TRL run in its own environment; returns its versions."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "work.json"
    told.write_text(json.dumps({**work, "threads": threads}))
    script = Path(__file__).with_name("trl_peer.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / "trl.log").open("wb") as log:
        done = subprocess.run(
            [str(peer), str(script), str(told)], stdout=subprocess.PIPE, stderr=log, env=environment, check=False
        )
    if done.returncode:
        raise SystemExit(f"the peer failed, see {folder / 'trl.log'}")
    result = json.loads(done.stdout.decode().strip().splitlines()[-1])
    steps = result["steps"][SKIP:]
    side.step_s.append(statistics.median(step["step_s"] for step in steps))
    side.generation_s.append(statistics.median(step["generation_s"] for step in steps))
    side.train_step_s.append(
        statistics.median(step["step_s"] - step["generation_s"] - step["reward_s"] for step in steps)
    )
    side.reached(result["curve"], work["target"])
    return result["versions"]


def run_rlorch(config: RLConfig, work: Mapping[str, Any], workdir: Path, side: Side) -> None:
    """One rlorch run, and its curve from the checkpoints that it left."""
    recorder = asyncio.run(run_once(config, workdir))
    marks, run_dir = recorder.marks, Path(config.run_dir or "")
    steps_s = [after.at_s - before.at_s for before, after in pairwise(marks[SKIP:])]
    side.step_s.append(statistics.median(steps_s))
    published = {mark.version: mark.at_s - recorder.first_sample_s for mark in marks}
    curve = child("curve", work, str(run_dir))
    side.reached([{**point, "clock_s": published[int(point["step"])]} for point in curve], work["target"])


async def run_once(config: RLConfig, workdir: Path) -> Recorder:
    """One run with roles of its own: nothing of rlorch is left while the peer runs."""
    return await with_kept_roles(workdir, "vs_trl", lambda run: run(config))


def child(what: str, work: Mapping[str, Any], run_dir: str, threads: int = 2) -> Any:
    """Run one of `CHILDREN` in a process of its own, with torch's threads set from the start."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with Path(f"{work['output_dir']}-{what}.log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.vs_trl", "--child", what],
            input=json.dumps({**work, "run_dir": run_dir, "threads": threads, "order": []}).encode(),
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
    if done.returncode:
        raise SystemExit(f"scoring or timing rlorch failed, see {work['output_dir']}-{what}.log")
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def curve_of(work: Mapping[str, Any]) -> list[dict[str, float]]:
    """Accuracy of a run's checkpoints in order, up to the first that reaches the target."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.held_out import sampled_accuracy
    from rlorch.engine.files import read_tensors

    torch.set_num_threads(work["threads"])
    rows = [json.loads(line) for line in Path(work["held_out"]).read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    tokenizer, curve = AutoTokenizer.from_pretrained(work["model"]), []
    folders = {int(path.name.split("-")[1]): path for path in (Path(work["run_dir"]) / "checkpoints").glob("step-*")}
    for step, folder in sorted(folders.items()):
        missing, unexpected = model.load_state_dict(dict(read_tensors(folder, "weights")), strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        accuracy = sampled_accuracy(
            model, tokenizer, rows, suffix=work["suffix"], max_tokens=work["max_tokens"],
            samples=work["eval_samples"], seed=step,
        )  # fmt: skip
        curve.append({"step": step, "accuracy": accuracy})
        if accuracy >= work["target"]:
            break
    return curve


def train_step_of(work: Mapping[str, Any]) -> list[float]:
    """Seconds of each training step over the batches that a run sampled, in order."""
    from rlorch.coordinator.algorithm import Algorithm
    from rlorch.engine.trainer import TorchTrainer
    from rlorch.journal.recovery import read_state

    config = RLConfig.model_validate(work["config"])
    trainer = TorchTrainer(config.model, config.trainer.model_copy(update={"threads": work["threads"]}), config.weights)
    algorithm = Algorithm(config.algorithm, max_tokens=config.rollout.max_tokens, seed=config.seed)
    seconds: list[float] = []
    for batch in read_state(Path(work["run_dir"]) / "journal.sqlite").batches[:16]:
        start = time.perf_counter()
        trainer.forward_backward(algorithm.datums(batch), algorithm.loss())
        trainer.optim_step(config.optimizer.adam(batch.step, config.steps), algorithm.normalization)
        seconds.append(time.perf_counter() - start)
    return seconds


CHILDREN = {"curve": curve_of, "train_step": train_step_of}


def seconds_to(values: list[float | None]) -> str:
    """Median and range, or how often it was not reached."""
    found = [value for value in values if value is not None]
    missing = f" ({len(values) - len(found)} of {len(values)} not reached)" if len(found) < len(values) else ""
    return spread(found, "s") + missing


def make_report(
    rlorch: Side, micro: Mapping[int, Side], peers: Mapping[int, Side], settings: Mapping[str, Any], before: Any
) -> Report:
    """Rows: what is compared, rlorch, the peer, the ratio of the medians (above 1: rlorch is faster)."""
    rows: list[tuple[str, ...]] = []

    def compare(what: str, ours: list[float], theirs: list[float], shown: tuple[str, str] | None = None) -> None:
        found = (statistics.median(theirs), statistics.median(ours)) if ours and theirs else (0.0, 0.0)
        texts = shown or (spread(ours, "s"), spread(theirs, "s"))
        rows.append((what, *texts, ratio(*found)))

    for threads, side in peers.items():
        what = f"training step, {threads} thread{'s' * (threads > 1)} each"
        compare(what, micro[threads].train_step_s, side.train_step_s)
    for threads, side in peers.items():
        compare(f"whole step, TRL on {threads}", rlorch.step_s, side.step_s)
    for threads, side in peers.items():
        times = [[value for value in found.target_s if value is not None] for found in (rlorch, side)]
        what = f"to {settings['target']} held out, TRL on {threads}"
        compare(what, times[0], times[1], (seconds_to(rlorch.target_s), seconds_to(side.target_s)))
    generation = ", ".join(f"{spread(side.generation_s, 's')} on {threads}" for threads, side in peers.items())
    return Report(
        name="vs_trl",
        question="rlorch (one trainer thread + one engine thread) against TRL's GRPOTrainer, same work, CPU",
        columns=("what", "rlorch", "TRL", "TRL / rlorch"),
        rows=tuple(rows),
        notes=(
            f"Target reached at step: rlorch {rlorch.target_step}; "
            + ", ".join(f"TRL on {threads} {side.target_step}" for threads, side in peers.items())
            + f". TRL's generation takes {generation} per step.",
            "Differences that remain: TRL generates with transformers' `generate` (no vLLM on this path), waits for "
            "it, and samples with its float32 weights; rlorch samples with vLLM in bf16, one step off-policy, and "
            "corrects by token-level truncated importance sampling (cap 2). Both average the loss over tokens. TRL's "
            "warm-up starts at learning rate 0, so it is one step behind for the first five. rlorch also journals each "
            "rollout, scores it in another process, and writes the checkpoints that are scored.",
            "All-equal groups are trained by both (they add nothing to the gradient); rlorch's default resamples them.",
        ),
        settings=settings,
        machine=before,
        raw={
            "rlorch": asdict(rlorch),
            "train_step": {str(threads): side.train_step_s for threads, side in micro.items()},
            "trl": {str(threads): asdict(side) for threads, side in peers.items()},
        },
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=40, help="optimizer steps; TRL stops at the target")
    arguments.add_argument("--min-steps", type=int, default=12, help="TRL runs at least these")
    arguments.add_argument("--eval-every", type=int, default=4)
    arguments.add_argument("--target", type=float, default=0.8, help="held-out sampled accuracy")
    arguments.add_argument("--peer", type=Path, default=PEER, help="python of the peer's environment: make peer")
    arguments.add_argument("--child", choices=list(CHILDREN), help=SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](json.load(sys.stdin))))
        return
    if not options.peer.exists():
        raise SystemExit(f"{options.peer} does not exist: `make peer` builds it, or name another environment by --peer")
    before, workdir = machine(), options.workdir
    warm_model(workdir)
    folder = workdir / "vs_trl"
    rlorch, micro, peers = Side(), {t: Side() for t in THREADS}, {t: Side() for t in THREADS}
    versions: Mapping[str, str] = {}
    for _ in range(options.rounds):
        config = rl_run_config(workdir, folder / "rlorch", steps=options.steps)
        checkpoints = config.checkpoint.model_copy(update={"every": options.eval_every, "keep_last": 1000})
        config = config.model_copy(update={"checkpoint": checkpoints})
        work = {**peer_work(config, workdir, options), "config": config.model_dump(mode="json")}
        for threads in THREADS:
            versions = run_peer(options.peer, work, threads, folder, peers[threads])
        run_rlorch(config, work, workdir, rlorch)
        for threads in THREADS:
            steps_s = child("train_step", work, str(folder / "rlorch"), threads)
            micro[threads].train_step_s.append(statistics.median(steps_s[SKIP:]))
    settings = {
        "rounds": options.rounds,
        "steps": f"at most {options.steps}",
        "target": options.target,
        "peer": " ".join(f"{name} {found}" for name, found in versions.items()),
    }
    finish(make_report(rlorch, micro, peers, settings, before), options.json)


if __name__ == "__main__":
    main()
