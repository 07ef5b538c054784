"""Sampling from a deployment, token-exact, under a concurrency controller.

    sampler = DeploymentSampler(deploy, "serving", tokenizer, concurrency_controller=AdaptiveConcurrencyController())
    completions = await sampler.sample_with_tokens(messages, n=8)

The chat template is applied here, so the prompt's tokens are the caller's; completions come back as the tokens that
were sampled, with the log-probabilities they were sampled with, and name the checkpoint that they came from.

One logical request is up to 7 attempts: after a passing failure (too much in flight, a lost replica, no answer) it
waits 2 s, 4 s, ... 30 s, each time a random 0.5 to 1.5 of that. A slot of the controller is held during an attempt and
given back with what the attempt says about load.
"""

import asyncio
import logging
import random
import secrets
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlorch.errors import DeadlineError, RetryableError, RlorchError, UserError
from rlorch.pool.controllers import AdaptiveConcurrencyController, ConcurrencyController, FixedConcurrencyController
from rlorch.pool.strategy import ResponseMetrics
from rlorch.render import render_messages
from rlorch.sdk.connection import Connection, connect
from rlorch.sdk.deployments import DeploymentManager, deployment_id_of
from rlorch.sdk.futures import ApiFuture
from rlorch.sdk.sampled import (
    DeploymentSamplerTimeoutError,
    SampledCompletion,
    SampledRequestResult,
    SamplingRequestError,
    ServerMetrics,
    checkpoint_spans,
    outcome,
)
from rlorch.service.types import Sampled
from rlorch.types import Completion, SamplingParams

MAX_ATTEMPTS = 7
FIRST_BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 30.0
REQUEST_TIMEOUT_S = 600.0
ABORT_TIMEOUT_S = 30.0
KEPT_METRICS = 65536
PROBE_TOKENS = (1, 2)
WITHOUT_EFFECT = frozenset(
    {"logprobs", "raw_output", "sampling_context", "timeout_diagnostic_context",
     "additional_headers_snapshot", "r3_ttl_seconds", "user"}
)  # fmt: skip
"""Options of hosted services that change nothing here; log-probabilities always come."""
KNOWN_OPTIONS = (
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stop_token_ids",
    "echo",
    "http_timeout",
    "checkpoint_identity",
    "prompt_cache_key",
)

log = logging.getLogger(__name__)


