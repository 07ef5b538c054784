"""Builders for tests of the built-in rewards."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from rlorch.types import Completion, Prompt, Rollout, Turn, VersionSpan

MakeRollout = Callable[..., Rollout]


@pytest.fixture
def make_rollout() -> MakeRollout:
    def make(
        text: str = "4",
        row: Mapping[str, Any] | None = None,
        *,
        num_tokens: int = 8,
        finish: str = "stop",
        index: int = 0,
    ) -> Rollout:
        rng = np.random.default_rng(index)
        tokens_T = rng.integers(0, 1000, num_tokens, dtype=np.int32)
        logprobs_T = -rng.random(num_tokens, dtype=np.float32)
        spans = (VersionSpan(3, 0, num_tokens),)
        completion = Completion(tokens_T, logprobs_T, finish, spans, 0.25)  # pyright: ignore[reportArgumentType]
        prompt = Prompt(7, "2 + 2 =", np.arange(5, dtype=np.int32), {"answer": "4"} if row is None else row)
        return Rollout(7, index, prompt, (Turn(prompt.tokens_T, completion),), text)

    return make
