"""`report.html`: a run explained by one self-contained page, made from its run directory alone.

Reads `metrics.jsonl`, `trace.json`, `summary.json` and `config.yaml`; each may be missing or, after a crash,
truncated: the report shows what there is. Finished and unfinished runs look the same. The config is redacted.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from rlorch.observe.charts import Bar, Kind, Series, line_chart, stacked_columns, timeline
from rlorch.observe.history import History, role_bars
from rlorch.observe.logs import redact, redact_text
from rlorch.observe.metrics import METRICS, find
from rlorch.observe.page import folded, page, section, table, tile
from rlorch.observe.sinks import METRICS_FILE, read_rows
from rlorch.observe.units import bytes_text, count_text, number_text, percent_text, seconds_text
from rlorch.observe.view import RunSummary, seconds_by_phase

REPORT_FILE = "report.html"
TRACE_FILE = "trace.json"
CONFIG_FILE = "config.yaml"
MAX_ROLES = 16
CLOSE_UP_STEPS = 6
PALETTE = ("c1", "c4", "c3", "c5", "c6", "c2", "c7", "c8")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises:
        StorageError: metrics.jsonl or summary.json is damaged in the middle.
        OSError: the directory does not exist or cannot be written.
    """
    history = History(read_rows(run_dir / METRICS_FILE))
    summary = RunSummary.read(run_dir)
    roles = role_bars(run_dir / TRACE_FILE)
    body = "".join(
        (
            _head(run_dir, history, summary),
            section("Learning", *_learning(history)),
            section("Off-policy", *_off_policy(history)),
            section("Who works when", *_timelines(roles, history.last_step), columns=False),
            section("Speed", *_speed(history)),
            section("Weight sync", *_weights(history, summary)),
            section("Totals", *_tables(history, summary)),
            _rest(history, run_dir),
            "<footer>Made by rlorch from this run directory; it needs no network. "
            "Open <code>trace.json</code> in ui.perfetto.dev for every span.</footer>",
        )
    )
    path = run_dir / REPORT_FILE
    part = path.with_suffix(".part")
    part.write_text(page(summary.name if summary else run_dir.resolve().name, body), encoding="utf-8")
    part.replace(path)
    return path


# --- the top ----------------------------------------------------------------------------------------------


def _head(run_dir: Path, history: History, summary: RunSummary | None) -> str:
    name = summary.name if summary else run_dir.resolve().name
    status = summary.status if summary else "unfinished"
    facts = [f"{history.last_step} steps"]
    elapsed = summary.elapsed_s if summary else (history.finite("perf/elapsed_s") or [0.0])[-1]
    if elapsed:
        facts.append(seconds_text(elapsed))
    if summary:
        facts.insert(0, summary.model)
    lead = html.escape(" · ".join(facts))
    return (
        f'<h1>{html.escape(name)}<span class="badge {status}">{status}</span></h1><p class="lead">{lead}</p>'
        f'<div class="tiles">{"".join(_tiles(history, summary))}</div>'
    )


def _tiles(history: History, summary: RunSummary | None) -> Iterable[str]:
    for name, label in (
        ("eval/accuracy_sampled", "held-out reward, sampled"),
        ("eval/accuracy_greedy", "held-out reward, greedy"),
        ("rollout/reward_raw_mean", "training reward"),
    ):
        values = history.finite(name)
        if values:
            yield tile(label, f"{values[-1]:.3f}", f"{values[0]:.3f}" if len(values) > 1 else "")
    formats: tuple[tuple[str, str, Kind], ...] = (
        ("perf/tokens_per_s", "sampled tokens per second", "number"),
        ("perf/step_s", "per step", "seconds"),
        ("async/staleness_mean", "mean staleness, steps", "number"),
        ("perf/delta_ratio", "of the full bytes sent per sync", "percent"),
        ("perf/sync_pause_s", "mean pause per sync", "seconds"),
    )
    texts = {"number": number_text, "seconds": seconds_text, "percent": percent_text}
    for name, label, kind in formats:
        mean = history.mean(name)
        if mean is not None:
            yield tile(label, count_text(mean) if name == "perf/tokens_per_s" else texts[kind](mean))
    if summary:
        lost = sum(summary.rollouts.dropped.values())
        yield tile(f"rollouts trained, {count_text(lost)} dropped", count_text(summary.rollouts.trained))


# --- the charts -------------------------------------------------------------------------------------------


