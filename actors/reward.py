"""A reward worker as a Ray actor: it owns a child process that it can kill, wherever in the cluster it runs."""

from collections.abc import Sequence

import ray

from rlorch.scoring.pool import call_timeout_s
from rlorch.scoring.worker import ProcessRewardWorker
from rlorch.specs import RewardSpec, RuntimeSpec
from rlorch.types import Rollout, Verdict

from .process import prepare
from .remote import Remote


@ray.remote
class RewardActor:
    """Hosts a `ProcessRewardWorker`."""

    async def start(self, name: str, spec: RuntimeSpec) -> None:
        """Start the child process and load its plug-ins."""
        if spec.rewards is None:
            raise ValueError("this runtime was given no rewards")
        prepare(name, spec.run_dir, threads=1)
        self._role = ProcessRewardWorker(spec.rewards)
        await self._role.start()

    async def score(self, rollouts: tuple[Rollout, ...]) -> tuple[Verdict, ...]:
        """One hop for all rollouts of a call."""
        return await self._role.score(rollouts)

    async def close(self) -> None:
        """End the child process."""
        await self._role.close()


class RayRewardWorker:
    """The RewardWorker port over a `RewardActor`.

    The worker keeps the budget of each rollout by itself; the deadline here covers the call and restarts in it.
    """

    def __init__(self, remote: Remote, spec: RewardSpec) -> None:
        self._remote = remote
        self._spec = spec

    async def score(self, rollouts: Sequence[Rollout]) -> tuple[Verdict, ...]:
        """See `RewardWorker.score`."""
        timeout_s = call_timeout_s(self._spec, len(rollouts))
        return await self._remote.call("score", tuple(rollouts), timeout_s=timeout_s)
