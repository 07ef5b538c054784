"""An environment of your own: the policy guesses a number and is told higher or lower.

One object is one episode. `step` gets what the policy said in its last turn and answers with text, chat messages or
tokens; what it returns is appended to the tokens that were sampled. A reward may come with any turn; the episode's
score is their sum. An exception here does not end the run: the rollout gets the failure verdict `environment`.

    rlorch train examples/guess_number.yaml

The dataset row holds the secret: {"prompt": "Guess a number from 1 to 100.", "secret": 37}.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlorch.rollout import Observation
from rlorch.types import Rollout

MAX_GUESSES = 7
"""Halving finds one number in 100 with 7 guesses."""


class GuessNumber:
    """1 for the right number, less 0.1 for every guess before it; 0 when the guesses run out."""

    def __init__(self) -> None:
        self._secret = 0
        self._guesses = 0

    async def reset(self, row: Mapping[str, Any]) -> Observation:
        """Learn the secret; the prompt of the row stays as it is."""
        self._secret = int(row["secret"])
        return Observation()

    async def step(self, completion: str, rollout: Rollout) -> Observation:
        """Compare the last number that the policy named."""
        self._guesses += 1
        numbers = re.findall(r"\d+", completion)
        if numbers and int(numbers[-1]) == self._secret:
            return Observation(done=True, reward=1.0 - 0.1 * (self._guesses - 1))
        if self._guesses == MAX_GUESSES:
            return Observation(done=True, reward=0.0)
        if not numbers:
            return _reply("Name a number.")
        return _reply("Higher." if int(numbers[-1]) < self._secret else "Lower.")

    async def close(self) -> None:
        """Nothing is held."""


def _reply(text: str) -> Observation:
    return Observation(messages=({"role": "user", "content": text},))