def _learning(history: History) -> list[str]:
    reward = [
        Series("training", history.points("rollout/reward_raw_mean"), "c1", "smooth"),
        Series("held out, sampled", history.points("eval/accuracy_sampled", "eval/version"), "c2", "dots"),
        Series("held out, greedy", history.points("eval/accuracy_greedy", "eval/version"), "c3", "dots"),
    ]
    parts = [name for name in history.names if name.startswith("reward/")]
    part_series = [(name, name.removeprefix("reward/"), PALETTE[i % len(PALETTE)]) for i, name in enumerate(parts)]
    length = history.series(
        ("rollout/completion_tokens_mean", "mean", "c1"), ("rollout/completion_tokens_max", "longest", "c8")
    )
    return [
        line_chart("Reward", reward),
        line_chart("Loss", history.series(("train/loss", "loss", "c1"))),
        line_chart("Gradient norm", history.series(("train/grad_norm", "before clipping", "c4")), log=True, zero=True),
        line_chart("Entropy", history.series(("train/entropy", "nats per token", "c5")), zero=True),
        line_chart("Parts of the reward", history.series(*part_series)) if len(parts) > 1 else "",
        line_chart("Sampled tokens per rollout", length, zero=True),
    ]


def _off_policy(history: History) -> list[str]:
    names = [name for name in history.names if (metric := find(name)) and metric.name == "async/staleness_<n>"]
    by_staleness = sorted((int(name.rsplit("_", 1)[1]), name) for name in names)
    columns = [
        Series("1 step" if n == 1 else f"{n} steps", history.points(name), ("c1", "c4", "c6", "c3", "c7")[min(n, 4)])
        for n, name in by_staleness
    ]
    shares = history.series(
        ("train/clip_fraction", "clipped", "c1"),
        ("train/tis_truncated_fraction", "importance weight truncated", "c3"),
        ("rollout/truncated_fraction", "rollouts at the token limit", "c8"),
    )
    kl = history.series(
        ("train/kl_behaviour", "to the behaviour policy", "c1"), ("train/ref_kl", "to the reference", "c2")
    )
    mean = line_chart(
        "Staleness", history.series(("async/staleness_mean", "mean", "c1"), ("async/staleness_max", "max", "c8"))
    )
    return [
        stacked_columns(
            "Staleness",
            columns,
            kind="percent",
            note="Share of the rollouts in each batch, by optimizer steps between sampling and training.",
        )
        or mean,
        line_chart("KL divergence, nats per token", kl, zero=True),
        line_chart("Shares", shares, kind="percent", zero=True),
        line_chart(
            "Importance ratio",
            history.series(("train/ratio_mean", "mean", "c1"), ("train/ratio_max", "largest", "c7")),
            log=True,
        ),
    ]


def _speed(history: History) -> list[str]:
    phases = (
        ("perf/wait_groups_s", "waits for groups", "c8"),
        ("perf/reference_s", "reference", "c6"),
        ("perf/forward_backward_s", "forward and backward", "c1"),
        ("perf/optim_s", "optimizer", "c4"),
        ("perf/publish_s", "publish", "c5"),
    )
    busy = history.series(
        ("perf/trainer_busy_fraction", "trainer", "c1"), ("perf/sampler_busy_fraction", "samplers", "c4")
    )
    pool = history.series(
        ("pool/window", "window", "c8"), ("pool/running", "running", "c4"), ("pool/queued", "queued", "c3")
    )
    return [
        line_chart(
            "Sampled tokens per second", [_smooth(history, "perf/tokens_per_s", "all replicas", "c4")], zero=True
        ),
        stacked_columns("Seconds per step", history.series(*phases), kind="seconds"),
        line_chart("Busy share of each step", busy, kind="percent", zero=True),
        line_chart("Requests in the pool", pool, zero=True),
    ]


def _smooth(history: History, name: str, label: str, colour: str) -> Series:
    return Series(label, history.points(name), colour, "smooth")


def _weights(history: History, summary: RunSummary | None) -> list[str]:
    sent = history.series(("perf/delta_bytes", "sent", "c1"), ("perf/full_bytes", "without deltas", "c8"))
    pause = history.series(
        ("perf/sync_pause_s", "pause, requests stay", "c3"), ("perf/sync_stage_s", "stage, while serving", "c4")
    )
    return [
        line_chart(
            "Bytes per version", sent, kind="bytes", log=True, zero=True, note=summary.coding_note if summary else ""
        ),
        line_chart("Pause and stage per sync", pause, kind="seconds", log=True, zero=True),
        line_chart(
            "Served values that changed",
            history.series(("perf/changed_fraction", "per step", "c5")),
            kind="percent",
            zero=True,
        ),
        line_chart("Versions that sampled one completion", history.series(("async/version_spans_mean", "mean", "c2"))),
    ]


# --- timelines --------------------------------------------------------------------------------------------


