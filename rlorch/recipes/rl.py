"""Reinforcement learning: sample groups, score them, train, push the new weights to the samplers, all at once.

This file is the whole run as one reads it: what is started, what is wired to what, what is left behind. The loops
are in `rlorch.coordinator`; each part is a port and can be replaced.

    open run directory and journal -> start roles -> restore checkpoint, replay batches -> publish -> prove the samplers
    -> evaluate -> train (evaluating and checkpointing on the way) -> checkpoint -> evaluate -> export, report
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rlorch.aio import deadline
from rlorch.checkpoint.store import FileCheckpointStore
from rlorch.coordinator.algorithm import Algorithm, AlgorithmSpec
from rlorch.coordinator.board import Board, Messages
from rlorch.coordinator.coordinator import Coordinator, RolloutSpec, StepDone
from rlorch.coordinator.evaluation import Evaluation, EvaluationSpec, Evaluator
from rlorch.coordinator.fleet import Fleet
from rlorch.coordinator.ledger import Ledger
from rlorch.coordinator.source import Cursor, PromptSource
from rlorch.data import DataSpec
from rlorch.errors import DataError, SelfTestError
from rlorch.journal.journal import SqliteJournal
from rlorch.journal.recovery import RecoveredRun, read_state
from rlorch.observe.console import Console
from rlorch.observe.logs import RunLogs
from rlorch.observe.sinks import FanOut
from rlorch.observe.trace import Tracer
from rlorch.observe.view import Accuracy, RunSummary, Status
from rlorch.plugins import resolve
from rlorch.pool.config import PoolConfig
from rlorch.pool.pool import SamplerPool
from rlorch.ports import MetricSink, Reference, Runtime, Tokenizer, Trainer
from rlorch.recipes.inputs import Inputs, read_rows
from rlorch.recipes.run_dir import RunDir, check_run_dir, learned_digest, open_run_dir
from rlorch.recipes.sections import CheckpointSpec, HeldOutSpec, ObserveSpec, OptimizerSpec, check_model_dir, model_path
from rlorch.recipes.sft import save_checkpoint
from rlorch.render.prompt import RenderSpec, render_prompt
from rlorch.rollout.single_turn import rollout_group
from rlorch.scoring.plugin import REWARD_KIND
from rlorch.scoring.pool import RewardPool, call_timeout_s
from rlorch.specs import RewardSpec, RuntimeSpec, SamplerSpec, Spec, TrainerSpec, WeightsSpec
from rlorch.types import Datum, Manifest, Prompt, Rollout, SamplingParams
from rlorch.weights.group import SyncGroup
from rlorch.weights.publisher import Publisher

log = logging.getLogger(__name__)


class RLConfig(Spec):
    """`rlorch train` with `recipe: rl`."""

    recipe: Literal["rl"] = "rl"
    name: str = Field(default="rl", description="names the run directory")
    model: str = Field(description="directory of the initial policy, or a hub id")
    run_dir: str | None = Field(default=None, description="default: runs/<name>")
    runtime: Literal["ray", "local"] = Field(default="ray", description="local: all in this process")
    address: str | None = Field(default=None, description="Ray cluster; null: start one here, auto: the one around")
    seed: int = 0
    steps: int = Field(ge=1, description="optimizer steps")
    epochs: int | None = Field(default=None, ge=1, description="passes over the data; null: repeat until `steps`")
    data: DataSpec
    held_out: HeldOutSpec = HeldOutSpec()
    render: RenderSpec = RenderSpec()
    rewards: RewardSpec
    algorithm: AlgorithmSpec = AlgorithmSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    rollout: RolloutSpec = RolloutSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    concurrency: PoolConfig = PoolConfig()
    checkpoint: CheckpointSpec = CheckpointSpec()
    observe: ObserveSpec = ObserveSpec()
    trainer: TrainerSpec = TrainerSpec()
    sampler: SamplerSpec = SamplerSpec()
    weights: WeightsSpec = WeightsSpec()


Config = RLConfig


# Trainer and sampler compute the same log-probs by different kernels in different dtypes: bf16 noise is about 0.01
# nats per token, wrong weights (another version, a tensor not updated) are 0.3 and more.
CANARY_TOLERANCE_NATS = 0.1


def run_path(config: RLConfig) -> Path:
    """The run directory, absolute: actors on other nodes see the same path."""
    return Path(config.run_dir or f"runs/{config.name}").expanduser().resolve()


def runtime_spec(config: RLConfig) -> RuntimeSpec:
    """What this recipe needs started. A reference only when the KL coefficient is not 0."""
    reference = config.algorithm.kl_coefficient > 0
    return RuntimeSpec(
        model=model_path(config.model),
        run_dir=str(run_path(config)),
        trainer=config.trainer,
        sampler=config.sampler,
        rewards=config.rewards,
        weights=config.weights,
        roles=("trainer", *(("reference",) if reference else ()), "sampler", "reward"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Roles:
    """The started roles of a run."""

    trainer: Trainer
    reference: Reference | None
    fleet: Fleet
    rewards: RewardPool
    publisher: Publisher


def prepare(config: RLConfig, *, resume: bool = False) -> Inputs:
    """Read the data, and refuse what is wrong with model, rewards or run directory; starts and writes nothing.

    Raises:
        UserError: the model, a reward, the data or the run directory; the message says which.
    """
    check_run_dir(run_path(config), config, resume=resume)
    check_model_dir(config.model)
    for term in config.rewards.terms:
        resolve(term.plugin, REWARD_KIND)
    return read_rows(config.data, config.held_out, config.render)


async def run(
    config: RLConfig,
    runtime: Runtime,
    *,
    resume: bool = False,
    stop: asyncio.Event | None = None,
    inputs: Inputs | None = None,
) -> RunSummary:
    """Train to `config.steps`. With `stop` set, ends after the running step, with a checkpoint.

    `inputs` is what `prepare` returned; without it, it is called here.

    Raises:
        UserError: something in the config, the data or the run directory is wrong.
        ExceptionGroup: a role failed for good; everything finished is in the journal, `resume=True` goes on.
    """
    rows = inputs or await asyncio.to_thread(prepare, config, resume=resume)
    tokenizer = runtime.tokenizer()
    render_prompt(rows.train_rows[0], tokenizer, config.render)  # a wrong prompt_field, before the roles start
    run_dir = open_run_dir(run_path(config), config, resume=resume)
    with ExitStack() as closing:
        closing.enter_context(RunLogs(run_dir.path, "coordinator"))
        messages = closing.enter_context(_listening(Messages()))
        tracer = Tracer(time.perf_counter, run_dir.path / "trace.json")
        closing.callback(tracer.close)
        sink = run_dir.sinks(config.observe, config.name, config)
        closing.callback(sink.close)
        async with SqliteJournal(run_dir.journal, config_digest=learned_digest(config)) as journal:
            run = _Run(config, runtime, tokenizer, rows, run_dir, journal, sink, tracer, messages)
            return await run.run(stop or asyncio.Event())


async def evaluate(config: RLConfig, runtime: Runtime) -> Mapping[str, float]:
    """Evaluate `config.model` on the held-out prompts through a sampler; returns the metrics. `rlorch eval`.

    Raises:
        DataError: the config holds no prompts out.
    """
    check_model_dir(config.model)
    rows = await asyncio.to_thread(read_rows, config.data, config.held_out, config.render)
    if not rows.held_out_rows:
        raise DataError("nothing to evaluate on: set held_out.num_prompts")
    run_dir = RunDir(run_path(config))
    await asyncio.to_thread(run_dir.path.mkdir, parents=True, exist_ok=True)
    with RunLogs(run_dir.path, "coordinator"):
        async with SqliteJournal(run_dir.journal) as journal:
            tracer = Tracer(time.perf_counter)
            run = _Run(config, runtime, runtime.tokenizer(), rows, run_dir, journal, FanOut([]), tracer, Messages())
            return (await run.evaluate()).metrics()


class _Run:
    """One process's part in a run."""

    def __init__(
        self,
        config: RLConfig,
        runtime: Runtime,
        tokenizer: Tokenizer,
        rows: Inputs,
        run_dir: RunDir,
        journal: SqliteJournal,
        sink: MetricSink,
        tracer: Tracer,
        messages: Messages,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.run_dir = run_dir
        self.journal = journal
        self.sink = sink
        self.tracer = tracer
        self.messages = messages
        self.tokenizer = tokenizer
        self.train_rows = rows.train_rows
        self.held_out = [self._prompt(-1 - index, row) for index, row in enumerate(rows.held_out_rows)]
        self.checkpoints = FileCheckpointStore(run_dir.checkpoints, keep_last=config.checkpoint.keep_last)
        self.params = SamplingParams(
            n=config.rollout.group_size,
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop=config.rollout.stop,
        )
        self.clock = time.perf_counter
        self._evaluating: asyncio.Task[None] | None = None

    async def run(self, stop: asyncio.Event) -> RunSummary:
        """From nothing, or from what the run directory holds, to the summary."""
        latest = await self.checkpoints.latest()
        recovered = await asyncio.to_thread(read_state, self.run_dir.journal, from_step=latest.step if latest else 0)
        shutil.rmtree(self.run_dir.path / "weights", ignore_errors=True)  # every replica starts from a new anchor
        self.roles = await self._start()
        version = 0
        if latest is not None:
            version = await self.roles.trainer.load(latest.path)
        self.board = self._make_board()
        self.coordinator = self.board.coordinator = self._make_coordinator(version, recovered)
        self.evaluator = self._make_evaluator()
        console = Console(self.board.view) if self.config.observe.console != "off" else nullcontext()
        status: Status = "running"
        try:
            with console:
                async with asyncio.TaskGroup() as background:
                    tasks = [background.create_task(self.roles.fleet.run(), name="fleet")]
                    if isinstance(console, Console):
                        tasks.append(background.create_task(console.run(), name="console"))
                    status = await self._train(background, stop, recovered)
                    for task in tasks:
                        task.cancel()
        except BaseException:
            status = "interrupted" if stop.is_set() else "failed"
            raise
        finally:
            summary = self._summary(status)
            summary.write(self.run_dir.path)
        return summary

    async def _train(self, background: asyncio.TaskGroup, stop: asyncio.Event, recovered: RecoveredRun) -> Status:
        """Replay, publish, prove, evaluate, train, and leave a checkpoint."""
        coordinator = self.coordinator
        await coordinator.replay(recovered.batches)
        coordinator.restore(recovered.finished)
        await self._serve()
        before = recovered.last_events.get("evaluation_before")
        if before is not None:
            self.board.evaluations.append(Evaluation(**before.payload))
        elif self.held_out:
            await self._evaluate("evaluation_before")
        self._background = background
        watch = background.create_task(self._watch(stop), name="stop")
        await coordinator.run()
        watch.cancel()
        await self._checkpoint(coordinator.version)
        if stop.is_set() and coordinator.version < self.config.steps:
            return "interrupted"
        if self._evaluating is not None:
            await self._evaluating
        if self.held_out:
            await self._evaluate("evaluation_after")
        await self.run_dir.export(self.roles.trainer)
        return "finished"

    async def evaluate(self) -> Evaluation:
        """Only the evaluation: no training, no prompts but the held-out ones."""
        self.roles = await self._start()
        self.board = self._make_board()
        self.evaluator = self._make_evaluator()
        async with asyncio.TaskGroup() as background:
            fleet = background.create_task(self.roles.fleet.run(), name="fleet")
            await self._serve()
            await self._evaluate("evaluation")
            fleet.cancel()
        return self.board.evaluations[-1]

    # --- starting -----------------------------------------------------------------------------------------

    async def _start(self) -> Roles:
        """All roles at once; the first failure ends the others' start."""
        config, runtime = self.config, self.runtime
        wants_reference = "reference" in runtime_spec(config).roles
        with self.tracer.span("coordinator", "start roles"):
            async with asyncio.TaskGroup() as tasks:
                trainer = tasks.create_task(runtime.trainer(), name="start trainer")
                reference = tasks.create_task(runtime.reference(), name="start reference") if wants_reference else None
                samplers = {
                    name: tasks.create_task(runtime.sampler(name), name=f"start {name}")
                    for name in (f"sampler-{index}" for index in range(config.sampler.replicas))
                }
                workers = {
                    name: tasks.create_task(runtime.reward_worker(name), name=f"start {name}")
                    for name in (f"reward-{index}" for index in range(config.rewards.workers))
                }
        store = runtime.weight_store()
        publisher = Publisher(trainer.result(), store, config.weights)
        syncs = SyncGroup(store, config.weights, publisher.head, gate_timeout_s=config.evaluation.timeout_s)
        started = {name: task.result() for name, task in samplers.items()}
        pool = SamplerPool({}, config.concurrency, span=lambda name: self.tracer.span(name, "generate"))
        return Roles(
            trainer=trainer.result(),
            reference=reference.result() if reference else None,
            fleet=Fleet(runtime, started, pool, syncs),
            rewards=RewardPool(
                {name: task.result() for name, task in workers.items()},
                call_timeout_s=partial(call_timeout_s, config.rewards),
                restart=runtime.reward_worker,
            ),
            publisher=publisher,
        )

    def _make_board(self) -> Board:
        return Board(
            name=self.config.name,
            model=Path(self.config.model).name,
            total_steps=self.config.steps,
            group_size=self.config.rollout.group_size,
            fleet=self.roles.fleet,
            rewards=self.roles.rewards,
            tracer=self.tracer,
            clock=self.clock,
            messages=self.messages,
        )

    def _make_coordinator(self, version: int, recovered: RecoveredRun) -> Coordinator:
        config, roles = self.config, self.roles
        ledger = Ledger(config.rollout.groups_per_batch, config.rollout.max_staleness, version + len(recovered.batches))
        return Coordinator(
            steps=config.steps,
            version=version,
            ledger=ledger,
            algorithm=Algorithm(config.algorithm, max_tokens=config.rollout.max_tokens, seed=config.seed),
            prompts=self._prompts(recovered),
            rollout=lambda prompt: self._rollout(prompt, self.params, "group"),
            score=self._score,
            trainer=roles.trainer,
            reference=roles.reference,
            publish=self._publish,
            committed=roles.fleet.syncs.committed_everywhere,
            journal=self.journal,
            adam=lambda step: config.optimizer.adam(step, config.steps),
            after_step=self._after_step,
            sink=self.sink,
            tracer=self.tracer,
            clock=self.clock,
            group_timeout_s=config.rollout.group_timeout_s,
            more_metrics=self.board.step_metrics,
        )

    def _make_evaluator(self) -> Evaluator:
        spec = self.config.evaluation
        return Evaluator(
            spec,
            self.held_out,
            self.params,
            rollout=self._rollout,
            score=self.roles.rewards.score,
            pin=lambda: self.roles.fleet.syncs.pinned("evaluation", spec.timeout_s),
            clock=self.clock,
        )

    # --- prompts, rollouts, scores ------------------------------------------------------------------------

    def _prompt(self, ordinal: int, row: Mapping[str, Any]) -> Prompt:
        text, tokens_T = render_prompt(row, self.tokenizer, self.config.render)
        return Prompt(ordinal, text, tokens_T, row)

    def _prompts(self, recovered: RecoveredRun) -> Iterator[Prompt]:
        """Prompts that are not resolved yet, in order. One too long for the model is skipped with a warning."""
        source = PromptSource(len(self.train_rows), seed=self.config.seed, epochs=self.config.epochs)
        cursor = Cursor(recovered.resolved, end=source.end)
        longest = self.config.sampler.max_model_len - self.config.rollout.max_tokens
        skipped = 0
        while (ordinal := cursor.draw()) is not None:
            prompt = self._prompt(ordinal, self.train_rows[source.locate(ordinal)[1]])
            if len(prompt.tokens_T) <= longest:
                skipped = 0
                yield prompt
                continue
            skipped += 1
            log.warning(
                "prompt %d has %d tokens and is skipped: sampler.max_model_len %d leaves %d beside rollout.max_tokens",
                ordinal,
                len(prompt.tokens_T),
                self.config.sampler.max_model_len,
                longest,
            )
            if skipped >= len(self.train_rows):
                raise DataError(
                    f"{self.config.data.source}: every prompt is longer than {longest} tokens; raise "
                    "sampler.max_model_len or lower rollout.max_tokens"
                )

    async def _rollout(self, prompt: Prompt, params: SamplingParams, prefix: str) -> tuple[Rollout, ...]:
        return await rollout_group(
            prompt,
            group_id=prompt.ordinal,
            params=params,
            sample=self.roles.fleet.pool.sample,
            tokenizer=self.tokenizer,
            request_prefix=prefix,
        )

    async def _score(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        with self.tracer.span("rewards", "score"):
            return await self.roles.rewards.score(rollouts)

    # --- versions, checkpoints, evaluations ---------------------------------------------------------------

    async def _publish(self) -> Manifest:
        manifest = await self.roles.publisher.publish()
        self.board.published(manifest)
        return manifest

    async def _serve(self) -> None:
        """Publish the trainer's weights, wait until a replica serves them, and check that it computes with them."""
        version = (await self._publish()).version
        async with deadline(
            self.config.sampler.start_timeout_s + self.config.weights.stage_timeout_s,
            f"samplers: none serves version {version}; logs/sampler-*.log say how far they came",
        ):
            await self.roles.fleet.syncs.committed_everywhere.until(lambda served: served >= version)
        await self._prove_samplers()

    async def _prove_samplers(self) -> None:
        """Every replica must give a fixed sequence the log-probs that the trainer gives it."""
        tokens_T = self._canary()
        datum = Datum(tokens_T[:-1].astype(np.int64), {"target_tokens": tokens_T[1:].astype(np.int64)})
        expected = (await self.roles.trainer.forward([datum])).logprobs[0]
        for name, sampler in self.roles.fleet.samplers().items():
            off = float(np.abs(await sampler.score(tokens_T) - expected).mean())
            log.info("%s: log-probs of the canary differ from the trainer's by %.4f nats per token", name, off)
            if not off <= CANARY_TOLERANCE_NATS:
                raise SelfTestError(
                    f"{name} does not compute what the trainer computes: its log-probs of the same {len(tokens_T)} "
                    f"tokens differ by {off:.3f} nats per token (bound {CANARY_TOLERANCE_NATS}); do not train on its "
                    "samples: see `rlorch check --engine`, and trainer.serve_dtype"
                )

    def _canary(self) -> NDArray[np.int32]:
        """A fixed sequence: the first training prompts, as long as the model allows, at most 256 tokens."""
        length = min(256, self.config.sampler.max_model_len - 1)
        parts = [self._prompt(0, row).tokens_T for row in self.train_rows[:32]]
        return np.concatenate(parts)[:length]

    async def _after_step(self, done: StepDone) -> None:
        self.tracer.flush()
        every = self.config.checkpoint.every
        if done.replayed:
            return
        if every and done.version % every == 0:
            await self._checkpoint(done.version)
        if self._due_for_evaluation(done.version):
            self._evaluating = self._background.create_task(self._evaluate("evaluation"), name="evaluation")

    def _due_for_evaluation(self, version: int) -> bool:
        every = self.config.evaluation.every
        due = every > 0 and version % every == 0 and version < self.config.steps and bool(self.held_out)
        if due and self._evaluating is not None and not self._evaluating.done():
            log.warning("evaluation at version %d skipped: the one before it still runs", version)
            return False
        return due

    async def _evaluate(self, kind: str) -> None:
        with self.tracer.span("coordinator", kind):
            evaluation = await self.evaluator.evaluate()
        self.board.evaluations.append(evaluation)
        self.sink.write(evaluation.version, evaluation.metrics())
        await self.journal.event(kind, asdict(evaluation))

    async def _checkpoint(self, version: int) -> None:
        with self.tracer.span("trainer", "checkpoint", step=version):
            saved = await save_checkpoint(self.checkpoints, self.roles.trainer, version)
        if saved:
            await self.journal.event("checkpoint", {"version": version})

    async def _watch(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.coordinator.stop()

    def _summary(self, status: Status) -> RunSummary:
        board = self.board
        accuracies = [Accuracy(e.version, e.sampled, e.greedy) for e in board.evaluations]
        return RunSummary(
            name=self.config.name,
            model=self.config.model,
            status=status,
            steps=self.config.steps,
            version=self.coordinator.version,
            elapsed_s=self.clock() - board.started,
            before=accuracies[0] if accuracies else None,
            after=accuracies[-1] if len(accuracies) > 1 else None,
            rollouts=board.rollouts(),
            sampled_tokens=self.coordinator.made["tokens"],
            delta_bytes=board.delta_bytes,
            full_bytes=board.full_bytes,
            pause_s_mean=board.pauses()[1],
            coding_note=board.coding_note(),
            trace=self.tracer.summary(),
        )


@contextmanager
def _listening(messages: Messages) -> Generator[Messages]:
    """Warnings of this process also go to the live view, while it lasts."""
    root = logging.getLogger("rlorch")
    root.addHandler(messages)
    try:
        yield messages
    finally:
        root.removeHandler(messages)
