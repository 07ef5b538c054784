"""Charts as inline SVG inside HTML figures: lines, stacked columns, timelines. Pure; colours come from the page's CSS.

A chart is a `<figure class="card">` with its title, legend and numbers as text, so that it reads without JavaScript;
the page's script only adds the values under the pointer, from `data-chart`.
"""

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from rlorch.observe.units import bytes_text, number_text, percent_text, seconds_text

Kind = Literal["number", "percent", "bytes", "seconds"]
FORMATS: dict[Kind, Callable[[float], str]] = {
    "number": number_text,
    "percent": percent_text,
    "bytes": bytes_text,
    "seconds": seconds_text,
}

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 24  # margins of the plot, for the axis texts
MAX_POINTS = 400
MAX_COLUMNS = 110
MAX_COLUMN_WIDTH = 40
BINS = 1000  # columns of a timeline

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (step, value) by rising step; `colour` is a class of the stylesheet (c1..c8)."""

    name: str
    points: Sequence[Point]
    colour: str
    look: Literal["line", "dots", "smooth"] = "line"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def decimate(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: means of equal stretches of the finite ones."""
    kept = _finite(points)
    if len(kept) <= limit:
        return kept
    edges = [index * len(kept) // limit for index in range(limit + 1)]
    parts = (kept[a:b] for a, b in itertools.pairwise(edges))
    return [(math.fsum(x for x, _ in p) / len(p), math.fsum(y for _, y in p) / len(p)) for p in parts]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the points, corrected for its start."""
    keep = 1 - 1 / max(len(points) / 20, 2)
    total, weight, out = 0.0, 0.0, list[Point]()
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if rough <= power * factor * 1.4)
    first = math.ceil(low / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))  # 0.30000000000000004 is 0.3
    return [round(index * step, digits) for index in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Maps data to pixels, and draws the grid."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], kind: Kind, log: bool, zero: bool) -> None:
        self.kind: Kind = kind
        self.x_low, self.x_high = min(xs), max(xs)
        low, high = min(ys), max(ys)
        self.log = log and low > 0 and high / low > 20
        if zero and not self.log:
            low = min(low, 0.0)
        pad = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        self.y_low = low / 1.2 if self.log else low if low == 0 else low - pad
        self.y_high = high * 1.2 if self.log else high + pad
        if kind == "percent" and 0.9 < high <= 1:
            self.y_high = 1.0

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low
        share = (value - self.x_low) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        parts: list[str] = []
        for value in self._y_ticks():
            y = self.y(value)
            text = html.escape(FORMATS[self.kind](value))
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        whole = [value for value in ticks(self.x_low, self.x_high, 6) if value == int(value)]
        parts += [
            f'<text x="{self.x(value):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{int(value):,}</text>'
            for value in whole
        ]
        return "".join(parts)

    def _y_ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.y_low, self.y_high)
        decades = range(math.floor(math.log10(self.y_low)), math.ceil(math.log10(self.y_high)) + 1)
        factors = (1, 2, 5) if len(decades) < 5 else (1,)
        every = [10.0**decade * factor for decade in decades for factor in factors]
        return [value for value in every if self.y_low <= value <= self.y_high]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    kind: Kind = "number",
    log: bool = False,
    zero: bool = False,
    note: str = "",
) -> str:
    """Curves over steps; "" when no series has a finite point. `log` applies where the values span a factor of 20."""
    shown = [Series(s.name, decimate(s.points, MAX_POINTS), s.colour, s.look) for s in series if _finite(s.points)]
    if not shown:
        return ""
    points = [point for s in shown for point in s.points]
    axes = _Axes([x for x, _ in points], [y for _, y in points], kind, log, zero)
    return _figure(title, shown, axes, "".join(_curve(s, axes) for s in shown), note)


def _curve(series: Series, axes: _Axes) -> str:
    def path(points: Sequence[Point], extra: str) -> str:
        steps = "".join(f"{'L' if i else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}" for i, (x, y) in enumerate(points))
        return f'<path class="line {series.colour}{extra}" d="{steps}"/>'

    def dot(point: Point) -> str:
        return f'<circle class="dot {series.colour}" cx="{axes.x(point[0]):.1f}" cy="{axes.y(point[1]):.1f}" r="2.8"/>'

    if len(series.points) == 1:
        return dot(series.points[0])
    if series.look == "smooth" and len(series.points) >= 20:
        return path(series.points, " faint") + path(smooth(series.points), "")
    dots = "".join(map(dot, series.points)) if series.look == "dots" and len(series.points) <= 60 else ""
    return path(series.points, "") + dots


def stacked_columns(title: str, series: Sequence[Series], *, kind: Kind = "number", note: str = "") -> str:
    """Columns over steps, the first series at the bottom; a missing value is 0. "" when nothing is finite."""
    xs = sorted({x for s in series for x, _ in _finite(s.points)})
    if not xs:
        return ""
    shown: list[Series] = []
    for s in series:
        at = dict(_finite(s.points))
        shown.append(Series(s.name, decimate([(x, at.get(x, 0.0)) for x in xs], MAX_COLUMNS), s.colour, s.look))
    columns = [sum(y for _, y in stack) for stack in zip(*(s.points for s in shown), strict=True)]
    axes = _Axes([x for x, _ in shown[0].points], [0.0, max(columns)], kind, log=False, zero=True)
    # Half a column of room at both ends, so that the outer columns are whole.
    half = (axes.x_high - axes.x_low) / max(len(columns) - 1, 1) / 2 or 0.5
    axes.x_low, axes.x_high = axes.x_low - half, axes.x_high + half
    room = (WIDTH - LEFT - RIGHT) / len(columns)
    gap = 1.0 if room > 4 else 0.0
    bars: list[str] = []
    for stack in zip(*(s.points for s in shown), strict=True):
        base = 0.0
        for s, (x, y) in zip(shown, stack, strict=True):
            top, bottom = axes.y(base + y), axes.y(base)
            base += y
            if bottom - top > 0.05:
                width = min(room - gap, MAX_COLUMN_WIDTH)
                box = f'x="{axes.x(x) - width / 2:.1f}" y="{top:.1f}" width="{width:.2f}" height="{bottom - top:.1f}"'
                bars.append(f'<rect class="bar {s.colour}" {box}/>')
    return _figure(title, shown, axes, "".join(bars), note)


def _figure(title: str, series: Sequence[Series], axes: _Axes, body: str, note: str) -> str:
    text = FORMATS[axes.kind]
    legend = "".join(_key(s.colour, s.name, text(s.points[-1][1])) for s in series)
    data = {
        "kind": axes.kind,
        "x": [axes.x_low, axes.x_high, LEFT, WIDTH - RIGHT],
        "series": [
            {"name": s.name, "colour": s.colour, "points": [[round(x, 2), float(f"{y:.5g}")] for x, y in s.points]}
            for s in series
        ],
    }
    scale = ' <span class="muted">(log)</span>' if axes.log else ""
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<figure class="card chart" data-chart="{html.escape(orjson.dumps(data).decode())}">'
        f"<figcaption><h3>{html.escape(title)}{scale}</h3><div class=legend>{legend}</div></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{axes.grid()}{body}'
        f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
        f"{caption}</figure>"
    )


def _key(colour: str, name: str, value: str = "") -> str:
    number = f" <b>{html.escape(value)}</b>" if value else ""
    return f'<span class="key"><i class="{colour}"></i>{html.escape(name)}{number}</span>'


# --- timelines --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of a role on a timeline, in seconds; `busy` false is a wait."""

    start: float
    stop: float
    phase: str
    busy: bool


def timeline(
    title: str,
    rows: Mapping[str, Sequence[Bar]],
    window: tuple[float, float],
    colours: Mapping[str, str],
    note: str = "",
) -> str:
    """One row per role over `window` seconds: the colour is the phase that took most of a column's time, its strength
    the share of the column that was busy; waits are hatched. "" when there is nothing to draw."""
    start, stop = window
    if stop <= start or not rows:
        return ""
    left, row_height, width = 120, 24, 1160
    scale = (width - left - 10) / (stop - start)
    height = row_height * len(rows) + 22
    parts: list[str] = []
    for value in ticks(start, stop, 10):
        x = left + (value - start) * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number_text(value)} s</text>')
    for index, (role, bars) in enumerate(rows.items()):
        y = index * row_height + 3
        name = html.escape(role if len(role) <= 18 else role[:17] + "…")
        parts.append(f'<text class="role" x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        for a, b, phase, strength in _runs(bars, start, stop):
            x0, x1 = left + (a - start) * scale, left + (b - start) * scale
            look = f"bar {colours.get(phase, 'c8')}" if strength else "wait"
            opacity = f' opacity="{strength:.1f}"' if 0 < strength < 1 else ""
            box = f'x="{x0:.1f}" y="{y}" width="{max(x1 - x0, 0.3):.1f}" height="{row_height - 6}"'
            parts.append(f'<rect class="{look}" {box}{opacity}><title>{html.escape(f"{role}: {phase}")}</title></rect>')
    seen = {bar.phase for bars in rows.values() for bar in bars if bar.busy and bar.stop > start and bar.start < stop}
    keys = "".join(_key(colour, phase.replace("_", " ")) for phase, colour in colours.items() if phase in seen)
    caption = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<figure class="card wide"><figcaption><h3>{html.escape(title)}</h3><div class=legend>{keys}'
        f"{_key('wait', 'waits')}</div></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f"{caption}</figure>"
    )


