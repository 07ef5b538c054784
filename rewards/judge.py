"""A model behind an OpenAI-compatible endpoint reads the completion and gives the score."""

import asyncio
import os
import re
from typing import Any

import aiohttp

from rlorch.errors import PluginError
from rlorch.scoring import Rollout, Verdict, reward

PROMPT = (
    "Grade the response to the task. Reply with one line, `Score: x`, where x is a number from 0 (wrong or useless) to "
    "1 (correct and complete).\n\nTask:\n{prompt}\n\nReference answer:\n{answer}\n\nResponse:\n{completion}\n"
)
_SCORE = re.compile(r"score\s*[:=]\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})


class JudgeError(Exception):
    """The judge gave no usable score; the worker makes it a failure verdict."""


@reward(name="judge")
class Judge:
    """The number after `Score:` in the judge's reply, divided by `scale`; 0 to 1.

    No usable answer (transport, status, no number, out of range) is a failure, never 0. A worker asks for one rollout
    at a time: raise `rewards.workers` for throughput.

    Options:
        base_url: the endpoint without `/chat/completions`, e.g. http://localhost:8000/v1.
        model: the judge's name there.
        prompt: template with {prompt}, {completion} and {answer} (the row's field `answer`, empty where absent).
        scale: the highest score that the prompt asks for.
        max_tokens: limit of the reply, tokens.
        timeout_s: seconds for one attempt.
        attempts: how often a passing condition (408, 429, 5xx, transport) is tried, with growing pauses.
        api_key_env: the environment variable that holds the key; not sent where it is unset.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        prompt: str = PROMPT,
        scale: float = 1.0,
        max_tokens: int = 512,
        timeout_s: float = 20.0,
        attempts: int = 3,
        api_key_env: str = "OPENAI_API_KEY",
    ) -> None:
        if "{completion}" not in prompt:
            raise PluginError("reward 'judge': the prompt has no {completion}, so the judge would not see it")
        if scale <= 0 or attempts < 1 or timeout_s <= 0:
            raise PluginError(f"reward 'judge': scale={scale}, attempts={attempts}, timeout_s={timeout_s}: all above 0")
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._request: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": 0.0}
        self._prompt = prompt
        self._scale = scale
        self._timeout_s = timeout_s
        self._attempts = attempts
        key = os.environ.get(api_key_env)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def __call__(self, rollout: Rollout) -> Verdict:
        """Score one rollout. Raises JudgeError."""
        text = self._prompt
        values = {
            "prompt": rollout.prompt.text,
            "answer": rollout.row.get("answer", ""),
            "completion": rollout.completion,
        }
        # In one pass, so that braces in a completion are text.
        text = re.sub(r"\{(prompt|answer|completion)\}", lambda match: str(values[match[1]]), text)
        reply = await self._ask({**self._request, "messages": [{"role": "user", "content": text}]})
        numbers = _SCORE.findall(reply)
        if not numbers:
            raise JudgeError(f"no `Score: x` in the reply: {reply[-200:]!r}")
        score = float(numbers[-1]) / self._scale
        if not 0.0 <= score <= 1.0:
            raise JudgeError(f"the score {numbers[-1]} is outside 0 to {self._scale:g}: {reply[-200:]!r}")
        return Verdict(score, detail=reply[-200:])

    async def _ask(self, body: dict[str, Any]) -> str:
        problem = ""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        async with aiohttp.ClientSession(timeout=timeout, headers=self._headers) as session:
            for attempt in range(self._attempts):
                if attempt:
                    await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 8.0))
                try:
                    async with session.post(self._url, json=body) as response:
                        if response.status == 200:
                            return _content(await response.json())
                        problem = f"status {response.status}: {(await response.text())[:200]}"
                        if response.status not in _RETRY_STATUS:
                            break
                except (aiohttp.ClientConnectionError, TimeoutError) as error:
                    problem = f"{type(error).__name__}: {error}"
        raise JudgeError(f"{self._url} gave no answer: {problem}")


def _content(reply: Any) -> str:
    try:
        return str(reply["choices"][0]["message"]["content"])
    except (KeyError, IndexError, TypeError) as error:
        raise JudgeError(f"the reply is not a chat completion: {reply!r:.200}") from error
