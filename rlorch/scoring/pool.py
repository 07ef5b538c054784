"""The reward pool: N reward workers behind one call.

`score(rollouts)` waits for a free slot (first come, first served), gives the rollouts to the worker with the least
running, and returns them with their verdicts. A quick plug-in gets a whole group in one call; one whose group would
take longer than `SPLIT_ABOVE_S` has it shared out over the workers. A plug-in that fails is a verdict, never an
error. A worker that is lost (`ReplicaLostError`, or no answer within `call_timeout_s`) is reported, taken out of
dispatch and restarted; its call goes to another worker once, and its rollouts are then the failure `crash`.

Invariants: at most `slots_per_worker` calls are with a worker; every wait ends when no call has ended for longer than
the longest one can take; cancelling `score` frees its slot.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from rlorch.aio import Limiter, deadline
from rlorch.errors import DeadlineError, ReplicaLostError, RlorchError
from rlorch.ports import RewardWorker
from rlorch.specs import RewardSpec
from rlorch.types import FailureKind, Rollout, Verdict

SPLIT_ABOVE_S = 0.05
"""Expected seconds of a group above which it is shared out: a call to a worker costs about a millisecond."""

# Seconds per rollout; more than `call_timeout_s` of the default RewardSpec.
ROLLOUT_TIMEOUT_S = 600.0

Restart = Callable[[str], Awaitable[RewardWorker]]
OnLost = Callable[[str, Exception], None]


def call_timeout_s(spec: RewardSpec, num_rollouts: int) -> float:
    """The longest that one call of `num_rollouts` to a worker of `spec` can take, in seconds, with 10 to spare.

    A cancelled rollout may use up its budget first, and the process may have to be started; then each rollout may use
    up its own and need another process for the next.
    """
    return (num_rollouts + 1) * (spec.timeout_s + spec.start_timeout_s) + 10.0


def default_call_timeout_s(num_rollouts: int) -> float:
    """Longest time of a call of `num_rollouts`, in seconds, for workers with the default budgets."""
    return num_rollouts * ROLLOUT_TIMEOUT_S


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
    """A worker's place in the pool: `calls` are with it, of `running` rollouts."""

    name: str
    worker: RewardWorker
    calls: int = 0
    running: int = 0
    lost: bool = False
    restarting: bool = False