def _timelines(roles: Mapping[str, Sequence[Bar]], steps: int) -> list[str]:
    end = max((bar.stop for bars in roles.values() for bar in bars), default=0.0)
    shown = dict(list(roles.items())[:MAX_ROLES])
    hidden = f" {len(roles) - MAX_ROLES} more roles are in trace.json." if len(roles) > MAX_ROLES else ""
    seconds: dict[str, float] = {}
    for bar in (bar for bars in shown.values() for bar in bars if bar.busy):
        seconds[bar.phase] = seconds.get(bar.phase, 0.0) + bar.stop - bar.start
    longest = sorted(seconds, key=lambda phase: -seconds[phase])
    colours = {phase: PALETTE[min(index, len(PALETTE) - 1)] for index, phase in enumerate(longest)}
    whole = timeline(
        "The whole run", shown, (0.0, end), colours, "Pale: busy for a part of the time; empty: idle." + hidden
    )
    span = end / steps * CLOSE_UP_STEPS if steps > 2 * CLOSE_UP_STEPS else 0.0
    window = (end / 2 - span / 2, end / 2 + span / 2)
    return [whole, timeline(f"A closer look: about {CLOSE_UP_STEPS} steps from the middle", shown, window, colours)]


# --- the tables -------------------------------------------------------------------------------------------


def _tables(history: History, summary: RunSummary | None) -> list[str]:
    drops = {name: history.finite(name) for name in history.names if name.startswith("drop/")}
    history.drawn |= set(drops)
    parts = [
        _evaluations(history),
        table(
            "Groups dropped, by reason",
            ("reason", "groups"),
            ((name.removeprefix("drop/").replace("_", " "), count_text(v[-1])) for name, v in drops.items() if v),
        ),
    ]
    if summary is None:
        return parts
    elapsed = summary.trace.get("elapsed_s") or summary.elapsed_s
    phases = (
        (
            row.role,
            row.phase.replace("_", " "),
            seconds_text(row.busy_s) if row.busy_s else "",
            seconds_text(row.wait_s) if row.wait_s else "",
            f"{row.count:,}",
            percent_text(row.active_s / elapsed) if elapsed else "",
        )
        for row in seconds_by_phase(summary.trace)
    )
    rollouts = summary.rollouts
    counts = [
        ("rollouts made", count_text(rollouts.made)),
        ("rollouts trained", count_text(rollouts.trained)),
        ("rollouts alive at the end", count_text(rollouts.alive)),
        *((f"rollouts dropped: {why.replace('_', ' ')}", count_text(n)) for why, n in rollouts.dropped.items()),
        ("tokens sampled", count_text(summary.sampled_tokens)),
        ("weights sent", bytes_text(summary.delta_bytes)),
        ("weights without deltas", bytes_text(summary.full_bytes)),
    ]
    return [
        table("Seconds by phase", ("role", "phase", "busy", "waits", "times", "of the run"), phases, 2),
        table("Counts", ("", ""), counts),
        *parts,
    ]


def _evaluations(history: History) -> str:
    columns = {"eval/accuracy_sampled": "sampled", "eval/accuracy_greedy": "greedy", "eval/seconds": "seconds"}
    by_version: dict[float, dict[str, float]] = {}
    for name in columns:
        for version, value in history.points(name, "eval/version"):
            by_version.setdefault(version, {})[name] = value
    chosen = sorted(by_version.items())
    if len(chosen) > 12:
        chosen = [*chosen[:: math.ceil(len(chosen) / 11)], chosen[-1]]
    rows = [
        (f"{version:.0f}", *(f"{values[name]:.3f}" if name in values else "–" for name in columns))
        for version, values in dict(chosen).items()
    ]
    return table("Held-out evaluations", ("version", *columns.values()), rows)


def _rest(history: History, run_dir: Path) -> str:
    history.drawn |= {"eval/version", "perf/elapsed_s", "train/version"}  # axes, not curves
    charts = [
        line_chart(name, history.series((name, _unit(name), "c1")))
        for name in history.names
        if name not in history.drawn and len(history.finite(name)) > 1
    ]
    body = f'<div class="grid2">{"".join(charts)}</div>' if any(charts) else ""
    config = run_dir / CONFIG_FILE
    text = _config(config.read_text(encoding="utf-8")) if config.exists() else ""
    listing = f"<pre>{html.escape(text)}</pre>" if text else ""
    return section("Everything else", folded("More metrics", body), folded("Config", listing), columns=False)


def _unit(name: str) -> str:
    metric = find(name) or METRICS.get(name)
    return metric.unit if metric and metric.unit != "1" else "value"


def _config(text: str) -> str:
    try:
        return yaml.safe_dump(redact(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:
        return redact_text(text)
