"""The completion has the form that a regular expression describes."""

import re

from rlorch.scoring import Rollout, reward

THINK_ANSWER = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"


@reward(name="format")
class Format:
    """1 where the pattern matches, else 0.

    Options:
        pattern: a Python regular expression; `.` matches newlines too. Default: <think>..</think><answer>..</answer>.
        whole: it has to match the whole completion; false: anywhere in it.

    A pattern that backtracks without end runs into the worker's time budget and is the failure `timeout`.
    """

    def __init__(self, *, pattern: str = THINK_ANSWER, whole: bool = True) -> None:
        compiled = re.compile(pattern, re.DOTALL)
        self._match = compiled.fullmatch if whole else compiled.search

    def __call__(self, rollout: Rollout) -> float:
        """Score one rollout."""
        return float(self._match(rollout.completion) is not None)
