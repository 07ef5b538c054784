"""The completion is mathematically equal to the answer, by math-verify."""

import logging
import re

from rlorch.errors import PluginError
from rlorch.scoring import Rollout, reward

from ._row import field

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")


@reward(name="math")
class Math:
    r"""1 where the last expression of the completion equals the row's answer, else 0.

    The answer may be a number, an expression or LaTeX, with or without `$`. An answer that cannot be parsed is a
    failure, because no completion could be right. Nothing here sets alarms: a comparison that does not end is ended
    by the worker's time budget.

    Options:
        answer: the row's field that holds the answer.

    Needs the extra `math`.
    """

    def __init__(self, *, answer: str = "answer") -> None:
        try:
            from math_verify import parse, verify
        except ImportError as error:
            raise PluginError(f"the reward 'math' needs math-verify ({error}): pip install 'rlorch[math]'") from error
        # It warns that it sets no alarms; that is meant, the worker's time budget is the alarm.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._parse, self._verify = parse, verify
        verify(parse("$1$", parsing_timeout=0), parse("$1$", parsing_timeout=0), timeout_seconds=None)  # warm: 1 s
        self._answer = answer

    def __call__(self, rollout: Rollout) -> float:
        """Score one rollout."""
        answer = str(field(rollout, self._answer))
        wanted = self._parse(answer if _DELIMITED.search(answer) else f"${answer}$", parsing_timeout=0)
        if not wanted:
            raise ValueError(
                f"the answer {answer!r} of prompt {rollout.prompt.ordinal} is not a mathematical expression"
            )
        got = self._parse(rollout.completion, parsing_timeout=0)
        return float(bool(got) and self._verify(wanted, got, timeout_seconds=None))