def _runs(bars: Sequence[Bar], start: float, stop: float) -> list[tuple[float, float, str, float]]:
    """(from, to, phase, strength 0.2..1, 0 for a wait) for stretches of equal columns that hold something."""
    bin_s = (stop - start) / BINS
    busy: list[dict[str, float]] = [{} for _ in range(BINS)]
    waits: list[dict[str, float]] = [{} for _ in range(BINS)]
    for bar in bars:
        a, b = max(bar.start, start), min(bar.stop, stop)
        if b <= a:
            continue
        into = busy if bar.busy else waits
        for index in range(int((a - start) / bin_s), min(int((b - start) / bin_s), BINS - 1) + 1):
            edge = start + index * bin_s
            held = min(b, edge + bin_s) - max(a, edge)
            into[index][bar.phase] = into[index].get(bar.phase, 0.0) + held
    cells = [_cell(busy[index], waits[index], bin_s) for index in range(BINS)]
    runs: list[tuple[float, float, str, float]] = []
    index = 0
    for cell, same in itertools.groupby(cells):
        length = len(list(same))
        if cell:
            runs.append((start + index * bin_s, start + (index + length) * bin_s, *cell))
        index += length
    return runs


def _cell(busy: Mapping[str, float], waits: Mapping[str, float], bin_s: float) -> tuple[str, float] | None:
    share = min(sum(busy.values()) / bin_s, 1.0)
    if share >= 0.05:
        return max(busy, key=lambda phase: busy[phase]), max(0.2, round(share * 5) / 5)
    return (max(waits, key=lambda phase: waits[phase]), 0.0) if sum(waits.values()) / bin_s >= 0.05 else None
