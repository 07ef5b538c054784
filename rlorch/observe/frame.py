"""The drawing of a run on a terminal: pure functions from a `RunView` or a `RunSummary` to something rich can print.

A header, then sections of rows, side by side when the terminal is wide; no line is ever longer than the width. What a
role waits for stands out (yellow), because that is where the time goes.
"""

from collections.abc import Iterable, Mapping, Sequence

import rich.console
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlorch.observe.trace import Activity
from rlorch.observe.units import bytes_text, clock_text, count_text, percent_text, seconds_text, sparkline, stretch
from rlorch.observe.view import Accuracy, RunSummary, RunView, SamplerView, seconds_by_phase

WIDE = 120  # columns from which the sections stand side by side
MAX_WIDTH = 200
MAX_SAMPLERS = 8
MAX_ROLES = 8
MAX_STALENESS_ROWS = 5
LABEL_WIDTH = 10

LABEL = "bright_black"
GOOD = "green"
WAITS = "yellow"
BAD = "bold red"
TRAIN = "blue"
HELD_OUT = "magenta"


def render(view: RunView, width: int) -> RenderableType:
    """The live view at `width` columns."""
    width = min(width, MAX_WIDTH)
    header = _header(view, width)
    if width < WIDE:
        inner = width - 2
        sections: list[RenderableType] = [_learning(view, inner), _work(view), _samplers(view), _flow(view)]
        body: RenderableType = Padding(Group(*_between(sections)), (0, 1))
    else:
        half = width // 2 - 2
        body = Table.grid(padding=(0, 1), expand=True)
        body.add_column(width=half)
        body.add_column(width=width - half - 6)
        left = Group(*_between([_learning(view, half), _flow(view)]))
        right = Group(*_between([_work(view), _samplers(view)]))
        body.add_row(left, Padding(right, (0, 0, 0, 2)))
        body = Padding(body, (0, 1))
    parts = [header, body]
    if view.messages:
        parts.append(Padding(_messages(view.messages), (1, 1, 0, 1)))
    return _Fixed(Group(*parts), width)


class _Fixed:
    """Draws at `width` columns, whatever the terminal has."""

    def __init__(self, content: RenderableType, width: int) -> None:
        self._content = content
        self._width = width

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        yield from console.render(self._content, options.update_width(min(self._width, options.max_width)))


def _between(sections: Sequence[RenderableType]) -> list[RenderableType]:
    """The sections with an empty line between them."""
    spaced = [part for section in sections for part in (Text(""), section)]
    return spaced[1:]


