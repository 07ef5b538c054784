"""Distillation: a student learns the token distributions of a teacher, which only scores.

    sequences (sampled by the student, or from the data) -> teacher -> [forward_backward, step] *

    reverse_kl   a sampled token's advantage is teacher log-prob - student log-prob: policy gradient of
                 -KL(student || teacher) on the student's own samples (on-policy distillation, arXiv 2306.13649)
    forward_kl   cross-entropy to the teacher's K likeliest tokens of a position, renormalised: KL(teacher || student)

The student samples its answers strictly on-policy: each step publishes its weights to the samplers, waits until all
serve them, samples, and trains once. Prompts, and the samples' seeds, are a function of (seed, step).
"""

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rlorch.data import DataSpec, Row
from rlorch.errors import DataError, ModelError
from rlorch.pool.config import PoolConfig
from rlorch.ports import Reference, Runtime, Tokenizer, Trainer
from rlorch.recipes.inputs import Inputs, read_rows
from rlorch.recipes.loop import Loop, batch_of
from rlorch.recipes.run_dir import check_run_dir, open_run_dir
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec, check_model_dir, model_path
from rlorch.recipes.student import Student
from rlorch.render.prompt import RenderSpec, render_prompt
from rlorch.render.supervised import TrainOn, render_supervised, supervised_example, to_datum
from rlorch.rollout.arrays import trajectory_arrays
from rlorch.specs import RuntimeSpec, SamplerSpec, Spec, TrainerSpec, WeightsSpec
from rlorch.types import Datum, Floats, LossSpec, Prompt, Rollout, SamplingParams

log = logging.getLogger(__name__)

Objective = Literal["reverse_kl", "forward_kl"]
LOSSES: Mapping[Objective, LossSpec] = {
    "reverse_kl": LossSpec("importance_sampling"),
    "forward_kl": LossSpec("cross_entropy"),
}


class DistillConfig(Spec):
    """`rlorch train` with `recipe: distill`."""

    recipe: Literal["distill"] = "distill"
    name: str = Field(default="distill", description="names the run directory")
    model: str = Field(description="directory of the student, or a hub id")
    teacher: str = Field(description="directory of the teacher, or a hub id; with the student's tokenizer")
    run_dir: str | None = Field(default=None, description="default: runs/<name>")
    runtime: Literal["ray", "local"] = "ray"
    address: str | None = Field(default=None, description="Ray cluster; null: start one here, auto: the one around")
    seed: int = 0
    steps: int = Field(ge=1, description="optimizer steps; the data repeats, reshuffled")
    objective: Objective = "reverse_kl"
    sequences: Literal["student", "data"] = Field(
        default="student", description="what is scored: samples of the student, or demonstrations (forward_kl only)"
    )
    center: bool = Field(
        default=True,
        description="reverse_kl: subtract the batch's mean advantage; the expected gradient stays, its variance falls",
    )
    top_k: int = Field(default=5, ge=1, le=128, description="forward_kl: the teacher's tokens per position")
    batch_size: int = Field(default=32, ge=1, description="rows per step")
    group_size: int = Field(default=1, ge=1, description="student: samples per row")
    max_tokens: int = Field(default=512, ge=1, description="student: sampled tokens per answer")
    data: DataSpec
    held_out: HeldOutSpec = HeldOutSpec()
    render: RenderSpec = RenderSpec()
    train_on: TrainOn = Field(default="all_assistant", description="data: turns that are learned")
    optimizer: OptimizerSpec = OptimizerSpec(learning_rate=1e-5)
    checkpoint: CheckpointSpec = CheckpointSpec()
    observe: ObserveSpec = ObserveSpec()
    trainer: TrainerSpec = TrainerSpec()
    sampler: SamplerSpec = SamplerSpec()
    concurrency: PoolConfig = PoolConfig()
    weights: WeightsSpec = WeightsSpec()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        self.optimizer.check(self.steps)
        if self.objective == "reverse_kl" and self.sequences == "data":
            raise ValueError("objective reverse_kl needs the student's own samples: set sequences: student")
        return self


Config = DistillConfig


