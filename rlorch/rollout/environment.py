"""What a policy acts in: a game, a tool, a simulated user."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlorch.render import Message
from rlorch.types import Rollout


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment says, in one of three forms, and what it thinks of the turn.

    `messages` go through the chat template, `text` is tokenised as it is, `tokens` are taken as they are. `reward`
    is for the turn just taken; an episode's score is the sum of them, and an environment that never gives one
    leaves the scoring to the reward plug-ins. `done` ends the episode.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    tokens: tuple[int, ...] = ()
    done: bool = False
    reward: float | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.messages, self.text, self.tokens))) > 1:
            raise ValueError("an observation is messages, text or tokens; this one has more than one of them")


class Environment(Protocol):
    """One episode. A fresh one is made for every rollout; errors become the rollout's failure verdict."""

    async def reset(self, row: Mapping[str, Any]) -> Observation:
        """Begin. Messages replace the prompt; text or tokens follow it; an empty observation leaves it alone."""
        ...

    async def step(self, completion: str, rollout: Rollout) -> Observation:
        """Answer a turn of the policy: its decoded text, and the rollout so far (this turn is its last).

        It is called after every turn, also one that was cut off (`rollout.finish_reason` is then "length", and the
        episode ends whatever is returned).
        """
        ...

    async def close(self) -> None:
        """Release what the episode holds. Called once, also after errors and cancellation."""
        ...
