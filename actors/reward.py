"""A reward worker as a Ray actor: it owns a child process that it can kill, wherever in the cluster it runs."""

import ray

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

    async def score(self, rollout: Rollout) -> Verdict:
        """One hop."""
        return await self._role.score(rollout)

    async def close(self) -> None:
        """End the child process."""
        await self._role.close()


class RayRewardWorker:
    """The RewardWorker port over a `RewardActor`.

    The worker keeps the budget of one rollout by itself; the deadline here covers its queue and a restart.
    """

    def __init__(self, remote: Remote, spec: RewardSpec) -> None:
        self._remote = remote
        self._timeout_s = 2 * spec.timeout_s + 2 * spec.start_timeout_s

    async def score(self, rollout: Rollout) -> Verdict:
        """See `RewardWorker.score`."""
        return await self._remote.call("score", rollout, timeout_s=self._timeout_s)
