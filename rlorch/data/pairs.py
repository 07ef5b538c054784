"""Preference pairs from the row formats that are in use: a prompt, a chosen answer and a rejected one.

    prompt, chosen, rejected                              answers as text, messages, or {"messages": [...]}
    prompt, preferred, non_preferred                      the same; also preferred_output, non_preferred_output
    prompt, samples: [{completion or messages, score}]    the best against the worst; also {"evals": {"score": ...}}

The prompt is text, messages or `input`: {"messages": [...]}; where there is none, it is what both conversations begin
with. Answers given as whole conversations lose the prompt that they repeat.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlorch.data.rows import Row, shown
from rlorch.errors import DataError

ANSWER_FIELDS = (
    ("chosen", "rejected"),
    ("preferred", "non_preferred"),
    ("preferred_output", "non_preferred_output"),
)
"""(better, worse), by the names that data sets use."""

Messages = list[Any]


def preference_pair(row: Row, where: str, prompt_field: str = "prompt") -> Row | None:
    """A row as {`prompt_field`, `chosen`, `rejected`}: all text, or the answers (and then the prompt) messages.

    Returns:
        The pair, or None where neither answer is preferred: equal answers, or samples of equal scores.

    Raises:
        DataError: none of the formats, or a field that does not fit; names the place.
    """
    chosen, rejected = _answers(row, where)
    prompt = _prompt(row, where, prompt_field)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise DataError(f"{where}: answers that are text need a prompt; there is no field {prompt_field!r}")
        return None if chosen == rejected else {prompt_field: prompt, "chosen": chosen, "rejected": rejected}
    first, second = (_messages(answer) for answer in (chosen, rejected))
    if prompt is None:
        shared = _shared(first, second)
        prompt, first, second = first[:shared], first[shared:], second[shared:]
    else:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        first, second = _after(prompt, first), _after(prompt, second)
    if not prompt or not first or not second:
        raise DataError(f"{where}: no prompt that both answers follow: give a field {prompt_field!r}, or conversations")
    return None if first == second else {prompt_field: prompt, "chosen": first, "rejected": second}


def _answers(row: Row, where: str) -> tuple[str | Messages, str | Messages]:
    """The better and the worse answer."""
    for better, worse in ANSWER_FIELDS:
        if better in row and worse in row:
            return _answer(row[better], f"{where}: {better}"), _answer(row[worse], f"{where}: {worse}")
    if "samples" not in row:
        names = " or ".join(f"{better}/{worse}" for better, worse in ANSWER_FIELDS)
        raise DataError(
            f"{where}: no preference: the row needs {names}, or samples with scores; it has "
            f"{', '.join(map(repr, row)) or 'none'}"
        )
    samples = row["samples"]
    if not isinstance(samples, list) or len(samples) < 2 or not all(isinstance(s, Mapping) for s in samples):
        raise DataError(f"{where}: samples must be a list of at least two objects with a score, not {shown(samples)}")
    scores = [_score(sample, f"{where}: samples[{index}]") for index, sample in enumerate(samples)]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return tuple(_answer(_said(samples[i]), f"{where}: samples[{i}]") for i in (best, worst))  # type: ignore[return-value]


def _said(sample: Mapping[str, Any]) -> Any:
    return next((sample[name] for name in ("messages", "completion", "text", "content") if name in sample), sample)


def _score(sample: Mapping[str, Any], where: str) -> float:
    evals = sample.get("evals")
    score = sample.get("score", evals.get("score") if isinstance(evals, Mapping) else None)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"{where} needs a finite 'score', not {shown(score)}")
    return float(score)


def _answer(value: Any, where: str) -> str | Messages:
    """Text that is not empty, or messages."""
    if isinstance(value, Mapping):
        value = [value] if "role" in value else value.get("messages")
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return value
    raise DataError(f"{where} must be text or messages (role, content), not {shown(value)}")


def _prompt(row: Row, where: str, field: str) -> str | Messages | None:
    name = field if field in row else "input"
    return _answer(row[name], f"{where}: {name}") if row.get(name) is not None else None


def _messages(answer: str | Messages) -> Messages:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _after(prompt: Messages, answer: Messages) -> Messages:
    """The answer without the prompt, where it repeats it."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Messages at the beginning that are the same in both, the last of either excepted."""
    longest = min(len(first), len(second)) - 1
    return next((index for index in range(longest) if first[index] != second[index]), longest)
