"""The run directory: where one run keeps everything that it takes to resume, replay, plot and explain it.

config.yaml      resolved                     metrics.jsonl  trace.json  summary.json  report.html
journal.sqlite   what was sampled and trained checkpoints/   weights/    logs/<role>.log
"""

from dataclasses import dataclass
from pathlib import Path

from rlorch.config import check_resumable, config_digest, dump_config, load_config
from rlorch.errors import ResumeError
from rlorch.observe.logs import redact
from rlorch.observe.sinks import Background, FanOut, JsonlSink, TensorBoardSink, WandbSink
from rlorch.ports import MetricSink
from rlorch.recipes.sections import ObserveSpec
from rlorch.specs import Spec

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
    def checkpoints(self) -> Path:
        """Resumable checkpoints."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model, as a directory that transformers and vLLM load."""
        return self.path / "model"

    def sinks(self, spec: ObserveSpec, name: str, config: Spec) -> FanOut:
        """Where metrics go: metrics.jsonl always, TensorBoard and W&B when asked for. Raises `ConfigError`."""
        sinks: list[MetricSink] = [JsonlSink(self.path / "metrics.jsonl")]
        if spec.tensorboard:
            sinks.append(Background(TensorBoardSink(self.path / "tensorboard")))
        if spec.wandb:
            settings = redact(config.model_dump(mode="json"))
            sinks.append(Background(WandbSink(self.path, project=spec.wandb_project, name=name, config=settings)))
        return FanOut(sinks)


def open_run_dir(path: Path, config: Spec, *, resume: bool) -> RunDir:
    """Make the directory of a new run, or check that the config continues the run that is there.

    Raises:
        ResumeError: a new run where one is already, nothing to resume, or a config that changes what is learned.
    """
    run = RunDir(path)
    if not resume:
        if run.journal.exists() or run.config.exists():
            raise ResumeError(
                f"{path} already holds a run: continue it with --resume, or give the new one another run_dir or name"
            )
        path.mkdir(parents=True, exist_ok=True)
    elif not run.config.exists():
        raise ResumeError(f"{path} holds no run to resume (no config.yaml): start it without --resume")
    else:
        check_resumable(load_config(type(config), run.config), config, FREE_TO_CHANGE)
    run.config.write_text(dump_config(config))
    return run


def learned_digest(config: Spec) -> str:
    """Digest of everything that must not change over a run's life."""
    return config_digest(config, ignore=FREE_TO_CHANGE)
