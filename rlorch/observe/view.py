"""What a run shows: the live view that the coordinator builds on demand, and the summary it leaves behind.

Owns the two frozen records between the run and everything that draws it (console, report, dashboard). Values only:
whoever draws needs no lock and can hold a view for as long as it likes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import orjson

from rlorch.errors import StorageError
from rlorch.observe.trace import Activity

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class SamplerView:
    """One replica. `window` is what its controller lets in; `running` and `queued` are requests."""

    name: str
    version: int
    window: int
    running: int
    queued: int
    tokens_per_s: float
    routable: bool = True
    pause_s_last: float | None = None


@dataclass(frozen=True, slots=True)
class RewardsView:
    """The reward workers: rollouts being scored, rollouts that wait, failures since the start."""

    running: int = 0
    queued: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class RolloutsView:
    """Counts since the start, in rollouts; `dropped` by reason. made = trained + dropped + alive."""

    made: int = 0
    trained: int = 0
    alive: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment.

    `reward_train` holds recent (step, mean raw reward), `reward_held_out` (step, sampled, greedy or None);
    `staleness` counts trained rollouts by staleness; `slots` is (used, capacity) in groups; `coding_note` says what
    the weight sync chose and why; `messages` are the last warnings, oldest first.
    """

    name: str
    model: str
    step: int
    total_steps: int
    version: int
    elapsed_s: float
    reward_train: tuple[tuple[int, float], ...] = ()
    reward_held_out: tuple[tuple[int, float, float | None], ...] = ()
    staleness: Mapping[int, int] = field(default_factory=dict[int, int])
    samplers: tuple[SamplerView, ...] = ()
    roles: Mapping[str, Activity] = field(default_factory=dict[str, Activity])
    rewards: RewardsView = RewardsView()
    rollouts: RolloutsView = RolloutsView()
    slots: tuple[int, int] = (0, 0)
    tokens_per_s: float = 0.0
    step_s: float | None = None
    delta_bytes_last: int | None = None
    full_bytes: int | None = None
    coding_note: str = ""
    pause_s_last: float | None = None
    pause_s_mean: float | None = None
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One evaluation on held-out prompts: mean reward, sampled and greedy."""

    version: int
    sampled: float
    greedy: float | None = None


Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run did: `summary.json` in the run directory, the final table and the report.

    `trace` is `Tracer.summary()`; `dropped` counts rollouts by reason; bytes are sums over published versions.
    """

    name: str
    model: str
    status: Status
    steps: int
    version: int
    elapsed_s: float
    before: Accuracy | None = None
    after: Accuracy | None = None
    rollouts: RolloutsView = RolloutsView()
    sampled_tokens: int = 0
    delta_bytes: int = 0
    full_bytes: int = 0
    pause_s_mean: float | None = None
    coding_note: str = ""
    trace: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def write(self, run_dir: Path) -> None:
        """Write `summary.json`, whole or not at all."""
        part = run_dir / f"{SUMMARY_FILE}.part"
        part.write_bytes(orjson.dumps(self, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS))
        part.replace(run_dir / SUMMARY_FILE)

    @staticmethod
    def read(run_dir: Path) -> "RunSummary | None":
        """What `write` wrote; None when the run has not written one. Raises StorageError for a damaged file."""
        path = run_dir / SUMMARY_FILE
        if not path.exists():
            return None
        try:
            raw = orjson.loads(path.read_bytes())
            known = {key: raw[key] for key in (f.name for f in fields(RunSummary)) if key in raw}
            for key in ("before", "after"):
                known[key] = Accuracy(**known[key]) if known.get(key) else None
            known["rollouts"] = RolloutsView(**known.get("rollouts", {}))
            return RunSummary(**known)
        except (ValueError, TypeError, AttributeError) as error:
            raise StorageError(f"{path} is not a run summary ({error}); delete it, the report works without") from error


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """One row of "seconds by phase": sums of its spans, and the time `active_s` with at least one of them open."""

    role: str
    phase: str
    busy_s: float
    wait_s: float
    active_s: float
    count: int


def seconds_by_phase(trace: Mapping[str, Any]) -> list[PhaseSeconds]:
    """The phases of `Tracer.summary()`, role by role, longest first."""
    rows: list[PhaseSeconds] = []
    for role, state in trace.get("roles", {}).items():
        phases = [
            PhaseSeconds(role, name, p["busy_s"], p["wait_s"], p["active_s"], p["count"])
            for name, p in state["phases"].items()
        ]
        rows += sorted(phases, key=lambda row: -row.active_s)
    return rows
