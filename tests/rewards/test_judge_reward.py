"""The judge against a real HTTP server."""

import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from rewards.judge import JudgeError
from rlorch.errors import PluginError
from rlorch.scoring import Rollout, Verdict
from rlorch.scoring.plugin import load_term

Make = Callable[..., Rollout]


class Endpoint:
    """Answers with `replies` in turn: a text, or a status."""

    def __init__(self) -> None:
        self.replies: list[str | int] = []
        self.requests: list[dict[str, Any]] = []
        self.base_url = ""

    async def chat(self, request: web.Request) -> web.Response:
        self.requests.append({**await request.json(), "key": request.headers.get("Authorization")})
        reply = self.replies.pop(0)
        if isinstance(reply, int):
            return web.Response(status=reply, text="busy")
        return web.json_response({"choices": [{"message": {"content": reply}}]})

    async def score(self, rollout: Rollout, **options: Any) -> Verdict:
        call: Any = load_term("judge", 1.0, {"base_url": self.base_url, "model": "m", **options}).call
        return await call(rollout)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    served = Endpoint()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", served.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    served.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/"
    yield served
    await runner.cleanup()


async def test_the_last_score_of_the_reply_counts(
    endpoint: Endpoint, make_rollout: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint.replies = ["Score: 9 would be too high.\nscore: 7.5"]
    verdict = await endpoint.score(make_rollout("{answer} in {braces}"), scale=10, api_key_env="JUDGE_KEY")
    assert verdict.score == 0.75
    (request,) = endpoint.requests
    assert request["key"] == "Bearer secret"
    assert request["model"] == "m"
    assert "{answer} in {braces}" in request["messages"][0]["content"]
    assert "Reference answer:\n4" in request["messages"][0]["content"]


async def test_a_passing_condition_is_tried_again(endpoint: Endpoint, make_rollout: Make) -> None:
    endpoint.replies = [503, "Score: 1"]
    assert (await endpoint.score(make_rollout())).score == 1.0


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        (["I like it"], "no `Score: x`"),
        (["Score: 3"], "outside 0 to 1"),
        ([401], "status 401: busy"),
        ([503, 503], "status 503"),
    ],
)
async def test_no_usable_answer_is_an_error_and_never_a_zero(
    endpoint: Endpoint, make_rollout: Make, replies: list[str | int], said: str
) -> None:
    endpoint.replies = list(replies)
    with pytest.raises(JudgeError, match=re.escape(said)):
        await endpoint.score(make_rollout(), attempts=2)
    assert endpoint.replies == []


async def test_an_endpoint_that_is_not_there_is_an_error(make_rollout: Make) -> None:
    nowhere = Endpoint()
    nowhere.base_url = "http://127.0.0.1:9"
    with pytest.raises(JudgeError, match="ClientConnectorError"):
        await nowhere.score(make_rollout(), attempts=1)


def test_a_prompt_without_the_completion_is_refused() -> None:
    with pytest.raises(PluginError, match="completion"):
        load_term("judge", 1.0, {"base_url": "http://x", "model": "m", "prompt": json.dumps("grade it")})