class RewardPool:
    """Dispatches groups of rollouts to reward workers."""

    def __init__(
        self,
        workers: Mapping[str, RewardWorker],
        *,
        call_timeout_s: Callable[[int], float] = default_call_timeout_s,
        restart: Restart | None = None,
        on_lost: OnLost | None = None,
        slots_per_worker: int = 1,
    ) -> None:
        """A pool of at least one worker.

        Args:
            workers: by name.
            call_timeout_s: longest time of a call of so many rollouts, in seconds; what a worker may need is
                `partial(call_timeout_s, spec)`.
            restart: starts a lost worker again by its name (`Runtime.reward_worker`), within the time of a call of
                one rollout. None: a worker that is lost stays out.
            on_lost: told the name and the error of every loss.
            slots_per_worker: calls that one worker holds at a time.
        """
        if not workers or slots_per_worker < 1:
            raise ValueError(f"a pool needs workers ({len(workers)}) and slots ({slots_per_worker})")
        self._slots = [_Slot(name, worker) for name, worker in workers.items()]
        self._slots_per_worker = slots_per_worker
        self._call_timeout_s = call_timeout_s
        self._restart_worker = restart
        self._on_lost = on_lost
        self._queued = 0
        self._dispatch = Limiter(len(workers) * slots_per_worker)
        self._scored = 0
        self._failures: Counter[FailureKind] = Counter()
        self._lost = 0
        self._ended_calls = 0
        self._seconds = 0.0

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
        """The rollouts with their verdicts, in the order given.

        Raises:
            DeadlineError: no worker became free, and none ended a call, for longer than two calls can take.
            ReplicaLostError: every worker is lost and none could be restarted.
            UserError: a worker that was restarted cannot load its plug-ins.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for slot in self._slots:
                    if slot.lost:
                        group.create_task(self._restart(slot), name=f"restart {slot.name}")
                verdicts = await self._score(rollouts, group) if rollouts else ()
        except ExceptionGroup as errors:
            known, others = errors.split(RlorchError)
            if known is None or others is not None:
                raise
            raise known.exceptions[0] from errors  # callers act on the type; the first one cancelled the rest
        return tuple(replace(rollout, verdict=verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True))

    def view(self) -> RewardPoolView:
        """The pool's numbers now."""
        finished = self._scored + sum(self._failures.values())
        return RewardPoolView(
            workers=len(self._slots),
            available=sum(not slot.lost for slot in self._slots),
            running=sum(slot.running for slot in self._slots),
            queued=self._queued,
            scored=self._scored,
            failures=dict(self._failures),
            lost=self._lost,
            mean_s=self._seconds / finished if finished else 0.0,
        )

    async def _score(self, rollouts: Sequence[Rollout], group: asyncio.TaskGroup) -> tuple[Verdict, ...]:
        tasks = [group.create_task(self._score_part(part, group)) for part in self._shared_out(rollouts)]
        return tuple([verdict for task in tasks for verdict in await task])

    def _shared_out(self, rollouts: Sequence[Rollout]) -> list[Sequence[Rollout]]:
        """The rollouts in order, as one part for each call: parts differ by one rollout at most."""
        if self.view().mean_s * len(rollouts) <= SPLIT_ABOVE_S:
            return [rollouts]
        count = min(len(rollouts), max(1, sum(not slot.lost for slot in self._slots)))
        cuts = [len(rollouts) * i // count for i in range(count + 1)]
        return [rollouts[start:stop] for start, stop in pairwise(cuts)]

    async def _score_part(self, rollouts: Sequence[Rollout], group: asyncio.TaskGroup) -> tuple[Verdict, ...]:
        verdicts = await self._attempt(rollouts, group)
        if isinstance(verdicts, Exception):
            verdicts = await self._attempt(rollouts, group)
        if isinstance(verdicts, Exception):
            detail = f"two reward workers in a row were lost with the rollout's group: {verdicts}"
            verdicts = (Verdict(failure="crash", detail=detail),) * len(rollouts)
        for verdict in verdicts:
            self._count(verdict)
        return verdicts

    async def _attempt(self, rollouts: Sequence[Rollout], group: asyncio.TaskGroup) -> tuple[Verdict, ...] | Exception:
        """One try; the error where the worker was lost."""
        slot = await self._free_slot(rollouts)
        what = f"reward worker {slot.name!r} scoring {len(rollouts)} rollouts of group {rollouts[0].group_id}"
        try:
            async with deadline(self._call_timeout_s(len(rollouts)), what):
                return await slot.worker.score(rollouts)
        except (ReplicaLostError, DeadlineError) as error:
            self._lose(slot, error, group)
            return error
        finally:
            self._ended_calls += 1
            slot.calls -= 1
            slot.running -= len(rollouts)
            self._dispatch.release()

    async def _free_slot(self, rollouts: Sequence[Rollout]) -> _Slot:
        """The least busy worker, with this call counted in."""
        self._queued += len(rollouts)
        try:
            while True:
                await self._wait_for_place(rollouts)
                free = [slot for slot in self._slots if not slot.lost and slot.calls < self._slots_per_worker]
                if free:
                    slot = min(free, key=lambda slot: slot.running)
                    slot.calls += 1
                    slot.running += len(rollouts)
                    return slot
                self._dispatch.release()  # its worker was lost after it had been granted; the limit is lower now
        finally:
            self._queued -= len(rollouts)

    async def _wait_for_place(self, rollouts: Sequence[Rollout]) -> None:
        """For as long as calls keep ending: each ends within its `call_timeout_s`."""
        while True:
            ended = self._ended_calls
            states = ", ".join(f"{s.name}: {'lost' if s.lost else f'{s.running} running'}" for s in self._slots)
            what = f"group {rollouts[0].group_id}: no reward worker became free; they were {states}"
            longest = max(len(rollouts), *(slot.running for slot in self._slots))
            try:
                async with deadline(2 * self._call_timeout_s(longest), what):
                    return await self._dispatch.acquire()
            except DeadlineError:
                if ended == self._ended_calls:
                    raise

    def _lose(self, slot: _Slot, error: Exception, group: asyncio.TaskGroup) -> None:
        """Report it and take it out; a worker that answers nothing at once would otherwise draw every rollout."""
        self._lost += 1
        if self._on_lost is not None:
            self._on_lost(slot.name, error)
        if not slot.lost:
            slot.lost = True
            self._dispatch.resize(self._dispatch.limit - self._slots_per_worker)
            group.create_task(self._restart(slot), name=f"restart {slot.name}")

    async def _restart(self, slot: _Slot) -> None:
        """Single flight per worker. A restart that fails leaves the worker out; the next `score` tries again."""
        if slot.restarting:
            return
        slot.restarting = True
        try:
            if self._restart_worker is None:
                raise ReplicaLostError(f"reward worker {slot.name!r} is lost and nothing restarts it")
            async with deadline(self._call_timeout_s(1), f"restarting reward worker {slot.name!r}"):
                slot.worker = await self._restart_worker(slot.name)
        except (ReplicaLostError, DeadlineError) as error:
            if all(other.lost for other in self._slots):
                raise ReplicaLostError(f"no reward worker is left; the last: {error}") from error
            if self._on_lost is not None and self._restart_worker is not None:
                self._on_lost(slot.name, error)
            return
        finally:
            slot.restarting = False
        slot.lost = False
        self._dispatch.resize(self._dispatch.limit + self._slots_per_worker)

    def _count(self, verdict: Verdict) -> None:
        self._seconds += verdict.seconds
        if verdict.failure is None:
            self._scored += 1
        else:
            self._failures[verdict.failure] += 1
