"""All replicas' syncers together: which version everybody serves, and a way to hold it in place.

`committed_everywhere` is the minimum over routable replicas, which is what bounds staleness: a group admitted when it
is v is sampled with v or newer. It never goes back, because a replica becomes routable only at the head
(`rlorch.weights.syncer`); a replica that is lost or re-seeding does not count, and when none is routable it stays.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from rlorch.aio import Watched, deadline
from rlorch.errors import InvariantError, RlorchError
from rlorch.ports import Sampler, WeightStore
from rlorch.specs import WeightsSpec
from rlorch.types import Manifest
from rlorch.weights.gate import Gate
from rlorch.weights.syncer import GATE_TIMEOUT_S, Syncer


class SyncGroup:
    """The syncers of one run, by replica name.

    `routable` names the replicas that may get requests. `uniform` is the version that all of them hold, None while
    they differ or there are none. `committed_everywhere` is -1 before the first replica is routable. `lost` holds the
    error of each replica whose syncing ended; joining its name again clears it.
    """

    def __init__(
        self,
        store: WeightStore,
        spec: WeightsSpec,
        head: Watched[Manifest | None],
        *,
        gate: Gate | None = None,
        gate_timeout_s: float = GATE_TIMEOUT_S,
    ) -> None:
        self.gate = gate or Gate()
        self.committed_everywhere: Watched[int] = Watched(-1)
        self.uniform: Watched[int | None] = Watched(None)
        self.routable: Watched[frozenset[str]] = Watched(frozenset[str]())
        self.lost: Watched[Mapping[str, RlorchError]] = Watched({})
        self._store = store
        self._spec = spec
        self._head = head
        self._gate_timeout_s = gate_timeout_s
        self._syncers: dict[str, Syncer] = {}

    @property
    def syncers(self) -> Mapping[str, Syncer]:
        """By replica name."""
        return self._syncers

    def join(self, name: str, sampler: Sampler) -> Syncer:
        """Make the syncer of a new or restarted replica; the caller runs its `run()` in a TaskGroup.

        Raises:
            ValueError: a replica of that name is being synced.
        """
        if name in self._syncers and self._syncers[name].lost.value is None:
            raise ValueError(f"replica {name!r} is already synced: it must be lost, or leave, before it joins again")
        syncer = Syncer(
            name,
            sampler,
            self._store,
            self.gate,
            self._spec,
            self._head,
            on_change=self._refresh,
            gate_timeout_s=self._gate_timeout_s,
        )
        self._syncers[name] = syncer
        self._refresh()
        return syncer

    def leave(self, name: str) -> None:
        """Forget a replica; the caller ends its `run()`. Unknown names are ignored."""
        self._syncers.pop(name, None)
        self._refresh()

    @asynccontextmanager
    async def pinned(self, who: str, timeout_s: float) -> AsyncGenerator[int]:
        """Hold all routable replicas at one version, which it yields, as an evaluation needs.

        Raises:
            DeadlineError: the replicas did not meet at one version within `timeout_s`.
        """
        what = f"{who}: the replicas {sorted(self.routable.value)} do not meet at one version; look at their syncers"
        async with deadline(timeout_s, what):
            version, pin = await self._pin(who, timeout_s)
        async with pin:
            yield version

    async def _pin(self, who: str, timeout_s: float) -> tuple[int, AsyncExitStack]:
        while True:
            await self.uniform.until(lambda version: version is not None)
            async with AsyncExitStack() as attempt:
                await attempt.enter_async_context(self.gate.pin(who, timeout_s))
                version = self.uniform.value
                if version is not None:  # no commit is under way, so it stays so
                    return version, attempt.pop_all()

    def _refresh(self) -> None:
        lost = {name: error for name, s in self._syncers.items() if (error := s.lost.value) is not None}
        if lost != self.lost.value:
            self.lost.set(lost)
        serving = {name: version for name, s in self._syncers.items()
                   if s.routable.value and (version := s.committed.value) is not None}  # fmt: skip
        if self.routable.value != serving.keys():
            self.routable.set(frozenset(serving))
        versions = set(serving.values())
        self.uniform.set(versions.pop() if len(versions) == 1 else None)
        if not serving:
            return
        everywhere = min(serving.values())
        if everywhere < self.committed_everywhere.value:
            raise InvariantError(
                f"the version committed everywhere went back from {self.committed_everywhere.value} to {everywhere}: "
                f"{serving}; a replica became routable before it reached the head"
            )
        if everywhere > self.committed_everywhere.value:
            self.committed_everywhere.set(everywhere)
