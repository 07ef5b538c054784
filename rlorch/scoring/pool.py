"""The reward pool: N reward workers behind one call.

`score(rollouts)` waits for a free slot per rollout (first come, first served), gives the rollout to the worker with the
least running, and returns the rollouts with their verdicts. A plug-in that fails is a verdict, never an error. A
worker that is lost (`ReplicaLostError`, or no answer within `call_timeout_s`) is reported, taken out of dispatch and
restarted; its rollout goes to another worker once, and is then the failure `crash`.

Invariants: at most `slots_per_worker` rollouts are with a worker; at most `capacity` are in the pool, and callers
wait outside; every wait has a deadline derived from those numbers; cancelling `score` frees its slots.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlorch.aio import Limiter, deadline
from rlorch.errors import DeadlineError, ReplicaLostError
from rlorch.ports import RewardWorker
from rlorch.types import FailureKind, Rollout, Verdict

Restart = Callable[[str], Awaitable[RewardWorker]]
OnLost = Callable[[str, Exception], None]


@dataclass(frozen=True, slots=True)
class RewardPoolView:
    """The pool in numbers, for the console.

    `running` rollouts are with a worker, `queued` wait for one. `scored`, `failures` (by kind) and `lost` count since
    the start; `mean_s` is the mean time of a finished verdict inside a worker, in seconds.
    """

    workers: int
    available: int
    running: int
    queued: int
    scored: int
    failures: Mapping[FailureKind, int]
    lost: int
    mean_s: float

    @property
    def timeouts(self) -> int:
        """Rollouts whose plug-in ran out of time."""
        return self.failures.get("timeout", 0)


@dataclass(slots=True)
class _Slot:
    """A worker's place in the pool."""

    name: str
    worker: RewardWorker
    running: int = 0
    lost: bool = False
    restarting: bool = False