def _rows(rows: Iterable[tuple[str, RenderableType]]) -> Table:
    """A label column and a content column that never wraps."""
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(width=LABEL_WIDTH, style=LABEL, no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, content in rows:
        grid.add_row(label, content)
    return grid


def _line(*parts: str | tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _header(view: RunView, width: int) -> RenderableType:
    numbers = [f"version {view.version}", f"{count_text(view.tokens_per_s)} tokens/s"]
    if view.step_s:
        numbers.append(f"{seconds_text(view.step_s)} per step")
        left_s = (view.total_steps - view.step) * view.step_s
        numbers.append(f"{clock_text(left_s)} left" if left_s > 0 else "done")
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right", overflow="ellipsis")
    progress = ProgressBar(
        total=max(view.total_steps, 1), completed=view.step, complete_style=TRAIN, finished_style=GOOD, width=None
    )
    step = _line("step ", (str(view.step), "bold"), (f"/{view.total_steps}", LABEL))
    bar.add_row(step, progress, _line((clock_text(view.elapsed_s), "bold")))
    title = _line((view.name, "bold"), (f"  {view.model}", LABEL))
    title.truncate(width - 8, overflow="ellipsis")
    content = Group(bar, _line((" · ".join(numbers), LABEL)))
    return Panel(content, title=title, title_align="left", border_style=LABEL, padding=(0, 1), width=width)


# --- learning ---------------------------------------------------------------------------------------------


def _learning(view: RunView, width: int) -> RenderableType:
    room = max(width - LABEL_WIDTH - 26, 8)
    train = [value for _, value in view.reward_train]
    held_out = [value for _, value, _ in view.reward_held_out]
    greedy = [value for *_, value in view.reward_held_out if value is not None]
    axis = min(len(train), room)  # evaluations are drawn over the same columns as the steps between them
    curves = (
        ("training", train, train, TRAIN),
        ("held out", held_out, stretch(held_out, max(axis, len(held_out))), HELD_OUT),
        ("  greedy", greedy, stretch(greedy, max(axis, len(greedy))), HELD_OUT),
    )
    lines = [_curve(name, values, drawn, room, style) for name, values, drawn, style in curves if values]
    lines = lines or [_line(("no step has finished yet", LABEL))]
    rows = [("" if index else "reward", line) for index, line in enumerate(lines)]
    rows += [("" if index else "staleness", line) for index, line in enumerate(_staleness(view, room))]
    return _rows(rows)


def _curve(name: str, values: Sequence[float], drawn: Sequence[float], room: int, style: str) -> Text:
    start = f"{values[0]:.2f} → " if len(values) > 1 else ""
    return _line(
        f"{name} ", (f"{start:>8}", LABEL), (f"{values[-1]:>5.2f} ", f"bold {style}"), (sparkline(drawn, room), style)
    )


def _staleness(view: RunView, room: int) -> list[Text]:
    total = sum(view.staleness.values())
    if not total:
        return [_line(("nothing trained yet", LABEL))]
    last = MAX_STALENESS_ROWS - 1
    counts = dict.fromkeys(range(min(max(view.staleness), last) + 1), 0)
    for staleness, count in view.staleness.items():
        counts[min(staleness, last)] += count
    rows: list[Text] = []
    for staleness, count in counts.items():
        more = "+" if staleness == last and max(view.staleness) > last else " "
        bar = "▆" * round(count / total * room) or ("▏" if count else "")
        style = TRAIN if staleness < 2 else WAITS
        rows.append(_line(f"{staleness}{more} ", (f"{percent_text(count / total):>5} ", "bold"), (bar, style)))
    return rows


# --- work -------------------------------------------------------------------------------------------------


def _work(view: RunView) -> RenderableType:
    replicas = {sampler.name for sampler in view.samplers}
    shown = [(role, doing) for role, doing in view.roles.items() if role not in replicas]
    rows: list[tuple[str, RenderableType]] = [(role, _doing(doing)) for role, doing in shown[:MAX_ROLES]]
    if len(shown) > MAX_ROLES:
        rows.append(("", _line((f"and {len(shown) - MAX_ROLES} more roles", LABEL))))
    rewards = view.rewards
    failures = (f"{count_text(rewards.failures)} failed", BAD if rewards.failures else LABEL)
    rows.append(("rewards", _line(f"{rewards.running} running · {rewards.queued} queued · ", failures)))
    return _rows(rows)


def _doing(doing: Activity) -> Text:
    since = (f"  {seconds_text(doing.seconds)}", LABEL)
    if not doing.busy:
        return _line(("◌ waits for ", WAITS), (doing.detail or doing.phase, f"bold {WAITS}"), since)
    more = f" ×{doing.open_spans}" if doing.open_spans > 1 else ""
    return _line(("● ", GOOD), doing.phase.replace("_", " "), f" {doing.detail}" if doing.detail else "", more, since)


def _samplers(view: RunView) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), expand=True, header_style=LABEL, pad_edge=False)
    table.add_column("sampler", no_wrap=True, overflow="ellipsis", min_width=LABEL_WIDTH, ratio=1)
    for name in ("version", "window", "running", "queued", "tokens/s", "pause"):
        table.add_column(name, justify="right", no_wrap=True, overflow="ellipsis")
    for sampler in view.samplers[:MAX_SAMPLERS]:
        table.add_row(*_sampler(sampler, view.version))
    hidden = view.samplers[MAX_SAMPLERS:]
    if hidden:
        sums = (sum(s.window for s in hidden), sum(s.running for s in hidden), sum(s.queued for s in hidden))
        speed = count_text(sum(s.tokens_per_s for s in hidden))
        table.add_row(f"and {len(hidden)} more", "", *map(str, sums), speed, "", style=LABEL)
    return table


def _sampler(sampler: SamplerView, head: int) -> list[Text]:
    name = _line(sampler.name) if sampler.routable else _line((sampler.name, BAD), (" not routable", BAD))
    version = Text(str(sampler.version), GOOD if sampler.version == head else WAITS)
    queued = Text(str(sampler.queued), WAITS if sampler.queued > sampler.running else "")
    pause = "–" if sampler.pause_s_last is None else seconds_text(sampler.pause_s_last)
    running = Text(str(sampler.running), "bold" if sampler.running else WAITS)
    return [
        name,
        version,
        Text(str(sampler.window)),
        running,
        queued,
        Text(count_text(sampler.tokens_per_s)),
        Text(pause),
    ]


