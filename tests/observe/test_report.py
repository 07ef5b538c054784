"""The report is one well-formed page that shows what the run directory has."""

import dataclasses
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlorch.errors import StorageError
from rlorch.observe.charts import Bar, Series, decimate, line_chart, stacked_columns, ticks, timeline
from rlorch.observe.report import write_report
from rlorch.observe.sinks import JsonlSink
from rlorch.observe.trace import Tracer
from rlorch.observe.view import Accuracy, RolloutsView, RunSummary

CLOSED_AT_ONCE = {"line", "rect", "circle", "path"}  # by "/>", inside an SVG


class Page(HTMLParser):
    """Checks that every tag closes, and keeps charts, text and whatever the page would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.charts: dict[str, dict[str, object]] = {}
        self.text = ""
        self.fetched: list[str] = []
        self._chart: dict[str, object] | None = None
        self.feed(path.read_text())
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[name]) for name in ("src", "href", "data") if name in values]
        if "data-chart" in values:
            self._chart = json.loads(str(values["data-chart"]))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in CLOSED_AT_ONCE

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] == ["h3"] and self._chart:
            self.charts[data], self._chart = self._chart, None
        if not {"style", "script"} & set(self.stack):
            self.text += data + "\n"

    def points(self, chart: str, series: str) -> list[list[float]]:
        all_series = self.charts[chart]["series"]
        assert isinstance(all_series, list)
        (found,) = (s["points"] for s in all_series if s["name"] == series)
        return found


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(run_dir: Path, steps: int, *, crashed: bool = False) -> RunSummary:
    """A run directory made by the parts that really write it."""
    clock, rng = Clock(), random.Random(steps)
    tracer = Tracer(clock, run_dir / "trace.json")
    sink = JsonlSink(run_dir / "metrics.jsonl")
    for step in range(1, steps + 1):
        with tracer.span("trainer", "groups", busy=False):
            clock.now += 0.2
        with tracer.span("trainer", "forward_backward", step=step), tracer.span("sampler-0", "generate"):
            clock.now += 0.3
        row = {"rollout/reward_raw_mean": step / 100, "train/loss": rng.gauss(0, 1), "train/grad_norm": 1.0}
        row |= {"async/staleness_0": 0.75, "async/staleness_1": 0.25, "perf/delta_bytes": 1e5, "perf/full_bytes": 1e6}
        row |= {
            "perf/sync_pause_s": 0.003,
            "perf/tokens_per_s": 9000.0,
            "loss/own_number": float(step),
            "drop/too_stale": 7.0,
        }
        sink.write(step, row)
        if step % 5 == 0:
            sink.write(
                step, {"eval/accuracy_sampled": step / 200, "eval/accuracy_greedy": 0.9, "eval/version": step - 1}
            )
    (run_dir / "config.yaml").write_text("name: r\nmax_tokens: 8\nwandb:\n  api_key: S3CRET99\n")
    summary = RunSummary(
        "a <run> & more", "model", "finished", steps, steps, clock.now, Accuracy(0, 0.1), Accuracy(steps, 0.5, 0.9),
        RolloutsView(90, 80, 3, {"too_stale": 7}), 1000, 10**5, 10**6, 0.003, "a note", tracer.summary(),
    )  # fmt: skip
    sink.close()
    if crashed:
        tracer.span("trainer", "optim_step").__enter__()
        tracer.flush()
    else:
        tracer.close()
        summary.write(run_dir)
    return summary


def test_the_page_is_well_formed_holds_every_series_and_fetches_nothing(tmp_path: Path) -> None:
    run(tmp_path, 40)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.points("Reward", "training") == [[step, step / 100] for step in range(1, 41)]
    assert page.points("Reward", "held out, sampled") == [[step - 1, step / 200] for step in range(5, 41, 5)]
    assert page.points("Staleness", "1 step")[0] == [1, 0.25]
    assert page.points("Bytes per version", "without deltas")[-1] == [40, 1e6]
    assert len(page.points("Loss", "loss")) == 40
    assert page.points("loss/own_number", "value")[-1] == [40, 40]
    for part in ("a <run> & more", "finished", "The whole run", "A closer look", "forward backward", "too stale",
                 "Seconds by phase", "max_tokens: 8", "a note"):  # fmt: skip
        assert part in page.text, part
    assert page.fetched == []
    text = path.read_text()
    assert "url(http" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_secrets_of_the_config_stay_out_of_the_report(tmp_path: Path) -> None:
    run(tmp_path, 2)
    assert "S3CRET99" not in write_report(tmp_path).read_text()
    (tmp_path / "config.yaml").write_text("broken: [\napi_key: S3CRET99\n")
    assert "S3CRET99" not in write_report(tmp_path).read_text()


def test_an_unfinished_run_with_truncated_files_has_a_report(tmp_path: Path) -> None:
    run(tmp_path, 9, crashed=True)
    for name in ("metrics.jsonl", "trace.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-30])
    page = Page(write_report(tmp_path))
    assert "unfinished" in page.text
    assert len(page.points("Loss", "loss")) == 8  # the ninth row was cut
    assert "The whole run" in page.text


def test_a_directory_without_any_file_has_a_report_too(tmp_path: Path) -> None:
    assert "unfinished" in Page(write_report(tmp_path)).text


def test_one_step_of_one_metric_is_enough(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(0, {"train/loss": 0.0, "async/staleness_0": 1.0, "train/grad_norm": math.inf})
    sink.close()
    page = Page(write_report(tmp_path))
    assert set(page.charts) == {"Loss", "Staleness"}  # a chart needs a finite value


def test_a_damaged_summary_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(StorageError, match="delete it"):
        write_report(tmp_path)


def test_a_summary_comes_back_as_it_was_written(tmp_path: Path) -> None:
    summary = run(tmp_path, 3)
    read = RunSummary.read(tmp_path)
    assert read == summary
    plain = dataclasses.replace(summary, before=None, after=None)
    plain.write(tmp_path)
    assert RunSummary.read(tmp_path) == plain
    assert RunSummary.read(tmp_path / "nowhere") is None


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    run(tmp_path, 3000)
    path = write_report(tmp_path)
    assert path.stat().st_size < 1_500_000
    points = Page(path).points("Reward", "training")
    assert len(points) == 400
    assert points == sorted(points)


@pytest.mark.parametrize("seed", range(40))
def test_charts_stay_inside_their_box_for_any_numbers(seed: int) -> None:
    rng = random.Random(seed)
    scale = 10.0 ** rng.randrange(-12, 12)
    values = [
        rng.choice([rng.gauss(0, 1), rng.random(), 0.0, math.nan, math.inf]) * scale
        for _ in range(rng.choice([1, 3, 900]))
    ]
    series = [Series("a", list(enumerate(values)), "c1"), Series("b", [(0, 1.0)], "c2", "dots")]
    shapes = [line_chart("t", series, log=True), line_chart("t", series, kind="bytes", zero=True)]
    positive = [Series(s.name, [(x, abs(y)) for x, y in s.points], s.colour) for s in series]
    shapes.append(stacked_columns("t", positive, kind="seconds"))
    for shape in shapes:
        assert "nan" not in shape.split("<svg")[1]
        for number in _coordinates(shape):
            assert -1 <= number <= 561


def _coordinates(svg: str) -> list[float]:
    import re

    numbers = re.findall(r' (?:x1|x2|y1|y2|cx|cy|x|y)="([^"]*)"', svg)
    numbers += [n for path in re.findall(r' d="([^"]*)"', svg) for n in re.findall(r"[-\d.e]+", path)]
    return [float(number) for number in numbers]


def test_ticks_are_few_round_and_inside() -> None:
    rng = random.Random(0)
    for _ in range(500):
        low = rng.uniform(-1, 1) * 10 ** rng.randrange(-6, 6)
        high = low + rng.random() * 10 ** rng.randrange(-6, 6)
        marks = ticks(low, high)
        assert 1 <= len(marks) <= 7
        assert all(low - (high - low) * 1e-6 <= mark <= high + (high - low) * 1e-6 for mark in marks)
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_decimating_keeps_the_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(2000)]
    small = decimate(points, 400)
    assert len(small) == 400
    assert sum(y for _, y in small) / 400 == pytest.approx(sum(y for _, y in points) / 2000)


def test_a_timeline_draws_busy_and_waiting_time_in_proportion() -> None:
    import re

    bars = [Bar(0.0, 5.0, "train", True), Bar(5.0, 7.5, "groups", False)]
    svg = timeline("t", {"trainer": bars}, (0.0, 10.0), {"train": "c1"})
    busy = sum(float(w) for w in re.findall(r'class="bar c1"[^>]* width="([\d.]+)"', svg))
    waits = sum(float(w) for w in re.findall(r'class="wait"[^>]* width="([\d.]+)"', svg))
    assert busy == pytest.approx(2 * waits, rel=0.01)
    assert busy == pytest.approx(1030 / 2, rel=0.01)
    assert timeline("t", {}, (0.0, 10.0), {}) == ""
