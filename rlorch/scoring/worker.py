"""The reward worker: a child process under a time and memory budget, replaced whenever it exceeds one.

Per call: wait for an idle process, send it all rollouts at once, and take the verdicts as they come. The budget is per
rollout: it starts anew with each verdict, so neither start-up nor an earlier rollout counts against it. On expiry the
process and all its descendants are killed with SIGKILL, and the verdict is the failure `timeout`; a process that ends
by itself is a `crash`; one that ran out of memory is replaced, because its state cannot be trusted. The rollouts that
have no verdict yet go to the next process.

From the first kill on, a second process is kept loaded, so that the next kill costs no start-up.

Invariants: the process runs one rollout at a time, in order; every wait has a deadline; a cancelled `score` leaves
the worker usable (the rollout that runs may use up its budget, the rest is dropped); nothing that a plug-in does
raises out of `score`.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rlorch.aio import deadline
from rlorch.errors import DeadlineError, PluginError, ReplicaLostError, RlorchError, ShadowedPackageError
from rlorch.scoring.process import KILL_GRACE_S, RewardProcess
from rlorch.scoring.wire import Message, PackedRollout, pack_rollouts, verdict_from_json
from rlorch.specs import RewardSpec
from rlorch.types import Rollout, Verdict

# A process that ends while idle is replaced; twice in a row is not bad luck.
_MAX_STARTS = 2


class ProcessRewardWorker:
    """The RewardWorker port over a child process; `async with`, or `start` and `close`."""

    def __init__(self, spec: RewardSpec, *, name: str = "reward", log: Path | None = None) -> None:
        """`log` is the file that gets what plug-ins print; default: this process's stderr."""
        self._spec = spec
        self._name = name
        self._log = log
        self._turn = asyncio.Lock()
        self._process: RewardProcess | None = None
        self._spare: RewardProcess | None = None
        self._dying: set[RewardProcess] = set()
        self._closed = False

    async def start(self) -> None:
        """Start the process and load the plug-ins.

        Raises:
            PluginError: a plug-in cannot be loaded, or the process ended while loading.
            DeadlineError: loading took longer than `start_timeout_s`.
        """
        async with self._turn:
            await self._loaded()

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        """See `RewardWorker.score`. Concurrent calls take turns, in order.

        Raises:
            ReplicaLostError: the process could not be restarted, or the worker is closed.
        """
        packed = pack_rollouts(rollouts)
        left = [one for one in packed if isinstance(one, PackedRollout)]
        verdicts: list[Verdict] = []
        async with self._turn:
            while len(verdicts) < len(left):
                process = await self._ready()
                verdicts += await self._ask(process, left[len(verdicts) :])
        in_order = iter(verdicts)
        return tuple(one if isinstance(one, Verdict) else next(in_order) for one in packed)

    async def close(self) -> None:
        """Kill the processes and wait until they are gone, a few seconds at most. Idempotent."""
        self._closed = True
        for process in (self._process, self._spare):
            if process is not None:
                self._retire(process)
        self._process = self._spare = None
        for process in tuple(self._dying):
            what = f"reward worker {self._name!r}: its process does not end after SIGKILL; look for stuck I/O"
            async with deadline(2 * KILL_GRACE_S, what):
                await asyncio.shield(process.gone)

    async def __aenter__(self) -> "ProcessRewardWorker":
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, process: RewardProcess, packed: Sequence[PackedRollout]) -> list[Verdict]:
        """The verdicts of the first of `packed`: of all, or up to the one that the process did not survive."""
        verdicts: list[Verdict] = []
        budget = _Budget(process, self._spec.timeout_s)

        def heard(message: Message) -> bool:
            if "term" in message:
                budget.begin_term(message["term"])
                return True
            verdicts.append(verdict_from_json(message["verdict"]))
            budget.begin_rollout()
            return verdicts[-1].failure != "memory"

        try:
            async with budget.scope:
                budget.begin_rollout()
                if await process.ask(packed, heard):
                    return verdicts
        except TimeoutError:
            verdicts.append(budget.timeout())
        else:
            if not verdicts or verdicts[-1].failure != "memory":
                verdicts.append(budget.crash(process.gone.result()))
        await self._replace(process)
        return verdicts

    async def _ready(self) -> RewardProcess:
        try:
            return await self._loaded()
        except ReplicaLostError:
            raise
        except RlorchError as error:
            raise ReplicaLostError(f"reward worker {self._name!r} cannot be restarted: {error}") from error

    async def _loaded(self) -> RewardProcess:
        """A process that is loaded and idle: the present one, the spare, or a new one."""
        for _ in range(_MAX_STARTS):
            self._check_open()
            if self._process is None or self._process.gone.done():
                self._process, self._spare = self._spare, None
            if self._process is None or self._process.gone.done():
                self._process = await self._spawn()
            process = self._process
            try:
                await self._wait_until_loaded(process)
                await self._wait_until_idle(process)
            except (PluginError, ShadowedPackageError, DeadlineError):
                self._retire(process)
                self._process = None
                raise
            if process.idle:
                return process
        raise ReplicaLostError(f"reward worker {self._name!r}: its process keeps ending while idle")

    async def _wait_until_loaded(self, process: RewardProcess) -> None:
        plugins = ", ".join(term.plugin for term in self._spec.terms)
        left_s = process.spawned_at + self._spec.start_timeout_s - asyncio.get_running_loop().time()
        what = (
            f"reward worker {self._name!r}: loading {plugins} takes longer than rewards.start_timeout_s="
            f"{self._spec.start_timeout_s:g}; make the import faster or raise it"
        )
        async with deadline(max(left_s, 0.0), what):
            message = await asyncio.shield(process.loaded)
        if message is None:
            raise PluginError(
                f"reward worker {self._name!r}: the process {process.gone.result()} while loading {plugins}; "
                f"its output is in {self._log or 'stderr'}"
            )
        if "error" in message:
            kind = ShadowedPackageError if message["kind"] == "ShadowedPackageError" else PluginError
            raise kind(message["error"])

    async def _wait_until_idle(self, process: RewardProcess) -> None:
        """Let a cancelled caller's rollout use up its budget, no more."""
        try:
            async with asyncio.timeout_at(process.busy_until):
                await process.settled()
        except TimeoutError:
            await self._replace(process)

    async def _replace(self, process: RewardProcess) -> None:
        """Kill, put the spare in its place, and start a new spare; none of them is waited for."""
        self._retire(process)
        self._process, self._spare = self._spare, None
        if self._process is None:
            self._process = await self._spawn()
        self._spare = await self._spawn()

    async def _spawn(self) -> RewardProcess:
        self._check_open()
        try:
            process = await RewardProcess.spawn(self._spec, self._log)
        except OSError as error:
            raise ReplicaLostError(f"reward worker {self._name!r}: no process can be started: {error}") from error
        if self._closed:  # while the process was being started
            self._retire(process)
        self._check_open()
        return process

    def _check_open(self) -> None:
        if self._closed:
            raise ReplicaLostError(f"reward worker {self._name!r} is closed")

    def _retire(self, process: RewardProcess) -> None:
        if not process.gone.done():
            self._dying.add(process)
            process.gone.add_done_callback(lambda _: self._dying.discard(process))
            process.kill()