def runtime_spec(config: DistillConfig) -> RuntimeSpec:
    """What this recipe needs started: a trainer, the teacher as reference, and samplers where the student samples."""
    return RuntimeSpec(
        model=model_path(config.model),
        run_dir=str(run_path(config)),
        reference_model=model_path(config.teacher),
        trainer=config.trainer,
        sampler=config.sampler,
        weights=config.weights,
        roles=("trainer", "reference", *(("sampler",) if config.sequences == "student" else ())),
    )


def run_path(config: DistillConfig) -> Path:
    """The run directory, absolute: actors on other nodes see the same path."""
    return Path(config.run_dir or f"runs/{config.name}").expanduser().resolve()


def prepare(config: DistillConfig, *, resume: bool = False) -> Inputs:
    """Read the data, and refuse what is wrong with the models or the run directory; starts and writes nothing.

    Raises:
        UserError: a model, the data or the run directory; the message says which.
    """
    check_run_dir(run_path(config), config, resume=resume)
    check_model_dir(config.model)
    check_model_dir(config.teacher, "teacher")
    _check_same_vocabulary(Path(config.model).expanduser(), Path(config.teacher).expanduser())
    return read_rows(config.data, config.held_out, config.render)


async def run(
    config: DistillConfig,
    runtime: Runtime,
    *,
    resume: bool = False,
    stop: asyncio.Event | None = None,
    inputs: Inputs | None = None,
) -> Mapping[str, float]:
    """Train; returns the last step's metrics. With `stop` set, ends after the running step, with a checkpoint.

    `inputs` is what `prepare` returned; without it, it is called here.

    Raises:
        UserError: something in the config, the data or the run directory is wrong.
        ExceptionGroup: a role failed for good; `resume=True` goes on from the last checkpoint.
    """
    stop = stop or asyncio.Event()
    rows = inputs or await asyncio.to_thread(prepare, config, resume=resume)
    source = (OwnAnswers if config.sequences == "student" else Demonstrations)(config, runtime.tokenizer(), rows)
    run_dir = open_run_dir(run_path(config), config, resume=resume)
    trainer = await runtime.trainer()
    teacher = await runtime.reference()
    loop = Loop(config, run_dir, trainer)
    if resume:
        await loop.restore()

    async def step(version: int) -> Mapping[str, float]:
        return await _step(trainer, teacher, source, config, version)

    async def evaluate() -> Mapping[str, float]:
        datums = await teacher_targets(teacher, await source.held_out(loop.version), config)
        return {"eval/teacher_kl": divergence(datums, (await trainer.forward(datums)).logprobs)}

    async with asyncio.TaskGroup() as background:
        keep = None
        if isinstance(source, OwnAnswers):
            shutil.rmtree(run_dir.path / "weights", ignore_errors=True)  # every replica starts from a new anchor
            source.student = await start_student(config, runtime, trainer)
            keep = background.create_task(source.student.run(), name="student")
        metrics = await loop.run(step, evaluate=evaluate if source.num_held_out else None, stop=stop)
        if keep is not None:
            keep.cancel()
    return metrics


async def _step(
    trainer: Trainer, teacher: Reference, source: "Source", config: DistillConfig, version: int
) -> dict[str, float]:
    """Sequences, the teacher's view of them, one optimizer step."""
    started = time.perf_counter()
    sequences = await source.batch(version)
    sampled = time.perf_counter()
    datums = await teacher_targets(teacher, sequences, config)
    scored = time.perf_counter()
    forward = await trainer.forward_backward(datums, LOSSES[config.objective])
    adam = config.optimizer.adam(version, config.steps)
    result = await trainer.optim_step(adam, "num_loss_tokens")
    tokens = max(forward.metrics["num_loss_tokens:sum"], 1.0)
    return {
        "train/loss": forward.metrics["loss:sum"] / tokens,
        "train/teacher_kl": divergence(datums, forward.logprobs),
        "train/num_loss_tokens": tokens,
        "train/num_sequences": float(len(datums)),
        "train/grad_norm": result.metrics["grad_norm:last"],
        "train/learning_rate": adam.learning_rate,
        "train/version": float(result.version),
        "perf/sample_s": sampled - started,
        "perf/reference_s": scored - sampled,
        "perf/step_s": time.perf_counter() - started,
    }


