"""Numbers as people read them: bytes, seconds, counts, shares; and a sparkline. Pure; console and report share it."""

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def bytes_text(count: float) -> str:
    """`1.2 MB`; decimal units, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{_three(count)} {unit}"
        count /= 1000
    return f"{_three(count)} TB"


def seconds_text(seconds: float) -> str:
    """`3.1 ms`, `4.2 s`, `12 min 05 s`, `3 h 20 min`."""
    if not math.isfinite(seconds):
        return "–"
    if seconds == 0:
        return "0 s"
    if abs(seconds) < 0.9995:
        return f"{_three(seconds * 1000)} ms"
    if abs(seconds) < 99.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def clock_text(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count_text(count: float) -> str:
    """`4,812`, `1.23 M`."""
    if abs(count) < 999_950:
        return f"{round(count):,}"
    for unit in ("M", "G"):
        count /= 1000 if unit == "G" else 1e6
        if abs(count) < 999.5:
            return f"{_three(count)} {unit}"
    return f"{_three(count / 1000)} T"


def number_text(value: float) -> str:
    """A metric's value: three or four significant digits, short."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def percent_text(fraction: float) -> str:
    """`46%`, `1.4%`; small shares keep a digit."""
    percent = 100 * fraction
    return f"{percent:.1f}%" if 0 < abs(percent) < 9.95 else f"{percent:.0f}%"


def _three(value: float) -> str:
    size = abs(value)
    if size >= 99.95 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2g}" if size < 0.1 else f"{value:.2f}".rstrip("0").rstrip(".")


def shrink(values: Sequence[float], width: int) -> list[float]:
    """At most `width` values: means of equal stretches, in order."""
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def stretch(values: Sequence[float], width: int) -> list[float]:
    """Exactly `width` values: each repeated about equally often, or `shrink` where there are more than `width`."""
    if len(values) > width:
        return shrink(values, width)
    return [values[index * len(values) // width] for index in range(width)] if values else []


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as blocks of rising height between their own minimum and maximum, at most `width` characters."""
    shown = shrink([value for value in values if math.isfinite(value)], max(width, 1))
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * len(shown)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((value - low) / (high - low) * top)] for value in shown)
