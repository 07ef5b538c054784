"""What every role of a run is doing, and how long it has done what: spans, totals, and a Chrome/Perfetto trace.

Owns `trace.json` and the busy and wait seconds of each role.

Invariants
* No clock of its own: `clock` is an argument, in seconds, never going back.
* Memory is bounded: events stream to the file, and only totals per (role, phase) and the open spans are kept.
* The file is a valid JSON array after every flush: each flush overwrites the closing bracket and writes it again. A
  crash in the middle of a flush leaves a truncated array, which Perfetto, chrome://tracing and `read_trace` accept.
* Tracing never hurts a run: when the file cannot be written, writing stops with one warning and the totals go on.

Algorithm: a role is a trace process. Its open spans sit in lanes (trace threads), each in the lowest free one, so
that overlapping spans of one role never break the nesting that B/E events need. Union-busy time is the time with at
least one open busy span: it starts when their number leaves 0 and is added up when it returns there. Event format:
"Trace Event Format", Google, 2016, JSON array form.
"""

import heapq
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import orjson

log = logging.getLogger(__name__)

MAX_TRACE_BYTES = 256 * 2**20  # Perfetto's UI stays quick below about this size
FLUSH_EVENTS = 64
FLUSH_S = 0.25
CLOSING = b"\n]\n"
JSON_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


@dataclass(frozen=True, slots=True)
class Activity:
    """What a role does (`busy`) or waits for now, since `seconds`; `open_spans` counts all its open spans."""

    role: str
    phase: str
    busy: bool
    seconds: float
    detail: str
    open_spans: int

    def __str__(self) -> str:
        if self.busy:
            words = f"{self.phase} {self.detail}".rstrip()
        else:
            words = f"waits for {self.detail or self.phase}"
        return f"{self.role}: {words} ({self.seconds:.1f} s)"


class Span:
    """One use of `Tracer.span`: a context manager, entered once. `note` says more while it is open."""

    __slots__ = ("_tracer", "args", "busy", "detail", "lane", "name", "role", "start", "written")

    def __init__(self, tracer: "Tracer", role: str, name: str, busy: bool, args: dict[str, Any]) -> None:
        self._tracer = tracer
        self.role = role
        self.name = name
        self.busy = busy
        self.args = args
        self.detail = " ".join(f"{key} {value}" for key, value in args.items())
        self.start = 0.0
        self.lane = -1
        self.written = False

    def note(self, detail: str) -> None:
        """Replace the words of the live view, such as "5 of 32 groups"."""
        self.detail = detail

    def __enter__(self) -> "Span":
        self._tracer._begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tracer._end(self, kind.__name__ if kind else None)


@dataclass(slots=True)
class _Phase:
    busy_s: float = 0.0
    wait_s: float = 0.0
    count: int = 0
    max_s: float = 0.0
    open: int = 0
    since: float = 0.0
    active_s: float = 0.0


@dataclass(slots=True)
class _Role:
    pid: int
    phases: dict[str, _Phase] = field(default_factory=dict[str, _Phase])
    open: list[Span] = field(default_factory=list[Span])
    busy_open: int = 0
    busy_since: float = 0.0
    busy_s: float = 0.0
    free_lanes: list[int] = field(default_factory=list[int])
    lanes: int = 0

    def busy_until(self, now: float) -> float:
        return self.busy_s + (now - self.busy_since if self.busy_open else 0.0)