class _Budget:
    """What a process may take for the rollout that it runs, and for the term in it where that has less."""

    def __init__(self, process: RewardProcess, timeout_s: float) -> None:
        loaded = process.loaded.result()
        assert loaded is not None, "idle"
        self.scope = asyncio.timeout_at(None)
        self._process = process
        self._timeout_s = timeout_s
        self._terms = [(term["name"], min(term["timeout_s"] or timeout_s, timeout_s)) for term in loaded["ready"]]
        self._loop = asyncio.get_running_loop()
        self._started = 0.0
        self._term = 0

    def begin_rollout(self) -> None:
        """The next rollout has the whole budget."""
        self._started = self._loop.time()
        self.begin_term(0)

    def begin_term(self, term: int) -> None:
        """The term has its own budget, within what is left of the rollout's."""
        self._term = term
        until = min(self._started + self._timeout_s, self._loop.time() + self._terms[term][1])
        self._process.busy_until = until
        if not self.scope.expired():
            self.scope.reschedule(until)

    def timeout(self) -> Verdict:
        """The verdict of a rollout that used it up."""
        name, budget_s = self._terms[self._term]
        detail = f"{name}: no score within {budget_s:g} s; its process was killed"
        return Verdict(failure="timeout", detail=detail, seconds=self._loop.time() - self._started)

    def crash(self, end: str) -> Verdict:
        """The verdict of a rollout during which the process came to its `end`."""
        detail = f"{self._terms[self._term][0]}: its process {end}"
        return Verdict(failure="crash", detail=detail, seconds=self._loop.time() - self._started)