# --- what the teacher says --------------------------------------------------------------------------------


async def teacher_targets(teacher: Reference, sequences: Sequence[Datum], config: DistillConfig) -> list[Datum]:
    """Rows for the objective's loss, from rows with `mask` (1 where a token is learned) and, for `reverse_kl`, the
    student's `logprobs`."""
    if config.objective == "reverse_kl":
        return reverse_kl_rows(sequences, await teacher.logprobs(sequences), center=config.center)
    top_k = (await teacher.top_k(sequences, config.top_k)).top_k
    assert top_k is not None, "a top_k call without top_k"
    return [_soft(datum, *likeliest) for datum, likeliest in zip(sequences, top_k, strict=True)]


def reverse_kl_rows(sequences: Sequence[Datum], teacher: Sequence[Floats], *, center: bool) -> list[Datum]:
    """Sampled rows with `advantages`: by how much the teacher (`ref_logprobs`) likes a token more than the student did,
    less the mean of that over all tokens of the call when `center`."""
    gains = [scores_T - datum.loss_inputs["logprobs"] for datum, scores_T in zip(sequences, teacher, strict=True)]
    masks = [datum.loss_inputs["mask"] for datum in sequences]
    sampled = max(sum(float(mask_T.sum()) for mask_T in masks), 1.0)
    total = sum(float((mask_T * gain_T).sum()) for mask_T, gain_T in zip(masks, gains, strict=True))
    baseline = np.float32(total / sampled if center else 0.0)
    return [
        Datum(
            datum.tokens_T,
            {**datum.loss_inputs, "ref_logprobs": scores_T, "advantages": mask_T * (gain_T - baseline)},
        )
        for datum, scores_T, mask_T, gain_T in zip(sequences, teacher, masks, gains, strict=True)
    ]


def _soft(datum: Datum, ids_TK: NDArray[np.int64], logprobs_TK: Floats) -> Datum:
    """The teacher's likeliest tokens as targets, their probabilities, scaled to sum to 1, as weights."""
    shares_TK = np.exp(logprobs_TK - logprobs_TK.max(1, keepdims=True))
    shares_TK /= shares_TK.sum(1, keepdims=True)
    weights_TK = shares_TK * datum.loss_inputs["mask"][:, None]
    return Datum(datum.tokens_T, {"target_tokens": ids_TK, "weights": weights_TK.astype(np.float32)})


def divergence(datums: Sequence[Datum], logprobs: Sequence[Floats]) -> float:
    """Nats per learned token between student and teacher, given the student's log-probs of the targets.

    Soft targets: sum_k w_k (log w_k - log student_k), which counts what the student puts outside the K tokens too.
    Sampled tokens: the estimate mean(log student - log teacher), with the log-probs that the tokens were sampled by.
    """
    total = count = 0.0
    for datum, lp in zip(datums, logprobs, strict=True):
        inputs = datum.loss_inputs
        if "weights" in inputs:
            weights_TK = inputs["weights"].astype(np.float64)
            known = weights_TK > 0
            total += float((weights_TK[known] * (np.log(weights_TK[known]) - lp[known])).sum())
            count += float(known.any(1).sum())
        else:
            total += float((inputs["mask"] * (inputs["logprobs"] - inputs["ref_logprobs"])).sum())
            count += float(inputs["mask"].sum())
    return total / max(count, 1.0)


# --- what is scored ---------------------------------------------------------------------------------------


class Source(Protocol):
    """Sequences as rows with `target_tokens`, `mask`, and for sampled ones `logprobs`."""

    @property
    def num_held_out(self) -> int:
        """Rows that are evaluated; 0: no evaluation."""
        ...

    async def batch(self, version: int) -> list[Datum]:
        """What the step that starts from `version` trains."""
        ...

    async def held_out(self, version: int) -> list[Datum]:
        """What is evaluated at `version`."""
        ...