class Tracer:
    """Records spans of roles. May be called from the event loop and from threads at once.

    Args:
        clock: seconds, monotonic (the loop's `time` or `time.perf_counter`).
        path: the trace file; None keeps totals only. An existing file moves to `trace-<n>.json`.
        max_bytes: the file stops growing here; totals go on.
    """

    def __init__(
        self, clock: Callable[[], float], path: Path | None = None, *, max_bytes: int = MAX_TRACE_BYTES
    ) -> None:
        self._clock = clock
        self._origin = clock()
        self._lock = threading.Lock()
        self._roles: dict[str, _Role] = {}
        self._file = _TraceFile(path, max_bytes) if path else None
        self._flushed_at = self._origin

    def span(self, role: str, name: str, *, busy: bool = True, **args: Any) -> Span:
        """`with tracer.span("trainer", "forward_backward", step=12): ...`, also around awaits.

        `name` is one of a few constants (it keys the totals); what varies goes into `args`. `busy=False` is a wait,
        and `name` then says for what. Spans of one role may overlap; do not put a wait inside a busy span.
        """
        return Span(self, role, name, busy, args)

    def instant(self, role: str, name: str, **args: Any) -> None:
        """A moment: a commit, a drop, a crash."""
        with self._lock:
            pid = self._role(role).pid
            self._write({"ph": "i", "name": name, "pid": pid, "tid": 0, "s": "p", "args": args}, self._clock())

    def counter(self, name: str, values: Mapping[str, float]) -> None:
        """A track of numbers over time, such as the pool's window, running and queued requests."""
        with self._lock:
            self._write({"ph": "C", "name": name, "pid": 0, "tid": 0, "args": dict(values)}, self._clock())

    def busy_seconds(self, role: str) -> float:
        """Seconds with at least one open busy span of `role`, up to now; 0 for a role never seen."""
        with self._lock:
            state = self._roles.get(role)
            return state.busy_until(self._clock()) if state else 0.0

    def activities(self) -> dict[str, Activity]:
        """What each role does or waits for now, by role: its most recently begun span. Idle roles are left out."""
        with self._lock:
            now = self._clock()
            return {
                role: Activity(role, last.name, last.busy, now - last.start, last.detail, len(state.open))
                for role, state in self._roles.items()
                if state.open
                for last in state.open[-1:]
            }

    def summary(self) -> dict[str, Any]:
        """Totals since the start, for JSON; open spans count for unions (a role's `busy_s`, `active_s`), not for sums.

        `{"elapsed_s": s, "roles": {role: {"busy_s": s, "busy_fraction": f,
        "phases": {name: {"busy_s": s, "wait_s": s, "active_s": s, "count": n, "max_s": s}}}}}`

        A phase's `busy_s` and `wait_s` add up its spans; `active_s` is the time with at least one of them open.
        """
        with self._lock:
            now = self._clock()
            elapsed = now - self._origin
            roles = {
                role: {
                    "busy_s": state.busy_until(now),
                    "busy_fraction": state.busy_until(now) / elapsed if elapsed > 0 else 0.0,
                    "phases": {
                        name: {
                            "busy_s": p.busy_s,
                            "wait_s": p.wait_s,
                            "active_s": p.active_s + (now - p.since if p.open else 0.0),
                            "count": p.count,
                            "max_s": p.max_s,
                        }
                        for name, p in state.phases.items()
                    },
                }
                for role, state in self._roles.items()
            }
            return {"elapsed_s": elapsed, "roles": roles}

    def flush(self) -> None:
        """Write what is buffered: call it once per step, so that a hang is in the file."""
        with self._lock:
            self._flush(self._clock())

    def close(self) -> None:
        """Flush and close the file. Idempotent; spans after it count in the totals only."""
        with self._lock:
            self._flush(self._clock())
            if self._file:
                self._file.close()

    # The rest runs with the lock held.

    def _begin(self, span: Span) -> None:
        with self._lock:
            assert span.lane < 0, f"the span {span.role}/{span.name} was entered twice"
            now = self._clock()
            state = self._role(span.role)
            if state.free_lanes:
                span.lane = heapq.heappop(state.free_lanes)
            else:
                span.lane, state.lanes = state.lanes, state.lanes + 1
            span.start = now
            state.open.append(span)
            if span.busy:
                if not state.busy_open:
                    state.busy_since = now
                state.busy_open += 1
            phase = state.phases.setdefault(span.name, _Phase())
            if not phase.open:
                phase.since = now
            phase.open += 1
            category = "busy" if span.busy else "wait"
            event = {"ph": "B", "name": span.name, "cat": category, "pid": state.pid, "tid": span.lane}
            span.written = self._write({**event, "args": span.args}, now)

    def _end(self, span: Span, error: str | None) -> None:
        with self._lock:
            now = self._clock()
            state = self._roles[span.role]
            state.open.remove(span)
            heapq.heappush(state.free_lanes, span.lane)
            phase = state.phases[span.name]
            seconds = now - span.start
            phase.open -= 1
            if not phase.open:
                phase.active_s += now - phase.since
            phase.count += 1
            phase.max_s = max(phase.max_s, seconds)
            if span.busy:
                phase.busy_s += seconds
                state.busy_open -= 1
                if not state.busy_open:
                    state.busy_s += now - state.busy_since
            else:
                phase.wait_s += seconds
            if span.written:
                args = {"error": error} if error else {}
                self._write({"ph": "E", "pid": state.pid, "tid": span.lane, "args": args}, now, closing=True)

    def _role(self, role: str) -> _Role:
        state = self._roles.get(role)
        if state is None:
            state = self._roles[role] = _Role(pid=len(self._roles) + 1)
            for name, args in (
                ("process_name", {"name": role}),
                ("process_sort_index", {"sort_index": state.pid}),
            ):
                self._write({"ph": "M", "name": name, "pid": state.pid, "tid": 0, "args": args}, self._origin)
        return state

    def _write(self, event: dict[str, Any], now: float, *, closing: bool = False) -> bool:
        if self._file is None:
            return False
        event["ts"] = round((now - self._origin) * 1e6, 3)
        taken = self._file.add(event, closing)
        if self._file.buffered >= FLUSH_EVENTS or now - self._flushed_at >= FLUSH_S:
            self._flush(now)
        return taken

    def _flush(self, now: float) -> None:
        if self._file:
            self._flushed_at = now
            self._file.flush()


