"""`KneeWindow`: find the smallest window that keeps the throughput, by measuring throughput.

Queue time says nothing before an engine is full, and the knee of tokens per second comes earlier: so this strategy
measures tokens per second at neighbouring windows. Time is counted in turnovers (one turnover: as many sequences
answered as the window holds). The algorithm:

1. Slow start: double each turnover until something waits, KV usage passes 0.6, or a doubling gains less than 5%.
2. Cruise: integral control of waiting/running towards 0.03, at most 10% per turnover, never above the known knee.
3. Probe: every 8 turnovers one step down, 8 later one step up, against the turnovers just before. Keep the smaller
   window unless it costs more than 1% per step or 2.5% of the peak in all (`level` is the share of the peak kept). A
   step that was kept is followed by another; one that paid in full shows that the knee is far: back to slow start.
4. Feed-forward: admit while what is in flight, fully grown, fits 0.85 of the KV tokens; the gauge lags.
5. Emergency: a preemption, KV usage above 0.9 or a refusal cuts to 0.8, once until the excess has drained.
6. Weight syncs are not congestion: readings around a commit are skipped, and so are preemptions in them.
7. Growth needs evidence: no change while the window does not bind, or across a gap in the readings.

Sources: slow start and congestion-once-per-episode from TCP (RFC 5681); delivered rate as the signal from BBR; drain
latch from prime-rl's controller, which without it cut 1024 down to 8.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from rlorch.pool.strategy import Observation, ResponseMetrics

SLOW_START_MIN_GAIN = 1.05  # a doubling that gains less has passed the knee
SLOW_START_MAX_KV = 0.6  # contexts still grow after admission: leave them room
TARGET_WAITING_RATIO = 0.03  # a sliver of queue keeps the engine full between two polls; more is only latency
CRUISE_GAIN = 1.0  # window change per unit of waiting/running beyond the target
CRUISE_MAX_CHANGE = 0.10  # per turnover: the queue answers a change one turnover later
TURNOVERS_BETWEEN_PROBES = 8  # one probe leg in nine turnovers costs less than 0.2% of throughput
PROBE_STEP = 0.10  # relative size of a probe; the gain of one step must stand out of 1% noise
MAX_LOSS_PER_STEP = 0.01  # throughput that one step down may cost
MIN_GAIN_PER_STEP = 0.015  # throughput that one step up must bring; above the loss, so that the two do not alternate
MIN_LEVEL = 0.975  # share of the peak to keep, all steps together: "the smallest window within 2-3%"
FLAT_GAIN = 0.005  # a step up that brings less shows that the peak is near
STEEP_GAIN = 0.7  # of a step up, relative to its size: throughput still grows with the window
PROBE_TURNOVERS = 2  # groups that drain make one turnover noisy
BASELINE_TURNOVERS = 4  # turnovers before a probe that it is compared with
SETTLE_FRACTION = 0.25  # of a turnover, skipped after a change: what is in flight reacts late
MIN_READINGS = 4  # readings in a measurement, however short the turnover
KV_ADMIT_FRACTION = 0.85  # share of KV tokens that admitted work may grow to
KV_EMERGENCY = 0.9  # vLLM preempts near 1.0, and recomputing costs more than waiting
EMERGENCY_FACTOR = 0.8
BINDING_FRACTION = 0.9  # in flight below this share of the window: the window is not what limits
MAX_GAP_PERIODS = 3  # a reading older than this says nothing about now
QUIET_SHARE = 0.25  # of the time between commits that may be skipped, however often they come
MAX_PROBE_RESTARTS = 1  # a probe interrupted by commits more often goes on across versions


class Phase(Enum):
    """What the window is doing; `view` shows it."""

    SLOW_START = "slow start"
    CRUISE = "cruise"
    PROBE = "probe"


@dataclass
class _Epoch:
    """One measurement, about a turnover long; time and tokens in quiet periods are left out."""

    window: int
    completions: int = 0
    readings: int = 0
    binding: int = 0
    seconds: float = 0.0
    tokens: int = 0
    waiting_ratios: list[float] = field(default_factory=list[float])
    max_kv_usage: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def waiting_ratio(self) -> float:
        """Median of waiting/running: what arrived since the last engine step waits for a moment in any case."""
        return median(self.waiting_ratios)

    @property
    def binds(self) -> bool:
        return 2 * self.binding >= self.readings


@dataclass
class _Turnover:
    """How long a turnover takes, in seconds: completions per second, smoothed."""

    seconds: float | None = None

    def learn(self, epoch: _Epoch) -> None:
        if epoch.completions and epoch.seconds > 0:
            fresh = epoch.seconds * epoch.window / epoch.completions
            self.seconds = fresh if self.seconds is None else 0.5 * fresh + 0.5 * self.seconds


@dataclass
class _Counters:
    """Numbers of the step, for `step_completed`."""

    requests: int = 0
    probes: int = 0
    emergencies: int = 0
    max_in_flight: int = 0
    rates: list[float] = field(default_factory=list[float])


class KneeWindow:
    """A window that follows the knee of tokens per second.

    Args:
        initial_window, min_window, max_window: sequences.
        kv_tokens: KV-cache capacity of the replica in tokens; None turns feed-forward admission off.
        period_s: seconds between readings.
    """

    def __init__(
        self,
        initial_window: int = 8,
        min_window: int = 1,
        max_window: int = 256,
        *,
        kv_tokens: int | None = None,
        period_s: float = 1.0,
    ) -> None:
        if not 1 <= min_window <= max_window:
            raise ValueError(f"need 1 <= min_window <= max_window, got {min_window} and {max_window}")
        self.min_window = min_window
        self.max_window = max_window
        self.phase = Phase.SLOW_START
        self.level = 1.0
        self._window = float(min(max(initial_window, min_window), max_window))
        self._knee = float(max_window)
        self._kv_tokens = kv_tokens
        self._period_s = period_s
        self._in_flight = 0
        self._unit = 1
        self._last: Observation | None = None
        self._epoch = _Epoch(self.window)
        self._settle = 0
        self._previous_rate: float | None = None
        self._previous_window = self.window
        self._base: deque[_Epoch] = deque(maxlen=BASELINE_TURNOVERS)
        self._turnovers = 0
        self._probe_down = True
        self._probe_restarts = 0
        self._draining = False
        self._quiet_until = float("-inf")
        self._last_commit: float | None = None
        self._turnover = _Turnover()
        self._step = _Counters()

    @property
    def window(self) -> int:
        """Sequences that may be in flight."""
        return min(max(int(self._window + 1e-9), self.min_window), self.max_window)

    def admits(self, committed_tokens: float, request_tokens: float) -> bool:
        """Whether the request, fully grown, still fits beside what is in flight, fully grown."""
        if self._kv_tokens is None:
            return True
        return committed_tokens + request_tokens <= KV_ADMIT_FRACTION * self._kv_tokens

    def load_changed(self, in_flight: int) -> None:
        """Note how many sequences are in flight."""
        self._in_flight = in_flight
        self._step.max_in_flight = max(self._step.max_in_flight, in_flight)

    def completed(self, response: ResponseMetrics, now: float) -> None:
        """Count one answer towards the turnover; a refusal is an emergency, other failures are nothing."""
        self._step.requests += 1
        if response.congested:
            self._emergency()
        elif response.counted:
            if self._settle > 0:
                self._settle -= 1
            else:
                self._epoch.completions += 1

    def commit_happened(self, now: float) -> None:
        """Skip readings for a turnover, but at most a quarter of the time between commits.

        A run that publishes more often than a sequence takes would otherwise never be measured.
        """
        quiet_s = self._turnover.seconds or MAX_GAP_PERIODS * self._period_s
        if self._last_commit is not None and now > self._last_commit:
            quiet_s = min(quiet_s, QUIET_SHARE * (now - self._last_commit))
        self._quiet_until = max(self._quiet_until, now + quiet_s)
        self._last_commit = now
        if self.phase is not Phase.PROBE:
            self._base.clear()
        elif self._probe_restarts < MAX_PROBE_RESTARTS:
            self._probe_restarts += 1
            self._abandon_probe()
            self._base.clear()

    def observe(self, sample: Observation) -> None:
        """Take a reading; decides when it completes a turnover."""
        last, self._last = self._last, sample
        self._unit = max(sample.unit, 1)
        if last is None:
            return
        if sample.version != last.version and (self._last_commit is None or self._last_commit < last.now):
            self.commit_happened(sample.now)
        if sample.now - last.now > MAX_GAP_PERIODS * self._period_s:
            self._begin(self.phase)
            return
        if sample.now < self._quiet_until:
            return
        self._watch_for_emergency(last, sample)
        if self._settle > 0:
            return
        self._measure(last, sample)
        epoch = self._epoch
        turnovers = PROBE_TURNOVERS if self.phase is Phase.PROBE else 1
        if epoch.completions >= turnovers * epoch.window and epoch.readings >= turnovers * MIN_READINGS:
            self._turnover.learn(epoch)
            self._decide(epoch)

    def step_completed(self) -> dict[str, float]:
        """The step's numbers: window, knee, level, mean rate (tokens/s), requests, probes, emergencies."""
        step, self._step = self._step, _Counters(max_in_flight=self._in_flight)
        return {
            "window": self.window,
            "requests": step.requests,
            "max_in_flight": step.max_in_flight,
            "pending_decrease": max(0, self._in_flight - self.window),
            "knee": min(self._knee, self.max_window),
            "level": self.level,
            "tokens_per_s": sum(step.rates) / len(step.rates) if step.rates else 0.0,
            "probes": step.probes,
            "emergencies": step.emergencies,
        }

    # --- measuring ---------------------------------------------------------------------------------------

    def _measure(self, last: Observation, sample: Observation) -> None:
        epoch = self._epoch
        epoch.readings += 1
        epoch.seconds += sample.now - last.now
        epoch.tokens += max(sample.generated_tokens - last.generated_tokens, 0)
        epoch.waiting_ratios.append(sample.waiting / max(sample.running, 1))
        epoch.max_kv_usage = max(epoch.max_kv_usage, sample.kv_usage)
        epoch.binding += sample.demand or sample.in_flight >= BINDING_FRACTION * epoch.window

    def _begin(self, phase: Phase) -> None:
        """Start a measurement at the present window, after what is in flight has had time to react."""
        self.phase = phase
        self._epoch = _Epoch(self.window)
        self._settle = round(SETTLE_FRACTION * self.window)

    def _watch_for_emergency(self, last: Observation, sample: Observation) -> None:
        if self._draining and last.in_flight <= self.window:
            self._draining = False
        if sample.preemptions > last.preemptions or sample.kv_usage > KV_EMERGENCY:
            self._emergency()

    def _emergency(self) -> None:
        """Cut once; the next cut waits until the excess of this one has drained and the trouble is still there."""
        if self._draining:
            return
        self._draining = True
        self._step.emergencies += 1
        window = self._base[-1].window if self.phase is Phase.PROBE else self._window
        self._move_knee(min(window, max(self._in_flight, self.min_window)) * EMERGENCY_FACTOR)
        self._turnovers = 0
        self._begin(Phase.CRUISE)

    # --- deciding ----------------------------------------------------------------------------------------

    def _decide(self, epoch: _Epoch) -> None:
        self._step.rates.append(epoch.rate)
        if not epoch.binds:
            if self.phase is Phase.PROBE:
                self._abandon_probe()
            else:
                self._begin(self.phase)
            return
        match self.phase:
            case Phase.SLOW_START:
                self._slow_start(epoch)
            case Phase.CRUISE:
                self._cruise(epoch)
            case Phase.PROBE:
                self._verdict(epoch)

    def _slow_start(self, epoch: _Epoch) -> None:
        gain = epoch.rate / self._previous_rate if self._previous_rate else float("inf")
        if gain < SLOW_START_MIN_GAIN:
            self._settle_on(self._previous_window, level=min(1.0, 1 / gain))
        elif epoch.waiting_ratio > TARGET_WAITING_RATIO:
            self._settle_on(epoch.window / (1 + epoch.waiting_ratio))
        elif epoch.max_kv_usage > SLOW_START_MAX_KV or epoch.window >= self.max_window:
            self._settle_on(epoch.window)
        else:
            self._double(epoch)

    def _double(self, epoch: _Epoch) -> None:
        self._previous_rate, self._previous_window = epoch.rate, epoch.window
        self._move_knee(2 * epoch.window)
        self._begin(Phase.SLOW_START)

    def _settle_on(self, window: float, level: float = 1.0) -> None:
        """Slow start knows the knee to a factor of two: the first probe comes at once."""
        self._move_knee(window)
        self.level = level
        self._probe_down = level >= MIN_LEVEL
        self._turnovers = TURNOVERS_BETWEEN_PROBES
        self._begin(Phase.CRUISE)

    def _cruise(self, epoch: _Epoch) -> None:
        self._turnovers += 1
        error = TARGET_WAITING_RATIO - epoch.waiting_ratio
        change = min(max(CRUISE_GAIN * error, -CRUISE_MAX_CHANGE), CRUISE_MAX_CHANGE)
        self._set(min(self._window * (1 + change), self._knee))
        self._base.append(epoch)
        if self.window != epoch.window:
            self._base.clear()
        elif self._turnovers >= TURNOVERS_BETWEEN_PROBES and not self._draining:
            self._probe(epoch.window)
            return
        self._begin(Phase.CRUISE)

    def _probe(self, base: int) -> None:
        """Go one step off the cruising window; at a bound, look the other way next time."""
        step = max(PROBE_STEP * base, self._unit, 1)
        target = round(base - step if self._probe_down else base + step)
        target = min(max(target, self.min_window, self._unit), self.max_window)
        if target == base:
            self._end_probe(base, kept=False)
            return
        self._step.probes += 1
        self._set(target)
        self._begin(Phase.PROBE)

    def _verdict(self, leg: _Epoch) -> None:
        """Compare a step with the turnovers before it."""
        base = self._base[-1].window
        seconds = sum(epoch.seconds for epoch in self._base)
        base_rate = sum(epoch.tokens for epoch in self._base) / seconds if seconds > 0 else 0.0
        if base_rate <= 0 or leg.rate <= 0:
            self._abandon_probe()
            return
        ratio = leg.rate / base_rate
        size = abs(leg.window - base) / base
        if leg.window < base:
            loss = MAX_LOSS_PER_STEP * size / PROBE_STEP
            kept = ratio >= 1 - loss and self.level * ratio >= MIN_LEVEL
        else:
            self._learn_level(ratio)
            gain = MIN_GAIN_PER_STEP * size / PROBE_STEP
            kept = ratio >= 1 + gain or (self.level < MIN_LEVEL and ratio > 1)
        if kept:
            self.level = min(1.0, self.level * ratio)
        if ratio >= 1 + STEEP_GAIN * size and leg.window > base and leg.waiting_ratio <= TARGET_WAITING_RATIO:
            self._probe_restarts = 0
            self._double(leg)
        else:
            self._end_probe(leg.window if kept else base, kept)

    def _learn_level(self, ratio_up: float) -> None:
        """What a step up says about the share of the peak that the base window has."""
        self.level = min(self.level, 1 / ratio_up)
        if ratio_up <= 1 + FLAT_GAIN:
            self.level += 0.5 * (1 - self.level)

    def _end_probe(self, window: int, kept: bool) -> None:
        """Cruise at `window`; a step that was worth taking is soon followed by another in the same direction."""
        self._move_knee(window)
        self._probe_restarts = 0
        if not kept:
            self._probe_down = not self._probe_down
        self._turnovers = TURNOVERS_BETWEEN_PROBES - 1 if kept else 0
        self._begin(Phase.CRUISE)

    def _abandon_probe(self) -> None:
        """Back to the cruising window, and probe again after the next turnover."""
        self._set(self._base[-1].window)
        self._turnovers = TURNOVERS_BETWEEN_PROBES - 1
        self._begin(Phase.CRUISE)

    def _move_knee(self, window: float) -> None:
        self._set(window)
        self._knee = self._window
        self._base.clear()

    def _set(self, window: float) -> None:
        self._window = min(max(window, float(self.min_window)), float(self.max_window))
