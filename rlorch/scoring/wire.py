"""How a rollout reaches the process that scores it, and how the verdict comes back.

A message is a 4-byte big-endian length and that many bytes of ASCII JSON. Arrays travel as base64 of their
little-endian bytes, so that every bit of them arrives. The standard library's JSON is used because dataset rows hold
integers of more than 64 bits (reasoning_gym), NaN and unpaired surrogates, which faster codecs refuse.

A row arrives as JSON has it: tuples are lists and keys are strings. Reading is strict: a message that does not have
exactly the expected fields raises `ValueError`.
"""

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from rlorch.types import Completion, Prompt, Rollout, Turn, Verdict, VersionSpan

Message = dict[str, Any]

# A rollout of a million tokens is 11 MB; more than this is a desynchronised stream.
MAX_MESSAGE_BYTES = 1 << 28
_LENGTH = struct.Struct(">I")


def pack(message: Mapping[str, Any]) -> bytes:
    """One framed message. Raises TypeError or ValueError for what JSON cannot hold."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Unpacker:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Add what arrived; returns the messages that are now whole. Raises ValueError on a broken stream."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {size} bytes was announced: the stream is not what it should be")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            body = json.loads(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            if not isinstance(body, dict):
                raise ValueError(f"a message must be an object, not {type(body).__name__}")
            messages.append(cast(Message, body))
        return messages


def rollout_to_json(rollout: Rollout) -> Message:
    """A JSON-serialisable form of a rollout, without its verdict."""
    prompt = rollout.prompt
    return {
        "group_id": rollout.group_id,
        "index": rollout.index,
        "prompt": {
            "ordinal": prompt.ordinal,
            "text": prompt.text,
            "tokens": _array_to_json(prompt.tokens_T, "<i4"),
            "row": dict(prompt.row),
        },
        "turns": [
            {
                "context": _array_to_json(turn.context_T, "<i4"),
                "tokens": _array_to_json(turn.completion.tokens_T, "<i4"),
                "logprobs": _array_to_json(turn.completion.logprobs_T, "<f4"),
                "finish_reason": turn.completion.finish_reason,
                "spans": [[span.version, span.start, span.stop] for span in turn.completion.spans],
                "queue_s": turn.completion.queue_s,
            }
            for turn in rollout.turns
        ],
        "text": rollout.text,
    }


def rollout_from_json(value: Message) -> Rollout:
    """The inverse of `rollout_to_json`. Raises ValueError."""
    group_id, index, prompt, turns, text = _fields(value, "group_id", "index", "prompt", "turns", "text")
    ordinal, prompt_text, prompt_tokens, row = _fields(prompt, "ordinal", "text", "tokens", "row")
    return Rollout(
        group_id,
        index,
        Prompt(ordinal, prompt_text, _array_from_json(prompt_tokens, "<i4"), row),
        tuple(_turn_from_json(turn) for turn in turns),
        text,
    )


def _turn_from_json(value: Message) -> Turn:
    context, tokens, logprobs, finish_reason, spans, queue_s = _fields(
        value, "context", "tokens", "logprobs", "finish_reason", "spans", "queue_s"
    )
    tokens_T, logprobs_T = _array_from_json(tokens, "<i4"), _array_from_json(logprobs, "<f4")
    if len(tokens_T) != len(logprobs_T):
        raise ValueError(f"a completion of {len(tokens_T)} tokens has {len(logprobs_T)} log-probs")
    completion = Completion(
        tokens_T, logprobs_T, finish_reason, tuple(VersionSpan(*span) for span in spans), float(queue_s)
    )
    return Turn(_array_from_json(context, "<i4"), completion)


def verdict_to_json(verdict: Verdict) -> Message:
    """A JSON-serialisable form of a verdict; its seconds are measured by the receiver."""
    return {
        "score": None if verdict.score is None else float(verdict.score),
        "failure": verdict.failure,
        "detail": verdict.detail,
        "parts": {name: float(part) for name, part in verdict.parts.items()},
    }


def verdict_from_json(value: Message, seconds: float) -> Verdict:
    """The inverse of `verdict_to_json`. Raises ValueError."""
    score, failure, detail, parts = _fields(value, "score", "failure", "detail", "parts")
    return Verdict(score, failure, detail, parts, seconds)


def _fields(value: Any, *names: str) -> list[Any]:
    if not isinstance(value, dict) or cast(Message, value).keys() != set(names):
        raise ValueError(f"expected an object with {', '.join(names)}, got {value!r:.200}")
    message = cast(Message, value)
    return [message[name] for name in names]


def _array_to_json(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def _array_from_json(value: Any, dtype: str) -> NDArray[Any]:
    if not isinstance(value, str):
        raise ValueError(f"expected base64 of {dtype}, got {value!r:.100}")
    return np.frombuffer(base64.b64decode(value, validate=True), dtype=dtype)