class _TraceFile:
    """The JSON array on disk. One write per flush; the closing bracket is overwritten by the next."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._buffer: list[bytes] = []
        self._file: BinaryIO | None = None
        self._end = 0
        self._full = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.rename(_unused(path))
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by close()
            self._file.write(b"[" + CLOSING)
            self._end = 1
        except OSError as error:
            self._give_up(error)

    @property
    def buffered(self) -> int:
        return len(self._buffer)

    def add(self, event: dict[str, Any], closing: bool) -> bool:
        if self._file is None or (self._full and not closing):
            return False
        if self._end > self._max_bytes and not self._full:
            self._full = True
            log.warning(f"{self._path} reached {self._max_bytes} bytes; it holds no later spans, the totals go on")
            if not closing:
                return False
        self._buffer.append(
            orjson.dumps(event, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
        )
        return True

    def flush(self) -> None:
        if self._file is None or not self._buffer:
            return
        body = (b"\n" if self._end == 1 else b",\n") + b",\n".join(self._buffer)
        self._buffer.clear()
        try:
            self._file.seek(self._end)
            self._file.write(body + CLOSING)
        except OSError as error:
            self._give_up(error)
        else:
            self._end += len(body)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        log.warning(f"the trace {self._path} cannot be written and ends here: {error}")
        self._buffer.clear()
        self.close()


def _unused(path: Path) -> Path:
    number = 1
    while (older := path.with_stem(f"{path.stem}-{number}")).exists():
        number += 1
    return older


def read_trace(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a trace file, in order, also of one that a crash truncated: a broken last line is left out.

    Raises:
        ValueError: a line before the last is not an event.
    """
    broken = ""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip().removesuffix(b",")
            if text in (b"[", b"]", b""):
                continue
            if broken:
                raise ValueError(f"{path}: {broken}")
            try:
                yield orjson.loads(text)
            except orjson.JSONDecodeError as error:
                broken = f"line {number} is not a trace event: {error}"