class DeploymentSampler:
    """Samples from one deployment.

    Args:
        inference_url: the service (`DeploymentManager.inference_url`), or the `DeploymentManager` itself.
        model: the deployment, `accounts/<a>/deployments/<d>` or its id.
        api_key: see `rlorch.sdk.connection.connect`; with a `DeploymentManager` the tokenizer may stand here.
        tokenizer: renders messages and decodes; may be None for `sample_with_prompt_tokens`.
        concurrency_controller: None: an `AdaptiveConcurrencyController` of its own; set the attribute to None later for
            no limit.
        max_concurrency: deprecated: a `FixedConcurrencyController` of that many slots.
        additional_headers, request_context: as hosted services have them; no effect.
        first_backoff_s: seconds before the second attempt, doubled before each further one.
    """

    def __init__(
        self,
        inference_url: "str | DeploymentManager | Connection | None" = None,
        model: str = "",
        api_key: Any = None,
        tokenizer: Any = None,
        concurrency_controller: ConcurrencyController | None = None,
        max_concurrency: int | None = None,
        additional_headers: Mapping[str, str] | None = None,
        *,
        request_context: Any = None,
        first_backoff_s: float = FIRST_BACKOFF_S,
    ) -> None:
        del additional_headers, request_context
        if api_key is not None and not isinstance(api_key, str):
            tokenizer, api_key = tokenizer or api_key, None
        if not model:
            raise UserError("DeploymentSampler needs the deployment: model='accounts/<account>/deployments/<id>'")
        if max_concurrency is not None:
            warnings.warn("max_concurrency: pass FixedConcurrencyController", DeprecationWarning, stacklevel=2)
            concurrency_controller = concurrency_controller or FixedConcurrencyController(max_concurrency)
        self.connection = _connection(inference_url, api_key)
        self.model = model
        self.deployment_id = deployment_id_of(model)
        self.tokenizer = tokenizer
        self.concurrency_controller: ConcurrencyController | None = (
            concurrency_controller or AdaptiveConcurrencyController()
        )
        self.first_backoff_s = first_backoff_s
        self._metrics: deque[ServerMetrics] = deque(maxlen=KEPT_METRICS)

    async def sample_with_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> list[SampledCompletion]:
        """`n` completions of one conversation, as n requests at once; see `sample_with_prompt_tokens`. `tools` are
        offered to the chat template.

        Raises:
            UserError: the sampler has no tokenizer; ModelError: it has no chat template; DataError: the template
                refuses the messages.
        """
        if self.tokenizer is None:
            raise UserError("sample_with_tokens applies a chat template: give the DeploymentSampler a tokenizer")
        _, tokens_T = render_messages(messages, self.tokenizer, tools=options.pop("tools", None) or ())
        return await self.sample_with_prompt_tokens(
            tokens_T.tolist(), n, max_tokens, temperature, max_seq_len, **options
        )

    async def sample_with_prompt_tokens(
        self,
        prompt_token_ids: Sequence[int],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> list[SampledCompletion]:
        """`n` completions of a tokenised prompt, as n requests at once.

        Args:
            prompt_token_ids: the prompt.
            n: completions.
            max_tokens: of each completion.
            temperature: 0 is greedy.
            max_seq_len: prompt plus completion; a prompt that long gives [], a completion that is longer is left out.
            **options: top_p, top_k (0: off), seed (the i-th completion gets seed + i), stop (strings or token ids),
                echo (log-probabilities of the prompt too), http_timeout (seconds of one attempt), checkpoint_identity
                (one of several adapters that are loaded; default: the newest), prompt_cache_key (requests that share
                it go to one replica).

        Raises:
            SamplingRequestError: an attempt failed for good, or the last of them failed.
            UserError: a wrong option; raised as the service raised it.
        """
        if max_seq_len is not None and len(prompt_token_ids) >= max_seq_len:
            log.warning("the prompt has %d tokens, max_seq_len is %d: skipped", len(prompt_token_ids), max_seq_len)
            return []
        seed = options.pop("seed", None)
        try:
            async with asyncio.TaskGroup() as group:
                requests = [
                    group.create_task(
                        self.sample_with_prompt_tokens_result(
                            prompt_token_ids, max_tokens, temperature,
                            seed=None if seed is None else seed + index, **options,
                        )
                    )
                    for index in range(n)
                ]  # fmt: skip
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from failed
        completions = [completion for request in requests for completion in request.result().completions]
        return [one for one in completions if max_seq_len is None or len(one.full_tokens) <= max_seq_len]

    async def sample_with_prompt_tokens_result(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int = 1024,
        temperature: float = 1.0,
        *,
        n: int = 1,
        **options: Any,
    ) -> SampledRequestResult:
        """One logical request, with what each of its attempts was like; see `sample_with_prompt_tokens`."""
        _check_options(options)
        echo = bool(options.get("echo", False))
        params = sampling_params(max_tokens, temperature, n, options)
        prompt_T = np.asarray(prompt_token_ids, dtype=np.int32)
        request = _Request(self, prompt_T, params, options)
        started_s = time.monotonic()
        sampled = await request.run()
        prompt = [int(token) for token in prompt_T]
        completions = [self._completion(prompt, one, sampled, params) for one in sampled.completions]
        if echo:
            completions = [await self._echoed(completion) for completion in completions]
        wall_s = time.monotonic() - started_s
        return SampledRequestResult(completions, request.id, len(request.metrics), request.metrics, wall_s)

    async def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens 1..T-1 under the weights that are served: T - 1 values, at temperature 1."""
        scores = await self.connection.call_async(
            "deployments",
            "score",
            deadline_s=REQUEST_TIMEOUT_S,
            id=self.deployment_id,
            tokens_T=np.asarray(tokens, dtype=np.int32),
        )
        return [float(value) for value in scores]

    def drain_metrics(self) -> list[ServerMetrics]:
        """The attempts since the last call, oldest first; the newest 65536 are kept."""
        drained = list(self._metrics)
        self._metrics.clear()
        return drained

    def abort(self, request_id: str) -> None:
        """End a request in the engine; returns at once. Cancelling a request does this."""
        connection = self.connection
        abort = connection.on_hub("deployments", "abort", ABORT_TIMEOUT_S, id=self.deployment_id, request_id=request_id)
        ApiFuture(connection.hub.submit(abort), f"abort of request {request_id}")

    def record(self, metrics: ServerMetrics) -> None:
        """Keep one attempt for `drain_metrics`."""
        self._metrics.append(metrics)

    def _completion(
        self, prompt: list[int], completion: Completion, sampled: Sampled, params: SamplingParams
    ) -> SampledCompletion:
        tokens = [int(token) for token in completion.tokens_T]
        logprobs = [float(value) for value in completion.logprobs_T]
        raw = params.temperature == 1.0 and params.top_p == 1.0 and params.top_k <= 0
        spans = checkpoint_spans(completion, sampled)
        return SampledCompletion(
            text="" if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True),
            full_tokens=prompt + tokens,
            prompt_len=len(prompt),
            finish_reason=completion.finish_reason,
            completion_len=len(tokens),
            inference_logprobs=logprobs if raw else None,
            sampling_logprobs=list(logprobs),
            checkpoint_identity=spans[-1].identity if spans else "",
            content_hash=spans[-1].content_hash if spans else "",
            checkpoint_spans=spans,
        )

    async def _echoed(self, completion: SampledCompletion) -> SampledCompletion:
        """The completion with raw log-probabilities of every token but the first, by scoring it once more."""
        scores = await self.score(completion.full_tokens)
        prompt_count = completion.prompt_len - 1
        return replace(
            completion,
            inference_logprobs=scores,
            sampling_logprobs=[*[None] * prompt_count, *completion.sampling_logprobs],
            logprobs_echoed=True,
            echoed_prompt_logprob_count=prompt_count,
        )


class _Request:
    """One logical request: its attempts, slots and metrics."""

    def __init__(
        self, sampler: DeploymentSampler, prompt_T: Any, params: SamplingParams, options: Mapping[str, Any]
    ) -> None:
        self.id = secrets.token_hex(8)
        self.metrics: list[ServerMetrics] = []
        self._sampler = sampler
        self._prompt_T = prompt_T
        self._params = params
        self._timeout_s = float(options.get("http_timeout") or REQUEST_TIMEOUT_S)
        self._identity: str | None = options.get("checkpoint_identity")
        self._session: str | None = options.get("prompt_cache_key")

    async def run(self) -> Sampled:
        """Attempt until it works. Raises `SamplingRequestError`, and whatever is not a passing failure as it is."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                return await self._attempt(attempt)
            except (RetryableError, DeadlineError) as error:
                if attempt + 1 == MAX_ATTEMPTS:
                    raise self._given_up(error) from error
                backoff_s = min(self._sampler.first_backoff_s * 2**attempt, LONGEST_BACKOFF_S) * random.uniform(
                    0.5, 1.5
                )
                log.info("request %s: %s; attempt %d in %.1f s", self.id, error, attempt + 2, backoff_s)
            await asyncio.sleep(backoff_s)
        raise AssertionError("unreachable")

    async def _attempt(self, attempt: int) -> Sampled:
        controller = self._sampler.concurrency_controller
        if controller is not None:
            await controller.acquire()
        response: ResponseMetrics | None = None
        request_id = f"{self.id}-{attempt}"
        started_s = time.monotonic()
        try:
            sampled: Sampled = await self._sampler.connection.call_async(
                "deployments",
                "sample",
                deadline_s=self._timeout_s,
                id=self._sampler.deployment_id,
                prompt_T=self._prompt_T,
                params=self._params,
                request_id=request_id,
                identity=self._identity,
                session=self._session,
            )
            response = ResponseMetrics(
                prefill_queue_duration=sampled.queue_s, retry_attempt=attempt, prompt_tokens=len(self._prompt_T)
            )
            self._record(response, started_s, sampled)
            return sampled
        except asyncio.CancelledError:
            self._sampler.abort(request_id)
            raise
        except Exception as error:
            response = outcome(error, attempt)
            self._record(response, started_s, error=error)
            raise
        finally:
            if controller is not None:
                controller.release(response)

    def _record(
        self,
        response: ResponseMetrics,
        started_s: float,
        sampled: Sampled | None = None,
        error: Exception | None = None,
    ) -> None:
        metrics = ServerMetrics(
            response=response,
            logical_request_id=self.id,
            client_latency_s=time.monotonic() - started_s,
            server_processing_time=sampled.latency_s if sampled else None,
            num_concurrent_requests=sampled.num_concurrent_requests if sampled else None,
            completion_tokens=sum(len(one.tokens_T) for one in sampled.completions) if sampled else 0,
            backend_host=sampled.replica if sampled else "",
            error_kind=type(error).__name__ if error else "",
        )
        self.metrics.append(metrics)
        self._sampler.record(metrics)

    def _given_up(self, error: RlorchError) -> SamplingRequestError:
        kind = DeploymentSamplerTimeoutError if isinstance(error, DeadlineError) else SamplingRequestError
        failure = kind(
            f"request {self.id} to deployment {self._sampler.deployment_id} failed {MAX_ATTEMPTS} times, last: {error}"
        )
        failure.logical_request_id = self.id
        failure.attempts = len(self.metrics)
        failure.final_status = self.metrics[-1].status_code
        failure.final_error_kind = type(error).__name__
        return failure


def probe(connection: Connection, model: str) -> None:
    """Sample four tokens from a deployment, greedily. Raises what the service raises."""
    connection.call(
        "deployments",
        "sample",
        id=deployment_id_of(model),
        prompt_T=np.asarray(PROBE_TOKENS, dtype=np.int32),
        params=SamplingParams(max_tokens=4, temperature=0.0),
        request_id=f"probe-{secrets.token_hex(8)}",
    )


def sampling_params(max_tokens: int, temperature: float, n: int, options: Mapping[str, Any]) -> SamplingParams:
    """The service's parameters; integers in `stop` are token ids. Raises `UserError`."""
    stop = options.get("stop") or ()
    stops = [stop] if isinstance(stop, str | int) else list(stop)
    if n < 1 or max_tokens < 1:
        raise UserError(f"n is {n} and max_tokens {max_tokens}: both must be at least 1")
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=float(options.get("top_p", 1.0) or 1.0),
        top_k=int(options.get("top_k", 0) or -1),
        stop=tuple(one for one in stops if isinstance(one, str)),
        stop_token_ids=(*(one for one in stops if isinstance(one, int)), *(options.get("stop_token_ids") or ())),
        seed=options.get("seed"),
    )


def _connection(where: "str | DeploymentManager | Connection | None", api_key: str | None) -> Connection:
    if isinstance(where, DeploymentManager):
        return where.connection
    return where if isinstance(where, Connection) else connect(where, api_key)


def _check_options(options: Mapping[str, Any]) -> None:
    unknown = [name for name, value in options.items() if name not in (*KNOWN_OPTIONS, *WITHOUT_EFFECT) and value]
    if unknown:
        raise UserError(f"sampling knows no option {', '.join(unknown)}; it knows {', '.join(KNOWN_OPTIONS)}")
