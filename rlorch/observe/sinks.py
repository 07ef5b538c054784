"""Where metrics go: a JSONL file, TensorBoard, W&B, all at once.

Every sink is a `rlorch.ports.MetricSink`. A run writes to one `FanOut`, which holds the invariant of the port: a
write never blocks the run for long and never raises into it. A sink that raises is reported once and dropped; a sink
that talks to anything slower than a local file sits behind `Background`, a bounded queue with a thread of its own.
"""

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from rlorch.errors import ConfigError, StorageError
from rlorch.observe import metrics
from rlorch.ports import MetricSink

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
QUEUE_ROWS = 10_000  # hours of steps: a sink that is this far behind is broken
CLOSE_S = 20.0  # W&B uploads its last rows in this time


class JsonlSink:
    """One JSON object per row: `step` and the metrics, flat. The file outlives crashes and grows over resumptions.

    A last line that a crash cut short is removed, since it never was a row. The first row after a resumption carries
    `"resumed": true`. Non-finite numbers, which JSON lacks, are null, with their value as text under `nonfinite`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        size = _size_of_whole_lines(path)
        self._file.truncate(size)
        self._resumed = size > 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        row: dict[str, Any] = {"step": step}
        if self._resumed:
            row["resumed"], self._resumed = True, False
        row |= {name: float(value) for name, value in values.items()}
        nonfinite = {name: str(float(value)) for name, value in values.items() if not math.isfinite(value)}
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.write(orjson.dumps(row) + b"\n")

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def _size_of_whole_lines(path: Path) -> int:
    """Bytes up to and including the last newline."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    """The metrics of each step, by step, as one history: what a resumption trained again replaces what was there.

    Rows of one step are merged, later ones win. A resumed row at step s drops every earlier row after s. A truncated
    last line is left out; a missing file is an empty history.

    Raises:
        StorageError: a whole line is not a row.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in _rows(path):
        step = row.pop("step")
        if row.pop("resumed", False):
            steps = {earlier: values for earlier, values in steps.items() if earlier <= step}
        row |= {name: float(text) for name, text in row.pop("nonfinite", {}).items()}
        steps.setdefault(step, {}).update(row)
    return sorted(steps.items())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = orjson.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                if not line.endswith(b"\n"):
                    return
                raise StorageError(f"{path} line {number} is not a row of metrics ({error}); remove it") from error
            yield row


class TensorBoardSink:
    """Scalars as TensorBoard event files, written without torch or TensorFlow.

    `resume_step` hides what an earlier process of the run wrote at that step and after it.
    """

    def __init__(self, log_dir: Path, *, resume_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(
                "the tensorboard sink needs the tensorboard package: pip install 'rlorch[tensorboard]'"
            ) from error
        events: Any = event_pb2  # protobuf makes the classes at import
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer: Any = EventFileWriter(str(log_dir), max_queue_size=1000, flush_secs=10)
        if resume_step is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=_wall_s(), step=resume_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one event with every scalar."""
        scalars = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=_wall_s(), step=step, summary=self._summary(value=scalars)))

    def close(self) -> None:
        """Write what is queued and close the file. Idempotent."""
        writer, self._writer = self._writer, None
        if writer:
            writer.close()


def _wall_s() -> float:
    return datetime.now(UTC).timestamp()


class WandbSink:
    """Scalars to Weights & Biases; `mode="offline"` needs no account and no network.

    The step is logged as `step` and is the x axis, because an evaluation may arrive after later training rows and
    W&B's own step only goes forward. `run_id` continues an earlier W&B run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any] | None = None,
        mode: Literal["online", "offline"] = "online",
        run_id: str | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("the wandb sink needs the wandb package: pip install 'rlorch[wandb]'") from error
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = wandb.init(
                dir=str(run_dir),
                project=project,
                name=name,
                config=dict(config or {}),
                mode=mode,
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"W&B does not start ({error}): run `wandb login`, or set observe.wandb_mode=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """Give it to the next process of the run, to continue the same W&B run."""
        return self._run.id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hand one row to W&B's own process."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Finish the W&B run. Idempotent."""
        self._run.finish()


class Background:
    """A sink behind a bounded queue and a thread, so that a slow one does not hold up the step.

    `write` raises what the sink raised on its thread, or StorageError when `capacity` rows wait; `close` gives the
    sink `close_s` seconds to drain and then leaves it behind (its thread is a daemon).
    """

    def __init__(self, sink: MetricSink, *, capacity: int = QUEUE_ROWS, close_s: float = CLOSE_S) -> None:
        self._sink = sink
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(capacity + 1)
        self._capacity = capacity
        self._close_s = close_s
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._drain, name=f"sink-{_name(sink)}", daemon=True)
        self._thread.start()

    @property
    def sink(self) -> MetricSink:
        """The sink behind the queue."""
        return self._sink

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Queue a copy of the row."""
        if self._failure:
            raise self._failure
        if self._rows.qsize() >= self._capacity:
            raise StorageError(f"{_name(self._sink)} is {self._capacity} rows behind at step {step} and is given up")
        self._rows.put_nowait((step, dict(values)))

    def close(self) -> None:
        """Drain and close the sink within the deadline. Idempotent. Raises what the sink raised, or StorageError."""
        if not self._closing:
            self._closing = True
            self._rows.put_nowait(None)  # one place is kept free for it
        self._thread.join(self._close_s)
        if self._failure:
            raise self._failure
        if self._thread.is_alive():
            left = self._rows.qsize()
            raise StorageError(f"{_name(self._sink)} did not close within {self._close_s:g} s; {left} rows are lost")

    def _drain(self) -> None:
        try:
            while row := self._rows.get():
                self._sink.write(*row)
        except Exception as error:  # whatever a sink raises belongs to the writer, not to this thread
            self._failure = error
        try:
            self._sink.close()
        except Exception as error:
            self._failure = self._failure or error


class FanOut:
    """Writes each row to every sink. A sink that raises is reported once through `warn` and dropped.

    A metric that is not documented is written all the same, and reported once.
    """

    def __init__(self, sinks: Sequence[MetricSink], warn: Callable[[str], None] = log.warning) -> None:
        self._sinks = list(sinks)
        self._warn = warn
        self._checked: set[str] = set()

    @property
    def sinks(self) -> tuple[MetricSink, ...]:
        """The sinks that still work."""
        return tuple(self._sinks)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row everywhere."""
        self._check(values)
        for sink in tuple(self._sinks):
            try:
                sink.write(step, values)
            except Exception as error:
                self._sinks.remove(sink)
                self._warn(f"metrics no longer go to {_name(sink)}, which failed at step {step}: {_said(error)}")

    def close(self) -> None:
        """Close every sink that still works. Idempotent."""
        while self._sinks:
            sink = self._sinks.pop(0)
            try:
                sink.close()
            except Exception as error:
                self._warn(f"{_name(sink)} failed to close, its last rows may be missing: {_said(error)}")

    def _check(self, values: Mapping[str, float]) -> None:
        for name in values:
            if name in self._checked:
                continue
            self._checked.add(name)
            try:
                metrics.check(name)
            except ValueError as error:
                self._warn(str(error))


def _name(sink: MetricSink) -> str:
    return type(sink.sink if isinstance(sink, Background) else sink).__name__


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
