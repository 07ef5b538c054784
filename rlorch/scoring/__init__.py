"""Reward plug-ins, the killable worker that runs them, and advantages.

What a plug-in's author needs is here: `reward`, `Rollout`, `Verdict`.
"""

from rlorch.scoring.plugin import reward
from rlorch.types import Rollout, Verdict

__all__ = ["Rollout", "Verdict", "reward"]
