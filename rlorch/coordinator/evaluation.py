"""Evaluation on held-out prompts, on one version of the weights, through the serving path.

While an evaluation runs, its pin keeps every replica from committing another version; training rollouts and the
trainer go on beside it. Each completion names its versions, so the pin is not trusted but checked: a result made by
more than one version is an `InvariantError`, not a number.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from rlorch.errors import InvariantError, RetryableError
from rlorch.specs import Spec
from rlorch.types import Prompt, Rollout, SamplingParams

log = logging.getLogger(__name__)


class EvaluationSpec(Spec):
    """When and how held-out prompts are evaluated. Before the first and after the last step always."""

    every: int = Field(default=20, ge=0, description="optimizer steps; 0: only before and after")
    samples: int = Field(default=1, ge=1, description="sampled completions per prompt, at the training temperature")
    greedy: bool = Field(default=True, description="also evaluate greedy decoding")
    timeout_s: float = Field(default=1800.0, gt=0)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean held-out reward of one version. `failures` counts rollouts without a score; they are left out.

    `weights_digest` names the weights' content (`Manifest.digest`), `prompts_digest` the exact prompt set
    (xxh3-128 of the run's held_out.jsonl).
    """

    version: int
    sampled: float
    greedy: float | None
    prompts: int
    failures: int
    seconds: float
    weights_digest: str = ""
    prompts_digest: str = ""

    def metrics(self) -> dict[str, float]:
        """By documented metric name."""
        values = {
            "eval/accuracy_sampled": self.sampled,
            "eval/prompts": float(self.prompts),
            "eval/version": float(self.version),
            "eval/seconds": self.seconds,
            "eval/failures": float(self.failures),
        }
        return values if self.greedy is None else {**values, "eval/accuracy_greedy": self.greedy}


RolloutFn = Callable[[Prompt, SamplingParams, str], Awaitable[tuple[Rollout, ...]]]
ScoreFn = Callable[[tuple[Rollout, ...]], Awaitable[tuple[Rollout, ...]]]


class Evaluator:
    """Evaluates the version that is served now.

    Args:
        prompts: the held-out set; always the same, in the same order.
        params: the training run's sampling parameters; `n` is replaced.
        rollout: samples one prompt: (prompt, params, request id prefix).
        score: gives verdicts.
        pin: holds the served version of all replicas still; yields it.
        clock: seconds.
    """

    def __init__(
        self,
        spec: EvaluationSpec,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        rollout: RolloutFn,
        score: ScoreFn,
        pin: Callable[[], AbstractAsyncContextManager[int]],
        clock: Callable[[], float],
    ) -> None:
        self.spec = spec
        self._prompts = prompts
        self._sampled = replace(params, n=spec.samples, seed=None)
        self._greedy = SamplingParams(
            n=1, max_tokens=params.max_tokens, temperature=0.0, stop=params.stop, stop_token_ids=params.stop_token_ids
        )
        self._rollout = rollout
        self._score = score
        self._pin = pin
        self._clock = clock

    async def evaluate(self) -> Evaluation:
        """Sample and score every held-out prompt on one version."""
        started = self._clock()
        async with self._pin() as version:
            sampled = await self._all(self._sampled, f"eval-{version}-sampled")
            greedy = await self._all(self._greedy, f"eval-{version}-greedy") if self.spec.greedy else []
        rollouts = [*sampled, *greedy]
        seen = {span.version for r in rollouts for turn in r.turns for span in turn.completion.spans}
        if seen - {version}:
            raise InvariantError(f"evaluation of version {version} was sampled by versions {sorted(seen)}")
        return Evaluation(
            version=version,
            sampled=_mean(sampled),
            greedy=_mean(greedy) if self.spec.greedy else None,
            prompts=len(self._prompts),
            failures=sum(r.verdict is None or r.verdict.score is None for r in rollouts),
            seconds=self._clock() - started,
        )

    async def _all(self, params: SamplingParams, name: str) -> list[Rollout]:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._one(prompt, params, name)) for prompt in self._prompts]
        return [rollout for task in running for rollout in task.result()]

    async def _one(self, prompt: Prompt, params: SamplingParams, name: str) -> tuple[Rollout, ...]:
        try:
            return await self._score(await self._rollout(prompt, params, name))
        except RetryableError as error:
            log.warning("evaluation leaves out prompt %d: %s", prompt.ordinal, error)
            return ()


def _mean(rollouts: Sequence[Rollout]) -> float:
    scores = [r.verdict.score for r in rollouts if r.verdict is not None and r.verdict.score is not None]
    return float(np.mean(scores)) if scores else float("nan")
