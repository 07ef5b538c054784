"""The published window controllers, as pure state: AIMD on the prefill queue, and a fixed window.

`AimdWindow` is the algorithm of Fireworks' `AdaptiveConcurrencyController` with its constants and names, kept because
users ask for it by name and because it is the baseline of `knee`. Two controls in one:

* prefill: every `adjustment_interval` answers, EMA of the mean prefill queue (alpha 0.3). Above 0.5 s the window is
  halved, else it grows by min(0.5 / EMA, 4).
* status, for answers without that metric (refusals, servers that do not report it): 429, 503 and transport errors
  halve the window (quarter it from the third retry on) at most once per second; an interval without any adds 1.

Shrinking takes nothing back. The published form keeps a "debt" of releases to swallow; it always equals
max(0, in flight - window), so it is computed here, not stored.
"""

from dataclasses import dataclass, field

from rlorch.pool.strategy import Observation, ResponseMetrics

MIN_EMA_S = 0.001  # a queue EMA below this counts as this: the growth rule divides by it
MAX_GROWTH_FACTOR = 4.0  # growth per adjustment is at most this many additive increases
EXHAUSTED_RETRY_ATTEMPT = 3  # a request refused this often says that one halving was not enough


@dataclass
class _Step:
    """What happened since the last `step_completed`."""

    requests: int = 0
    windows: int = 0
    queue_s: list[float] = field(default_factory=list[float])
    status_responses: int = 0
    congestion_responses: int = 0
    congestion_events: int = 0
    retry_exhaustions: int = 0
    max_in_flight: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0


