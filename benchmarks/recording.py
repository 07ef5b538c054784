"""Runtimes between a run and its real runtime: one notes what passes through the ports, one keeps roles between runs.

Each gives a run the same roles, behind thin ports that call through. Nothing of rlorch is changed or patched, so the
runs are the product's own.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlorch.ports import Runtime, Sampler, Tokenizer, Trainer
from rlorch.specs import WeightsSpec
from rlorch.types import CommitReport, Completion, Manifest, SamplingParams, Tokens
from rlorch.weights.store import FileWeightStore

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
KNOWN: dict[int, str] = {}
"""Roles of processes by id, as first seen: Ray rewrites titles on every call, and a read may meet an empty one."""
ROLES = {"ray::TrainerActor": "trainer", "ray::SamplerActor": "sampler", "ray::RewardActor": "rewards"}


@dataclass(frozen=True)
class Mark:
    """The end of a published version: when, and CPU seconds used so far by role."""

    version: int
    at_s: float
    cpu_s: Mapping[str, float]


@dataclass
class Recorder:
    """What one run did; times are of `time.perf_counter`, in seconds.

    `marks` has one entry per version, `commits` one per version and replica; `first_sample_s` is when the first
    request was made, `answers` when each request was answered, and its tokens.
    """

    marks: list[Mark] = field(default_factory=list)
    commits: list[CommitReport] = field(default_factory=list)
    export_s: list[float] = field(default_factory=list)
    stage_call_s: list[float] = field(default_factory=list)
    first_sample_s: float = 0.0
    answers: list[tuple[float, int]] = field(default_factory=list)

    def tokens_between(self, start_s: float, end_s: float) -> int:
        """Tokens of the requests that were answered in that time."""
        return sum(tokens for at_s, tokens in self.answers if start_s <= at_s < end_s)


class KeptRuntime:
    """The Runtime port over another one, for several runs one after the other: each role is started once.

    A new run finds an empty weight store and the trainer as it was when it was new; the samplers load that version
    before they serve. So runs are independent, and only the first one waits for engines.
    """

    def __init__(self, runtime: Runtime, run_dir: Path, weights: WeightsSpec) -> None:
        self._runtime = runtime
        self._store = run_dir / "weights"
        self._initial = run_dir / "initial"
        self._weights = weights
        self._roles: dict[str, Any] = {}

    def tokenizer(self) -> Tokenizer:
        """See `Runtime.tokenizer`."""
        return self._runtime.tokenizer()

    async def reference(self) -> Any:
        """See `Runtime.reference`."""
        return await self._runtime.reference()

    async def stop(self) -> None:
        """See `Runtime.stop`."""
        await self._runtime.stop()

    def weight_store(self) -> FileWeightStore:
        """See `Runtime.weight_store`; what an earlier run published is gone."""
        shutil.rmtree(self._store, ignore_errors=True)
        return FileWeightStore(self._store, self._weights)

    async def trainer(self) -> Any:
        """See `Runtime.trainer`."""
        if "trainer" not in self._roles:
            self._roles["trainer"] = await self._runtime.trainer()
            self._initial.mkdir(parents=True)
            await self._roles["trainer"].save(str(self._initial))
        else:
            await self._roles["trainer"].load(str(self._initial))
        return self._roles["trainer"]

    async def sampler(self, name: str) -> Any:
        """See `Runtime.sampler`."""
        if name not in self._roles:
            self._roles[name] = await self._runtime.sampler(name)
        return self._roles[name]

    async def reward_worker(self, name: str) -> Any:
        """See `Runtime.reward_worker`."""
        if name not in self._roles:
            self._roles[name] = await self._runtime.reward_worker(name)
        return self._roles[name]


class RecordingRuntime:
    """The Runtime port over another one."""

    def __init__(self, runtime: Runtime, recorder: Recorder, wrap_trainer: Callable[[Trainer], Any] | None) -> None:
        self._runtime = runtime
        self._recorder = recorder
        self._wrap_trainer = wrap_trainer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    async def trainer(self) -> Any:
        """See `Runtime.trainer`."""
        trainer = await self._runtime.trainer()
        return RecordingTrainer(self._wrap_trainer(trainer) if self._wrap_trainer else trainer, self._recorder)

    async def sampler(self, name: str) -> Any:
        """See `Runtime.sampler`."""
        return RecordingSampler(await self._runtime.sampler(name), self._recorder)


class RecordingTrainer:
    """The Trainer port over another one."""

    def __init__(self, trainer: Trainer, recorder: Recorder) -> None:
        self._trainer = trainer
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    async def export(self, kind: str) -> Manifest:
        """See `Trainer.export`."""
        start = time.perf_counter()
        manifest = await self._trainer.export(kind)
        self._recorder.export_s.append(time.perf_counter() - start)
        return manifest

    async def published(self, version: int) -> None:
        """See `Trainer.published`."""
        await self._trainer.published(version)
        self._recorder.marks.append(Mark(version, time.perf_counter(), cpu_seconds()))


class RecordingSampler:
    """The Sampler port over another one."""

    def __init__(self, sampler: Sampler, recorder: Recorder) -> None:
        self._sampler = sampler
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    async def sample(self, prompt_T: Tokens, params: SamplingParams, request_id: str) -> tuple[Completion, ...]:
        """See `Sampler.sample`."""
        self._recorder.first_sample_s = self._recorder.first_sample_s or time.perf_counter()
        completions = await self._sampler.sample(prompt_T, params, request_id)
        tokens = sum(len(completion.tokens_T) for completion in completions)
        self._recorder.answers.append((time.perf_counter(), tokens))
        return completions

    async def load(self, chain: Sequence[Manifest]) -> CommitReport:
        """See `Sampler.load`; not counted as a commit."""
        return await self._sampler.load(chain)

    async def stage(self, manifest: Manifest) -> None:
        """See `Sampler.stage`."""
        start = time.perf_counter()
        await self._sampler.stage(manifest)
        self._recorder.stage_call_s.append(time.perf_counter() - start)

    async def commit(self, version: int) -> CommitReport:
        """See `Sampler.commit`."""
        report = await self._sampler.commit(version)
        self._recorder.commits.append(report)
        return report


def cpu_seconds() -> dict[str, float]:
    """User and system seconds used so far by this process ("coordinator") and its descendants, by role.

    Descendants that are no role's (raylet and its helpers) count as "ray". Empty where there is no /proc.
    """
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            titles[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        parents[int(entry.name)] = int(stat[1])
        used[int(entry.name)] = (int(stat[11]) + int(stat[12])) / TICKS_PER_S
    totals: dict[str, float] = {}
    for pid, seconds in used.items():
        if (role := _role(pid, parents, titles)) is not None:
            totals[role] = totals.get(role, 0.0) + seconds
    return totals


def _role(pid: int, parents: Mapping[int, int], titles: Mapping[int, str]) -> str | None:
    """The role of the nearest ancestor that has one; None for a process that is not ours."""
    me, at = os.getpid(), pid
    if pid == me:
        return "coordinator"
    while at in parents and at != me:
        for title, role in ROLES.items():
            if titles.get(at, "").startswith(title):
                KNOWN[at] = role
        if at in KNOWN:
            return KNOWN[at]
        at = parents[at]
    return "ray" if at == me else None
