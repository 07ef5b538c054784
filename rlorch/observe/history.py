"""A run's past, read back for drawing: its metrics by name, and what each role did when."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlorch.observe.charts import Bar, Series
from rlorch.observe.trace import read_trace

Rows = Sequence[tuple[int, Mapping[str, float]]]


class History:
    """The metrics of a run by name; remembers which names were drawn, so that the rest can follow."""

    def __init__(self, rows: Rows) -> None:
        self.names = sorted({name for _, values in rows for name in values})
        self.last_step = rows[-1][0] if rows else 0
        self._rows = rows
        self.drawn: set[str] = set()

    def points(self, name: str, x: str | None = None) -> list[tuple[float, float]]:
        """(step, value) of one metric; `x` names another metric to use as the step."""
        self.drawn.add(name)
        return [(values.get(x or "", float(step)), values[name]) for step, values in self._rows if name in values]

    def finite(self, name: str) -> list[float]:
        """The finite values of one metric, in order."""
        return [values[name] for _, values in self._rows if math.isfinite(values.get(name, math.nan))]

    def mean(self, name: str) -> float | None:
        """Mean over the steps that have it."""
        values = self.finite(name)
        return math.fsum(values) / len(values) if values else None

    def series(self, *named: tuple[str, str, str]) -> list[Series]:
        """Lines from (metric, label, colour)."""
        return [Series(label, self.points(name), colour) for name, label, colour in named]


def role_bars(path: Path) -> dict[str, list[Bar]]:
    """The spans of each role from a trace file, seconds; a span without an end lasts to the last event."""
    names: dict[int, str] = {}
    bars: dict[int, list[Bar]] = {}
    open_at: dict[tuple[int, int], list[tuple[float, str, bool]]] = {}
    last = 0.0
    for event in read_trace(path) if path.exists() else ():
        kind, pid, time_s = event["ph"], event["pid"], event["ts"] / 1e6
        last = max(last, time_s)
        if kind == "M" and event["name"] == "process_name":
            names[pid] = event["args"]["name"]
        elif kind == "B":
            open_at.setdefault((pid, event["tid"]), []).append((time_s, event["name"], event.get("cat") != "wait"))
        elif kind == "E" and open_at.get((pid, event["tid"])):
            start, name, busy = open_at[pid, event["tid"]].pop()
            bars.setdefault(pid, []).append(Bar(start, time_s, name, busy))
    for (pid, _), stack in open_at.items():
        bars.setdefault(pid, []).extend(Bar(start, last, name, busy) for start, name, busy in stack)
    return {names.get(pid, f"role {pid}"): found for pid, found in sorted(bars.items())}