class AimdWindow:
    """Additive increase, multiplicative decrease of a window of `window_size` sequences.

    Args:
        initial_window, min_window, max_window: sequences.
        prefill_queue_target: seconds of mean prefill queue above which the window shrinks.
        additive_increase, multiplicative_decrease: sequences added; factor left after a cut.
        ema_alpha: weight of the newest mean in the EMA.
        adjustment_interval: releases between adjustments; 0 adjusts only when a step completes.
        shrink_cooldown_s: seconds between two cuts for refused requests.
    """

    def __init__(
        self,
        initial_window: float = 8,
        min_window: int = 1,
        max_window: int = 256,
        prefill_queue_target: float = 0.5,
        additive_increase: float = 1.0,
        multiplicative_decrease: float = 0.5,
        ema_alpha: float = 0.3,
        adjustment_interval: int = 32,
        shrink_cooldown_s: float = 1.0,
    ) -> None:
        if not 1 <= min_window <= max_window:
            raise ValueError(f"need 1 <= min_window <= max_window, got {min_window} and {max_window}")
        self.min_window = min_window
        self.max_window = max_window
        self.prefill_queue_target = prefill_queue_target
        self.additive_increase = additive_increase
        self.multiplicative_decrease = multiplicative_decrease
        self.ema_alpha = ema_alpha
        self.adjustment_interval = adjustment_interval
        self.shrink_cooldown_s = shrink_cooldown_s
        self.ema_prefill_queue: float | None = None
        self._window = min(max(float(initial_window), min_window), max_window)
        self._in_flight = 0
        self._releases = 0
        self._queue_s: list[float] = []
        self._status_counted = 0
        self._status_congested = 0
        self._last_shrink: float | None = None
        self._step = _Step()

    @property
    def window_size(self) -> int:
        """Sequences that may be in flight."""
        return min(max(int(self._window), self.min_window), self.max_window)

    @property
    def window(self) -> int:
        """The same, under the name of `ConcurrencyStrategy`."""
        return self.window_size

    @property
    def pending_decrease(self) -> int:
        """Sequences in flight beyond the window: the next releases are not handed on."""
        return max(0, self._in_flight - self.window_size)

    def admits(self, committed_tokens: float, request_tokens: float) -> bool:
        """Always: this controller does not know KV memory."""
        return True

    def load_changed(self, in_flight: int) -> None:
        """Note how many sequences are in flight."""
        self._in_flight = in_flight
        self._step.max_in_flight = max(self._step.max_in_flight, in_flight)

    def completed(self, response: ResponseMetrics, now: float) -> None:
        """Account for one answer; adjusts when an interval is full."""
        step = self._step
        step.prompt_tokens += response.prompt_tokens
        step.cached_prompt_tokens += response.cached_prompt_tokens
        if response.prefill_queue_duration is not None:
            self._queue_s.append(response.prefill_queue_duration)
            step.queue_s.append(response.prefill_queue_duration)
        else:
            self._count_status(response, now)
        self.released()

    def released(self) -> None:
        """A slot came back, with or without metrics: it counts towards the interval."""
        self._step.requests += 1
        self._step.windows += self.window_size
        self._releases += 1
        if self.adjustment_interval and self._releases >= self.adjustment_interval:
            self._adjust()

    def observe(self, sample: Observation) -> None:
        """Ignored: the published controller reads answers, not gauges."""

    def commit_happened(self, now: float) -> None:
        """Ignored: the published controller does not tell a weight sync from congestion."""

    def step_completed(self) -> dict[str, float]:
        """Adjust with what is left of the interval; the step's numbers under the published names.

        `avg_pq` and `ema_pq` appear when answers carried the queue metric, the congestion counts otherwise.
        """
        step, window = self._step, self.window_size
        self._adjust()
        summary: dict[str, float] = {"window": window, "requests": step.requests}
        if step.queue_s:
            summary["avg_pq"] = sum(step.queue_s) / len(step.queue_s)
            summary["ema_pq"] = self.ema_prefill_queue or 0.0
        elif step.status_responses:
            summary["status_responses"] = step.status_responses
            summary["congestion_responses"] = step.congestion_responses
            summary["congestion_rate"] = step.congestion_responses / step.status_responses
            summary["congestion_events"] = step.congestion_events
            summary["retry_exhaustions"] = step.retry_exhaustions
        summary["pending_decrease"] = self.pending_decrease
        summary["avg_window"] = step.windows / step.requests if step.requests else window
        summary["max_in_flight"] = step.max_in_flight
        summary["window_after"] = self.window_size
        if step.prompt_tokens:
            summary["cache_hit_rate"] = step.cached_prompt_tokens / step.prompt_tokens
        self._step = _Step(max_in_flight=self._in_flight)
        return summary

    def _count_status(self, response: ResponseMetrics, now: float) -> None:
        step = self._step
        if not response.counted:
            return
        self._status_counted += 1
        step.status_responses += 1
        if not response.congested:
            return
        self._status_congested += 1
        step.congestion_responses += 1
        exhausted = response.retry_attempt >= EXHAUSTED_RETRY_ATTEMPT
        step.retry_exhaustions += exhausted
        if self._last_shrink is not None and now - self._last_shrink < self.shrink_cooldown_s:
            return
        self._last_shrink = now
        step.congestion_events += 1
        self._resize(self._window * self.multiplicative_decrease ** (2 if exhausted else 1))

    def _adjust(self) -> None:
        if self._queue_s:
            self._adjust_by_prefill(sum(self._queue_s) / len(self._queue_s))
        elif self._status_counted and not self._status_congested:
            self._resize(self._window + self.additive_increase)
        self._queue_s = []
        self._status_counted = self._status_congested = self._releases = 0

    def _adjust_by_prefill(self, mean_s: float) -> None:
        ema = self.ema_prefill_queue
        ema = mean_s if ema is None else self.ema_alpha * mean_s + (1 - self.ema_alpha) * ema
        self.ema_prefill_queue = ema
        if ema > self.prefill_queue_target:
            self._resize(self._window * self.multiplicative_decrease)
        else:
            growth = min(self.prefill_queue_target / max(ema, MIN_EMA_S), MAX_GROWTH_FACTOR)
            self._resize(self._window + self.additive_increase * growth)

    def _resize(self, window: float) -> None:
        self._window = min(max(window, self.min_window), self.max_window)


class FixedWindow:
    """A window that never changes, of `max_concurrency` sequences."""

    def __init__(self, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        self.max_concurrency = max_concurrency

    @property
    def window_size(self) -> int:
        """Sequences that may be in flight."""
        return self.max_concurrency

    @property
    def window(self) -> int:
        """The same, under the name of `ConcurrencyStrategy`."""
        return self.max_concurrency

    def admits(self, committed_tokens: float, request_tokens: float) -> bool:
        """Always."""
        return True

    def load_changed(self, in_flight: int) -> None:
        """Ignored."""

    def completed(self, response: ResponseMetrics, now: float) -> None:
        """Ignored."""

    def released(self) -> None:
        """Ignored."""

    def observe(self, sample: Observation) -> None:
        """Ignored."""

    def commit_happened(self, now: float) -> None:
        """Ignored."""

    def step_completed(self) -> dict[str, float]:
        """`{"window": max_concurrency}`."""
        return {"window": self.max_concurrency}
