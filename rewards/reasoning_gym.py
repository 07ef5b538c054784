"""Tasks of reasoning_gym, scored by the task itself."""

import warnings
from collections.abc import Callable
from typing import Any

from rlorch.errors import PluginError
from rlorch.scoring import Rollout, reward

from ._row import field

# They compare boards as tuples of tuples, and a row that was JSON has lists: the right answer would get 0.05. The other
# tasks of reasoning_gym 0.1.25 score a row that was JSON as they score the original.
_TUPLE_BOARDS = frozenset({"arc_agi", "rearc"})


@reward(name="reasoning_gym")
class ReasoningGym:
    """The task's `score_answer` of the completion, 0 to 1.

    The row is an entry as reasoning_gym made it (`question`, `answer`, `metadata`) and says its task in `task` or
    `metadata.source_dataset`.

    Options:
        task: the task of all rows; default: what the row says.
        threshold: 1 where the score is at least this, else 0. Partial credit teaches partial answers: some tasks give
            it for single letters. Default: the score as it is.
        require_eos: 0 where the completion did not end by itself (it ran into the token limit).
        strip: ignore white space around the completion.

    Needs the extra `reasoning-gym`.
    """

    def __init__(
        self,
        *,
        task: str | None = None,
        threshold: float | None = None,
        require_eos: bool = False,
        strip: bool = True,
    ) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a dependency of it has invalid escapes and `is` with literals
                from reasoning_gym import get_score_answer_fn
        except ImportError as error:
            raise PluginError(
                f"the reward 'reasoning_gym' needs reasoning-gym ({error}): pip install 'rlorch[reasoning-gym]'"
            ) from error
        self._score_fn_of = get_score_answer_fn
        self._score_fns: dict[str, Callable[..., float]] = {}
        self._task = task
        self._threshold = threshold
        self._require_eos = require_eos
        self._strip = strip
        if task is not None:
            self._score_fn(task)

    def __call__(self, rollout: Rollout) -> float:
        """Score one rollout."""
        if self._require_eos and rollout.finish_reason != "stop":
            return 0.0
        row = dict(rollout.row)
        answer = rollout.completion.strip() if self._strip else rollout.completion
        task = self._task or _task_of(rollout)
        if task in _TUPLE_BOARDS:
            row["metadata"] = {**row["metadata"], "output": tuple(map(tuple, row["metadata"]["output"]))}
        score = _checked_score(self._score_fn(task), answer, row)
        return score if self._threshold is None else float(score >= self._threshold)

    def _score_fn(self, task: str) -> Callable[..., float]:
        if task not in self._score_fns:
            try:
                self._score_fns[task] = self._score_fn_of(task)
            except ValueError as error:
                raise PluginError(f"reasoning_gym has no task {task!r}: {error}") from error
        return self._score_fns[task]


def _checked_score(score_fn: Callable[..., float], answer: str, row: dict[str, Any]) -> float:
    """The task's score; 0 where the task cannot read the answer though it can read the right one.

    Some tasks (prime_factorization) raise on a malformed answer: that is a wrong answer. A task that raises on its own
    answer has a broken row, and that stays an error.
    """
    try:
        return float(score_fn(answer=answer, entry=row))
    except Exception:
        score_fn(answer=row.get("answer"), entry=row)
        return 0.0


def _task_of(rollout: Rollout) -> str:
    metadata: Any = rollout.row.get("metadata")
    source = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    return str(rollout.row.get("task") or source or field(rollout, "task"))