class Demonstrations:
    """Sequences of the data: what a person, the teacher or another model wrote."""

    def __init__(self, config: DistillConfig, tokenizer: Tokenizer, rows: Inputs) -> None:
        def render(row: Row) -> Datum:
            example = supervised_example(row, config.render)
            whole = render_supervised(example, tokenizer, config.train_on, config.render)
            datum = to_datum(whole.tokens_T, whole.weights_T)
            inputs = datum.loss_inputs
            return Datum(datum.tokens_T, {"target_tokens": inputs["target_tokens"], "mask": inputs["weights"]})

        self._config = config
        self._train, self._held_out = ([render(row) for row in part] for part in (rows.train_rows, rows.held_out_rows))

    @property
    def num_held_out(self) -> int:
        """Held-out demonstrations."""
        return len(self._held_out)

    async def batch(self, version: int) -> list[Datum]:
        """The demonstrations of a step."""
        return batch_of(self._train, self._config.batch_size, version, self._config.seed)

    async def held_out(self, version: int) -> list[Datum]:
        """All held-out demonstrations."""
        return self._held_out


class OwnAnswers:
    """The student's answers to the data's prompts, sampled when they are asked for. `student` is set by the run."""

    student: Student

    def __init__(self, config: DistillConfig, tokenizer: Tokenizer, rows: Inputs) -> None:
        self._config = config
        longest = config.sampler.max_model_len - config.max_tokens
        self._train, self._held_out = (
            [
                prompt
                for index, row in enumerate(part)
                if len((prompt := Prompt(index, *render_prompt(row, tokenizer, config.render), row)).tokens_T)
                <= longest
            ]
            for part in (rows.train_rows, rows.held_out_rows)
        )
        left_out = len(rows.train_rows) - len(self._train)
        if not self._train:
            raise DataError(
                f"{config.data.source}: every prompt is longer than {longest} tokens; raise sampler.max_model_len or "
                "lower max_tokens"
            )
        if left_out:
            log.warning("%d prompts of more than %d tokens are left out", left_out, longest)

    @property
    def num_held_out(self) -> int:
        """Held-out prompts that are short enough."""
        return len(self._held_out)

    async def batch(self, version: int) -> list[Datum]:
        """Samples of the student at `version`."""
        config = self._config
        prompts = batch_of(self._train, config.batch_size, version, config.seed)
        seeds = np.random.default_rng((config.seed, version)).integers(2**31, size=len(prompts)).tolist()
        return await self._answers(prompts, config.group_size, seeds, version)

    async def held_out(self, version: int) -> list[Datum]:
        """One answer to each held-out prompt, sampled with the same seed every time."""
        return await self._answers(self._held_out, 1, list(range(len(self._held_out))), version)

    async def _answers(self, prompts: Sequence[Prompt], n: int, seeds: Sequence[int], version: int) -> list[Datum]:
        await self.student.serve(version)
        # At temperature 1: the divergence is between the policies themselves.
        params = SamplingParams(n=n, max_tokens=self._config.max_tokens, temperature=1.0)
        return [_sampled(rollout) for rollout in await self.student.sample(prompts, params, seeds, f"step-{version}")]


def _sampled(rollout: Rollout) -> Datum:
    arrays = trajectory_arrays(rollout)
    inputs = {"target_tokens": arrays.target_tokens_T, "mask": arrays.mask_T, "logprobs": arrays.logprobs_T}
    return Datum(arrays.tokens_T, inputs)


async def start_student(config: DistillConfig, runtime: Runtime, trainer: Trainer) -> Student:
    """The sampler replicas, all at once, wired to the trainer."""
    async with asyncio.TaskGroup() as tasks:
        starting = {
            name: tasks.create_task(runtime.sampler(name), name=f"start {name}")
            for name in (f"sampler-{index}" for index in range(config.sampler.replicas))
        }
    samplers = {name: task.result() for name, task in starting.items()}
    return Student(runtime, trainer, samplers, config.sampler, config.weights, config.concurrency)


def _check_same_vocabulary(student: Path, teacher: Path) -> None:
    """Token ids must mean the same to both. Hub ids are taken on trust. Raises `ModelError`."""
    vocabularies: list[object] = []
    for directory in (student, teacher):
        try:
            vocabularies.append(
                json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return  # another kind of tokenizer file: nothing to compare
    if vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"teacher = {teacher}: its tokenizer has another vocabulary than the student's ({student}), so its token "
            "ids mean something else: take a teacher of the same model family"
        )
