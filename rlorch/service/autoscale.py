"""How many replicas a deployment should have. Pure: `now` and the load are arguments.

    waiting for `up_after_s`            one more, or as many as the requests fill, up to `max_replicas`
    little to do for `down_after_s`     one fewer, down to `min_replicas` and at least one
    nothing at all for `idle_timeout_s` none, where `min_replicas` is 0
    anything waits and there is none    one, at once

Up and down are apart (hysteresis): up needs a queue, down needs that the others would be filled to no more than
`LOW_FILL`. After a change nothing changes for `cooldown_s`, except that zero wakes at once. A replica that is still
starting counts, so a queue does not start one replica after another before the first has had a chance.
"""

from dataclasses import dataclass
from math import ceil

LOW_FILL = 0.5
"""Share of the capacity of one replica fewer below which one is too many: room to spare, or it comes straight back."""


@dataclass(frozen=True, slots=True)
class ScaleLimits:
    """Bounds and delays, seconds. `idle_timeout_s` None never scales to zero."""

    min_replicas: int
    max_replicas: int
    idle_timeout_s: float | None = None
    up_after_s: float = 5.0
    down_after_s: float = 120.0
    cooldown_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ScaleLoad:
    """Requests that wait and that run, the requests that one replica runs at once, and the replicas that serve."""

    waiting: int
    running: int
    capacity: int
    ready: int


class Autoscaler:
    """The desired count of replicas of one deployment."""

    def __init__(self, desired: int, now: float) -> None:
        self.desired = desired
        self._changed_at = float("-inf")
        self._queued_since: float | None = None
        self._spare_since: float | None = None
        self._busy_at = now

    def touch(self, now: float) -> None:
        """Something else than a request needs the replicas (a hot load): the idle time starts again."""
        self._busy_at = now

    def set(self, desired: int, now: float) -> None:
        """Somebody decided by hand."""
        if desired != self.desired:
            self._change(desired, now)
        self._changed_at = float("-inf")  # a hand is followed by no cool-down: the next request wakes
        self._busy_at = now

    def decide(self, now: float, load: ScaleLoad, limits: ScaleLimits) -> int:
        """Take a reading; the desired count from now on."""
        if load.waiting or load.running:
            self._busy_at = now
        if self.desired == 0 and load.waiting:
            self._change(self._bounded(1, limits), now)
        elif self.desired < limits.min_replicas or self.desired > limits.max_replicas:
            self._change(min(max(self.desired, limits.min_replicas), limits.max_replicas), now)
        elif self.desired:
            self._read(now, load, limits)
        return self.desired

    def _read(self, now: float, load: ScaleLoad, limits: ScaleLimits) -> None:
        queued = load.waiting > 0 and load.ready >= self.desired
        self._queued_since = _since(self._queued_since, queued, now)
        busy = load.waiting + load.running
        spare = busy <= LOW_FILL * load.capacity * (self.desired - 1)
        self._spare_since = _since(self._spare_since, spare, now)
        idle = limits.idle_timeout_s
        if limits.min_replicas == 0 and idle is not None and busy == 0 and now - self._busy_at >= idle:
            self._change(0, now)
        elif now - self._changed_at < limits.cooldown_s:
            return
        elif self._queued_since is not None and now - self._queued_since >= limits.up_after_s:
            filled = ceil(busy / max(load.capacity, 1))
            self._change(self._bounded(max(self.desired + 1, filled), limits), now)
        elif self._spare_since is not None and now - self._spare_since >= limits.down_after_s:
            self._change(self._bounded(self.desired - 1, limits), now)

    def _bounded(self, desired: int, limits: ScaleLimits) -> int:
        return min(max(desired, limits.min_replicas, 1), max(limits.max_replicas, 1))

    def _change(self, desired: int, now: float) -> None:
        if desired != self.desired:
            self.desired, self._changed_at = desired, now
            self._busy_at = max(self._busy_at, now) if desired else self._busy_at
        self._queued_since = self._spare_since = None


def _since(since: float | None, holds: bool, now: float) -> float | None:
    """When a condition began to hold; None when it does not."""
    if not holds:
        return None
    return now if since is None else since
