"""What a concurrency strategy is told and what it answers: the interface of `aimd` and `knee`, as pure values.

One strategy per replica. It owns one number, the window: how many *sequences* may be in flight on that replica. A
request for n completions takes n of them, because a sequence is what occupies an engine (the Fireworks SDK sends n
requests of one completion each, so there the two counts agree). The pool's window is the sum over its replicas.

Strategies are synchronous and read no clock: times are seconds of whatever clock the caller has, passed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

StrategyName = Literal["adaptive", "knee", "fixed"]

CONGESTED_STATUSES = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class ResponseMetrics:
    """What one finished attempt says about load, per sequence.

    `prefill_queue_duration` is the seconds that the sequence waited before its prefill; None when the answer does not
    say (an error, or a server without the metric). `status_code` is the HTTP meaning of the outcome; a transport
    error has none. `retry_attempt` counts attempts of the same request before this one.
    """

    prefill_queue_duration: float | None = None
    status_code: int | None = 200
    transport_error: bool = False
    retry_attempt: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0

    @property
    def congested(self) -> bool:
        """The callee refused for load, or could not be reached."""
        return self.transport_error or self.status_code in CONGESTED_STATUSES

    @property
    def counted(self) -> bool:
        """The outcome says something about load: a success or congestion, not a caller's mistake."""
        return self.congested or (self.status_code is not None and 200 <= self.status_code < 300)

    @classmethod
    def from_headers(cls, headers: Mapping[str, str | float], **outcome: int | bool | None) -> "ResponseMetrics":
        """Metrics from response headers or a `perf_metrics` object: any case, `fireworks-` prefix or none."""
        plain = {key.lower().removeprefix("fireworks-"): value for key, value in headers.items()}
        queue = plain.get("prefill-queue-duration")
        status = outcome.get("status_code", 200)
        return cls(
            prefill_queue_duration=None if queue is None else float(queue),
            status_code=None if status is None else int(status),
            transport_error=bool(outcome.get("transport_error", False)),
            retry_attempt=int(outcome.get("retry_attempt") or 0),
            prompt_tokens=int(float(plain.get("prompt-tokens", 0))),
            cached_prompt_tokens=int(float(plain.get("cached-prompt-tokens", 0))),
        )


@dataclass(frozen=True, slots=True)
class Observation:
    """One gauge reading of a replica, with what the pool knows at the same moment.

    `running`, `waiting` (sequences), `kv_usage` (0..1), `generated_tokens` and `preemptions` (since start) are the
    engine's. `in_flight` (sequences sent and not answered), `demand` (somebody waits for admission) and `unit`
    (sequences per request, the grain in which a window can be used) are the pool's.
    """

    now: float
    version: int
    running: int
    waiting: int
    kv_usage: float
    generated_tokens: int
    preemptions: int
    in_flight: int
    demand: bool
    unit: int = 1


class ConcurrencyStrategy(Protocol):
    """Decides how many sequences one replica may have in flight."""

    @property
    def window(self) -> int:
        """Sequences that may be in flight now; at least 1."""
        ...

    def admits(self, committed_tokens: float, request_tokens: float) -> bool:
        """Whether a request of `request_tokens` expected KV tokens may join `committed_tokens` in flight."""
        ...

    def load_changed(self, in_flight: int) -> None:
        """`in_flight` sequences are in flight now: called after every admission and release."""
        ...

    def completed(self, response: ResponseMetrics, now: float) -> None:
        """One sequence was answered or refused."""
        ...

    def observe(self, sample: Observation) -> None:
        """A gauge reading."""
        ...

    def commit_happened(self, now: float) -> None:
        """The replica paused for a weight commit, or resumed after one: what it shows next is not congestion."""
        ...

    def step_completed(self) -> dict[str, float]:
        """A training step ended: adjust with what is left and report the step's numbers by name."""
        ...
