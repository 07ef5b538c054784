"""The prompts of an RL run: rendered rows, in the order of the source."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlorch.coordinator.source import Cursor, PromptSource
from rlorch.errors import DataError
from rlorch.ports import Tokenizer
from rlorch.recipes.inputs import Inputs
from rlorch.recipes.rl.config import RLConfig
from rlorch.render.prompt import render_prompt
from rlorch.types import Prompt, Tokens

log = logging.getLogger(__name__)

CANARY_TOKENS = 256


class Prompts:
    """Training prompts by ordinal, and the held-out ones (whose ordinals are negative)."""

    def __init__(self, config: RLConfig, tokenizer: Tokenizer, rows: Inputs) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._rows = rows.train_rows
        self.held_out = [self._prompt(-1 - index, row) for index, row in enumerate(rows.held_out_rows)]

    def remaining(self, resolved: frozenset[int]) -> Iterator[Prompt]:
        """Prompts that are not resolved yet, in order. One too long for the model is skipped with a warning."""
        source = PromptSource(len(self._rows), seed=self._config.seed, epochs=self._config.epochs)
        cursor = Cursor(resolved, end=source.end)
        longest = self._config.sampler.max_model_len - self._config.rollout.max_tokens
        skipped = 0
        while (ordinal := cursor.draw()) is not None:
            prompt = self._prompt(ordinal, self._rows[source.locate(ordinal)[1]])
            if len(prompt.tokens_T) <= longest:
                skipped = 0
                yield prompt
                continue
            skipped += 1
            log.warning(
                "prompt %d has %d tokens and is skipped: sampler.max_model_len %d leaves %d beside rollout.max_tokens",
                ordinal,
                len(prompt.tokens_T),
                self._config.sampler.max_model_len,
                longest,
            )
            if skipped >= len(self._rows):
                raise DataError(
                    f"{self._config.data.source}: every prompt is longer than {longest} tokens; raise "
                    "sampler.max_model_len or lower rollout.max_tokens"
                )

    def canary(self) -> Tokens:
        """A fixed sequence: the first training prompts, as long as the model allows, at most `CANARY_TOKENS` tokens."""
        length = min(CANARY_TOKENS, self._config.sampler.max_model_len - 1)
        parts = [self._prompt(0, row).tokens_T for row in self._rows[:32]]
        return np.concatenate(parts)[:length]

    def _prompt(self, ordinal: int, row: Mapping[str, Any]) -> Prompt:
        text, tokens_T = render_prompt(row, self._tokenizer, self._config.render)
        return Prompt(ordinal, text, tokens_T, row)
