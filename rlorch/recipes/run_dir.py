"""The run directory: where one run keeps everything that it takes to resume, replay, plot and explain it.

config.yaml      resolved                     metrics.jsonl  trace.json  summary.json  report.html
journal.sqlite   what was sampled and trained checkpoints/   weights/    logs/<role>.log
held_out.jsonl   the prompts of evaluations
"""

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from rlorch.config import check_resumable, config_digest, dump_config, load_config
from rlorch.errors import ResumeError, RlorchError, StorageError
from rlorch.journal.journal import LOCK_NAME
from rlorch.journal.lock import RunLock
from rlorch.journal.recovery import read_state
from rlorch.observe.logs import redact
from rlorch.observe.sinks import METRICS_FILE, Background, FanOut, JsonlSink, TensorBoardSink, WandbSink
from rlorch.ports import MetricSink, Trainer
from rlorch.recipes.sections import ObserveSpec
from rlorch.specs import Spec
from rlorch.types import Prompt
from rlorch.weights.manifest import digest

# What may differ between a run and its resumption: how long, how shown, how placed, not what is learned.
FREE_TO_CHANGE = frozenset(
    {
        "steps",
        "name",
        "run_dir",
        "runtime",
        "address",
        "observe",
        "checkpoint",
        "evaluation",
        "concurrency",
        "sampler",
        "weights",
        "trainer.device",
        "trainer.threads",
        "trainer.ranks",
        "trainer.collective_timeout_s",
        "rewards.workers",
        "rewards.timeout_s",
        "rewards.memory_mb",
        "rewards.start_timeout_s",
    }
)


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        """The SQLite journal."""
        return self.path / "journal.sqlite"

    @property
    def metrics(self) -> Path:
        """One JSON line of scalars per step."""
        return self.path / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, as a directory that transformers and vLLM load."""
        return self.path / "model"

    def keep_held_out(self, prompts: Sequence[Prompt]) -> str:
        """Write the exact prompts of every evaluation to held_out.jsonl; the file's xxh3-128. Raises `StorageError`."""
        lines = [{"text": p.text, "tokens": p.tokens_T.tolist(), "row": dict(p.row)} for p in prompts]
        content = b"".join(orjson.dumps(line) + b"\n" for line in lines)
        try:
            (self.path / "held_out.jsonl").write_bytes(content)
        except OSError as error:
            raise StorageError(f"{self.path}/held_out.jsonl cannot be written: {error}; make room") from error
        return digest(content)

    async def export(self, trainer: Trainer) -> None:
        """Write the model directory, in place of an earlier one once it is whole. Raises `StorageError`."""
        partial = self.path / "model.partial"
        await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        await trainer.save_pretrained(str(partial))
        await asyncio.to_thread(shutil.rmtree, self.model, ignore_errors=True)
        partial.rename(self.model)

    def sinks(self, spec: ObserveSpec, name: str, config: Spec) -> FanOut:
        """Where metrics go: metrics.jsonl always, TensorBoard and W&B when asked for. Raises `ConfigError`."""
        sinks: list[MetricSink] = [JsonlSink(self.metrics)]
        if spec.tensorboard:
            sinks.append(Background(TensorBoardSink(self.path / "tensorboard")))
        if spec.wandb:
            settings = redact(config.model_dump(mode="json"))
            wandb = WandbSink(self.path, project=spec.wandb_project, name=name, config=settings, mode=spec.wandb_mode)
            sinks.append(Background(wandb))
        return FanOut(sinks)


def check_run_dir(path: Path, config: Spec, *, resume: bool) -> RunDir:
    """The directory, if a run of this config may start or go on there. Changes nothing.

    A start that failed before anything was sampled or saved is no run: the next one may take its place.

    Raises:
        ResumeError: a new run where one is already, nothing to resume, or a config that changes what is learned.
    """
    run = RunDir(path)
    if resume:
        if not run.config.exists():
            raise ResumeError(f"{path} holds no run to resume (no config.yaml): start it without --resume")
        check_resumable(load_config(type(config), run.config), config, FREE_TO_CHANGE)
    elif run.config.exists() and not _failed_start(run):
        raise ResumeError(
            f"{path} already holds a run: continue it with --resume, or give the new one another run_dir or name"
        )
    return run


def open_run_dir(path: Path, config: Spec, *, resume: bool) -> RunDir:
    """Make the directory of a new run, or check that the config continues the run that is there.

    Raises:
        ResumeError: as `check_run_dir`; or another driver is at work there.
        StorageError: the directory cannot be written.
    """
    run = check_run_dir(path, config, resume=resume)
    partial = path / ".config.yaml.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not resume:
            _clear(run)
        partial.write_text(dump_config(config), encoding="utf-8")
        partial.replace(run.config)  # a kill leaves the old config or the new one
    except OSError as error:
        raise StorageError(f"run directory {path} cannot be written: {error}; set run_dir, or make room") from error
    return run


def _failed_start(run: RunDir) -> bool:
    """Whether a run was begun there, but nothing was sampled or saved."""
    if any(run.checkpoints.glob("[!.]*")) or not (run.journal.exists() or run.metrics.exists()):
        return False
    if not run.journal.exists():
        return run.metrics.stat().st_size == 0
    try:
        state = read_state(run.journal)
    except RlorchError:
        return False  # whatever it is, it is not to be deleted
    return not state.resolved and not state.last_events


def _clear(run: RunDir) -> None:
    """Take away what a failed start left, unless its driver lives."""
    RunLock(run.path / LOCK_NAME).release()
    for path in (*run.path.glob(f"{run.journal.name}*"), run.metrics):
        path.unlink(missing_ok=True)


def learned_digest(config: Spec) -> str:
    """Digest of everything that must not change over a run's life."""
    return config_digest(config, ignore=FREE_TO_CHANGE)
