"""What the policy sampled, as an assistant message: text and tool calls.

Tool calls are read in the Hermes form, which Qwen's templates write too, after the text and one after the other:

    <tool_call>
    {"name": "search", "arguments": {"query": "rain"}}
    </tool_call>

A policy in training writes anything. What cannot be read stays text, word for word, and the reason is said: it is for
the environment or the reward to judge, never an exception.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rlorch.ports import Tokenizer
from rlorch.render.chat import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THOUGHT_END = "</think>"


@dataclass(frozen=True, slots=True)
class ParsedCompletion:
    """An assistant message, and why its tool calls could not be read (None: there were none, or they were)."""

    message: Message
    problem: str | None = None


def parse_completion(
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    *,
    stop_token_ids: Sequence[int] = (),
    tool_calls: bool | None = None,
) -> ParsedCompletion:
    """Sampled tokens as a message: `content`, and `tool_calls` whose arguments are objects.

    EOS or a token of `stop_token_ids` at the end is left out; other special tokens are kept as text, so that the
    message renders to what was sampled. Reasoning stays in `content`. `tool_calls` says whether calls are looked for;
    None: where the chat template writes them in this form. Never raises for what was sampled.
    """
    sampled = [int(token) for token in tokens]
    if sampled and (sampled[-1] == tokenizer.eos_token_id or sampled[-1] in stop_token_ids):
        sampled.pop()
    text = tokenizer.decode(sampled)
    if tool_calls is None:
        tool_calls = OPEN in str(getattr(tokenizer, "chat_template", ""))
    return parse_text(text) if tool_calls else ParsedCompletion({"role": "assistant", "content": text})


def parse_text(text: str) -> ParsedCompletion:
    """`parse_completion` for text without its end of turn, tool calls looked for."""
    plain: Message = {"role": "assistant", "content": text}
    first, after_thought = text.find(OPEN), text.find(OPEN, max(text.find(THOUGHT_END), 0))
    problem: str | None = None
    for start in dict.fromkeys((first, after_thought)):
        problem = None  # with no call after the reasoning, whatever the reasoning says of calls is text
        if start < 0:
            continue
        try:
            calls = _read_calls(text, start)
        except ValueError as error:
            problem = str(error)
            continue
        functions = [{"type": "function", "function": call} for call in calls]
        content = text[:start].removesuffix("\n")
        return ParsedCompletion({"role": "assistant", "content": content, "tool_calls": functions})
    return ParsedCompletion(plain, problem)


def _read_calls(text: str, at: int) -> list[dict[str, Any]]:
    """The calls from `at` to the end of `text`. Raises `ValueError` saying what is wrong with which."""
    calls: list[dict[str, Any]] = []
    while at < len(text):
        what = f"tool call {len(calls) + 1}"
        if not text.startswith(OPEN, at):
            raise ValueError(f"text follows tool call {len(calls)}: {text[at : at + 40]!r}")
        try:
            value, at = _DECODER.raw_decode(text, _skip_blanks(text, at + len(OPEN)))
        except ValueError as error:
            raise ValueError(f"{what} is not JSON: {error}") from error
        except RecursionError:
            raise ValueError(f"{what} is nested too deeply") from None
        calls.append(_call(value, what))
        at = _skip_blanks(text, at)
        if not text.startswith(CLOSE, at):
            raise ValueError(f"{what} does not end in {CLOSE} after its JSON")
        at = _skip_blanks(text, at + len(CLOSE))
    return calls


def _call(value: Any, what: str) -> dict[str, Any]:
    """Name and arguments of a call; other keys are left out."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not an object with name and arguments")
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} has no name")
    if not isinstance(arguments, dict):
        raise ValueError(f"{what} ({name}) has no arguments object")
    call = {"name": name, "arguments": arguments}
    try:
        json.dumps(call, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half of a surrogate pair, which is not text") from error
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    return call


def _skip_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)