class RewardPool:
    """Dispatches rollouts to reward workers."""

    def __init__(
        self,
        workers: Mapping[str, RewardWorker],
        *,
        call_timeout_s: float,
        restart: Restart | None = None,
        on_lost: OnLost | None = None,
        slots_per_worker: int = 1,
        capacity: int = 4096,
    ) -> None:
        """A pool of at least one worker.

        Args:
            workers: by name.
            call_timeout_s: longest time of one call: more than the plug-in budget plus a restart of its process.
            restart: starts a lost worker again by its name (`Runtime.reward_worker`), within `call_timeout_s`. None:
                workers heal by themselves and stay in dispatch.
            on_lost: told the name and the error of every loss.
            slots_per_worker: rollouts that one worker holds at a time.
            capacity: rollouts in the pool; further callers wait.
        """
        if not workers or slots_per_worker < 1 or capacity < 1:
            raise ValueError(
                f"a pool needs workers ({len(workers)}), slots ({slots_per_worker}), capacity ({capacity})"
            )
        self._slots = [_Slot(name, worker) for name, worker in workers.items()]
        self._slots_per_worker = slots_per_worker
        self._call_timeout_s = call_timeout_s
        self._restart_worker = restart
        self._on_lost = on_lost
        self._capacity = capacity
        self._admission = Limiter(capacity)
        self._dispatch = Limiter(len(workers) * slots_per_worker)
        self._scored = 0
        self._failures: Counter[FailureKind] = Counter()
        self._lost = 0
        self._seconds = 0.0

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """The rollouts with their verdicts, in the order given.

        Raises an ExceptionGroup of:
            DeadlineError: no worker became free in the time that a full queue takes.
            ReplicaLostError: a lost worker could not be restarted, and there is no other.
            UserError: a worker that was restarted cannot load its plug-ins.
        """
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                if slot.lost and not slot.restarting:
                    group.create_task(self._restart(slot), name=f"restart {slot.name}")
            tasks = [
                group.create_task(self._score(rollout, group), name=f"score {rollout.group_id}/{rollout.index}")
                for rollout in rollouts
            ]
        return tuple(replace(rollout, verdict=task.result()) for rollout, task in zip(rollouts, tasks, strict=True))

    def view(self) -> RewardPoolView:
        """The pool's numbers now."""
        running = sum(slot.running for slot in self._slots)
        finished = self._scored + sum(self._failures.values())
        return RewardPoolView(
            workers=len(self._slots),
            available=sum(not slot.lost for slot in self._slots),
            running=running,
            queued=self._admission.in_flight - running + self._admission.waiting,
            scored=self._scored,
            failures=dict(self._failures),
            lost=self._lost,
            mean_s=self._seconds / finished if finished else 0.0,
        )

    async def _score(self, rollout: Rollout, group: asyncio.TaskGroup) -> Verdict:
        what = (
            f"rollout {rollout.group_id}/{rollout.index}: the queue of the reward pool does not move; see its workers"
        )
        async with deadline(self._queue_timeout_s(2), what):
            await self._admission.acquire()
        try:
            verdict = await self._attempt(rollout, group)
            if isinstance(verdict, Exception):
                verdict = await self._attempt(rollout, group)
            if isinstance(verdict, Exception):
                detail = f"two reward workers in a row were lost with this rollout: {verdict}"
                verdict = Verdict(failure="crash", detail=detail)
        finally:
            self._admission.release()
        self._count(verdict)
        return verdict

    async def _attempt(self, rollout: Rollout, group: asyncio.TaskGroup) -> Verdict | Exception:
        """One try; the error where the worker was lost."""
        what = f"rollout {rollout.group_id}/{rollout.index}: no reward worker became free; {self._states()}"
        async with deadline(self._queue_timeout_s(1), what):
            await self._dispatch.acquire()
        slot = min((s for s in self._slots if not s.lost), key=lambda s: s.running)
        slot.running += 1
        try:
            async with deadline(self._call_timeout_s, f"reward worker {slot.name!r} scoring a rollout"):
                return await slot.worker.score(rollout)
        except (ReplicaLostError, DeadlineError) as error:
            self._lose(slot, error, group)
            return error
        finally:
            slot.running -= 1
            self._dispatch.release()

    def _lose(self, slot: _Slot, error: Exception, group: asyncio.TaskGroup) -> None:
        self._lost += 1
        if self._on_lost is not None:
            self._on_lost(slot.name, error)
        if self._restart_worker is None or slot.lost:
            return
        slot.lost = True
        self._dispatch.resize(self._dispatch.limit - self._slots_per_worker)
        group.create_task(self._restart(slot), name=f"restart {slot.name}")

    async def _restart(self, slot: _Slot) -> None:
        """Single flight per worker. A restart that fails leaves the worker out; the next `score` tries again."""
        assert self._restart_worker is not None, "only then a worker is marked lost"
        if slot.restarting:
            return
        slot.restarting = True
        try:
            async with deadline(self._call_timeout_s, f"restarting reward worker {slot.name!r}"):
                slot.worker = await self._restart_worker(slot.name)
        except (ReplicaLostError, DeadlineError) as error:
            if self._on_lost is not None:
                self._on_lost(slot.name, error)
            if all(other.lost for other in self._slots):
                raise
            return
        finally:
            slot.restarting = False
        slot.lost = False
        self._dispatch.resize(self._dispatch.limit + self._slots_per_worker)

    def _queue_timeout_s(self, generations: int) -> float:
        """The longest that a full pool can take before a newcomer's turn, if every call runs into its deadline.

        Every rollout makes at most two calls, and one worker may have to be restarted before it.
        """
        return generations * self._call_timeout_s * (2 * (self._capacity // self._slots_per_worker + 1) + 1)

    def _states(self) -> str:
        return ", ".join(f"{slot.name}: {'lost' if slot.lost else f'{slot.running} running'}" for slot in self._slots)

    def _count(self, verdict: Verdict) -> None:
        self._seconds += verdict.seconds
        if verdict.failure is None:
            self._scored += 1
        else:
            self._failures[verdict.failure] += 1