def _flow(view: RunView) -> RenderableType:
    rollouts, (used, capacity) = view.rollouts, view.slots
    counts = f"{count_text(rollouts.trained)} trained · {count_text(rollouts.alive)} alive"
    rows: list[tuple[str, RenderableType]] = [
        ("rollouts", _line((count_text(rollouts.made), "bold"), f" made · {counts} · {used}/{capacity} slots"))
    ]
    if any(rollouts.dropped.values()):
        rows.append(("", _line((f"dropped: {_dropped(rollouts.dropped)}", WAITS))))
    rows.append(("weights", _weights(view)))
    if view.coding_note:
        rows.append(("", _line((view.coding_note, LABEL))))
    return _rows(rows)


def _dropped(dropped: Mapping[str, int]) -> str:
    return " · ".join(f"{count_text(count)} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)


def _weights(view: RunView) -> Text:
    if view.delta_bytes_last is None or not view.full_bytes:
        return _line(("no version has been published yet", LABEL))
    share = percent_text(view.delta_bytes_last / view.full_bytes)
    parts: list[str | tuple[str, str]] = [
        (bytes_text(view.delta_bytes_last), "bold"),
        f" sent of {bytes_text(view.full_bytes)} ({share})",
    ]
    if view.pause_s_last is not None:
        parts.append(f" · pause {seconds_text(view.pause_s_last)}")
    if view.pause_s_mean is not None:
        parts.append((f", mean {seconds_text(view.pause_s_mean)}", LABEL))
    return _line(*parts)


def _messages(messages: Sequence[str]) -> RenderableType:
    return Group(*(_line(("! ", WAITS), message.replace("\n", " ")) for message in messages[-3:]))


# --- the end ----------------------------------------------------------------------------------------------


def final_table(summary: RunSummary) -> RenderableType:
    """What a run did: held-out reward before and after, seconds by phase, rollouts."""
    return Group(_outcome(summary), Text(""), _phases(summary))


def _outcome(summary: RunSummary) -> RenderableType:
    rows: list[tuple[str, RenderableType]] = []
    for label, kind in (("held out", "sampled"), ("greedy", "greedy")):
        before, after = _value(summary.before, kind), _value(summary.after, kind)
        if after is not None:
            start = f"{before:.3f} → " if before is not None else ""
            rows.append((label, _line((start, LABEL), (f"{after:.3f}", f"bold {GOOD}"))))
    speed = summary.sampled_tokens / summary.elapsed_s if summary.elapsed_s else 0.0
    steps = f"{summary.steps} steps in {seconds_text(summary.elapsed_s)}, version {summary.version}"
    rows.append(("run", _line((summary.status, GOOD if summary.status == "finished" else WAITS), f", {steps}")))
    rollouts = summary.rollouts
    counts = (
        f"{count_text(rollouts.made)} made, {count_text(rollouts.trained)} trained, {count_text(rollouts.alive)} left"
    )
    rows.append(("rollouts", _line(counts)))
    if any(rollouts.dropped.values()):
        rows.append(("dropped", _line((_dropped(rollouts.dropped), WAITS))))
    rows.append(("tokens", _line(f"{count_text(summary.sampled_tokens)} sampled, {count_text(speed)} tokens/s")))
    if summary.full_bytes:
        share = percent_text(summary.delta_bytes / summary.full_bytes)
        pause = "" if summary.pause_s_mean is None else f", mean pause {seconds_text(summary.pause_s_mean)}"
        text = f"{bytes_text(summary.delta_bytes)} sent of {bytes_text(summary.full_bytes)} ({share}){pause}"
        rows.append(("weights", _line(text)))
    return Panel(_rows(rows), title=Text(summary.name, "bold"), title_align="left", border_style=LABEL, padding=(0, 1))


def _value(accuracy: Accuracy | None, kind: str) -> float | None:
    return getattr(accuracy, kind) if accuracy else None


def _phases(summary: RunSummary) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=LABEL, pad_edge=False)
    table.add_column("role", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    for name in ("busy", "waits", "times", "of the run"):
        table.add_column(name, justify="right", no_wrap=True)
    elapsed = summary.trace.get("elapsed_s", 0.0) or summary.elapsed_s
    shown = ""
    for row in seconds_by_phase(summary.trace):
        share = percent_text(row.active_s / elapsed) if elapsed else ""
        busy = seconds_text(row.busy_s) if row.busy_s else ""
        waits = Text(seconds_text(row.wait_s) if row.wait_s else "", WAITS)
        name = "" if row.role == shown else row.role
        table.add_row(name, row.phase.replace("_", " "), busy, waits, f"{row.count:,}", share)
        shown = row.role
    return Padding(table, (0, 2))
