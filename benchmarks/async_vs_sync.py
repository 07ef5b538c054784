"""What asynchrony buys: the same number of rollouts sampled and trained, with max_staleness 0, 1 and 2.

    python -m benchmarks.async_vs_sync [--steps 16] [--rounds 2] [--staleness 0 1 2]

`max_staleness: 0` is exact on-policy: sample, train, publish, one after the other. With 1 and 2 the sampler works on
the next batches meanwhile. All-equal groups are trained too, so that every run does the same work. Rounds alternate
between the settings; the roles are started once, and every run's start and first steps are not counted.

What is measured, between the end of the publish of step `skip` and that of the last step:

* s/step: the time from one publish to the next.
* busy: the share of that time in which the role had a busy span open in the tracer. The trainer's spans are its calls
  (forward_backward, optim_step, publish); the sampler's are requests in flight, so its figure is an upper bound.
* cpu: CPU seconds of the role's process per second, 1.00 being one core. The engine runs one thread that sleeps when
  it has no request, so this is how much it really worked, Ray's share in that process included.
* bound: the larger of the trainer's busy share and the sampler's cpu share: how near the run came to the limit of its
  slower role. What is missing to 100% is what better overlap could still win.
"""

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.common import (
    Report,
    RunOne,
    finish,
    machine,
    parser,
    ratio,
    rl_run_config,
    spread,
    warm_model,
    with_kept_roles,
)
from rlorch.observe.trace import read_trace

SKIP = 3


@dataclass(frozen=True)
class Measured:
    """One run, without its start and first steps."""

    step_s: tuple[float, ...]
    busy: Mapping[str, float]
    cpu: Mapping[str, float]
    tokens_per_s: float

    @property
    def bound(self) -> float:
        """The larger share of the two roles that can be the limit."""
        return max(self.busy.get("trainer", 0.0), self.cpu.get("sampler", 0.0))


async def measure(run: RunOne, workdir: Path, staleness: int, steps: int) -> Measured:
    """One run of `steps` counted steps."""
    run_dir = workdir / "async_vs_sync" / f"staleness-{staleness}"
    config = rl_run_config(workdir, run_dir, steps=SKIP + steps)
    rollout = config.rollout.model_copy(update={"max_staleness": staleness})
    recorder = await run(config.model_copy(update={"rollout": rollout}))
    marks = recorder.marks[SKIP:]
    wall_s = marks[-1].at_s - marks[0].at_s
    cpu = {role: (marks[-1].cpu_s[role] - used) / wall_s for role, used in marks[0].cpu_s.items()}
    busy = in_window(run_dir / "trace.json", SKIP - 1, SKIP + steps - 1)
    tokens = recorder.tokens_between(marks[0].at_s, marks[-1].at_s)
    steps_s = tuple(after.at_s - before.at_s for before, after in pairwise(marks))
    return Measured(steps_s, busy, cpu, tokens / wall_s)


def in_window(trace: Path, first: int, last: int) -> dict[str, float]:
    """Share of the time from the end of step `first` to the end of step `last` with a busy span open, by role."""
    roles: dict[int, str] = {}
    stacks: dict[tuple[int, int], list[tuple[str, float, dict[str, int]]]] = {}
    spans: dict[str, list[tuple[float, float]]] = {}
    ends: dict[int, float] = {}
    for event in read_trace(trace):
        if event["ph"] == "M" and event["name"] == "process_name":
            roles[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "B":
            started = (f"{event['cat']} {event['name']}", event["ts"], event["args"])
            stacks.setdefault((event["pid"], event["tid"]), []).append(started)
        elif event["ph"] == "E":
            name, start, args = stacks[event["pid"], event["tid"]].pop()
            if name.startswith("busy"):
                spans.setdefault(roles[event["pid"]], []).append((start, event["ts"]))
            if name == "busy publish":
                ends[args["step"]] = event["ts"]
    low, high = ends[first], ends[last]
    inside = {role: [(max(a, low), min(b, high)) for a, b in found] for role, found in spans.items()}
    return {role: union(found) / (high - low) for role, found in inside.items()}


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals; empty ones count nothing."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        if stop > max(start, end):
            total += stop - max(start, end)
            end = stop
    return total


def make_report(
    runs: Mapping[int, list[Measured]], settings: Mapping[str, object], before: Mapping[str, object]
) -> Report:
    """Rows by staleness; the ratio is to the first one."""
    rows: list[tuple[str, ...]] = []
    medians = {key: statistics.median(statistics.median(run.step_s) for run in found) for key, found in runs.items()}
    reference = next(iter(medians.values()))
    for staleness, found in runs.items():
        rows.append(
            (
                str(staleness),
                spread([statistics.median(run.step_s) for run in found], "s"),
                ratio(reference, medians[staleness]),
                spread([100 * run.busy.get("trainer", 0) for run in found], "%"),
                spread([100 * run.cpu.get("trainer", 0) for run in found], "%"),
                spread([100 * run.busy.get("sampler-0", 0) for run in found], "%"),
                spread([100 * run.cpu.get("sampler", 0) for run in found], "%"),
                spread([100 * run.cpu.get("coordinator", 0) for run in found], "%"),
                spread([100 * (run.cpu.get("rewards", 0) + run.cpu.get("ray", 0)) for run in found], "%"),
                spread([100 * run.bound for run in found], "%"),
            )
        )
    return Report(
        name="async_vs_sync",
        question="seconds per optimizer step for the same work, by how far sampling may run ahead of training",
        columns=(
            "max_staleness",
            "s/step",
            "speed-up",
            "trainer busy",
            "trainer cpu",
            "requests in flight",
            "sampler cpu",
            "coordinator cpu",
            "rewards + ray cpu",
            "bound",
        ),
        rows=tuple(rows),
        notes=(
            "Median of each run's steps, then median (min-max) of the rounds. cpu: share of one core. bound: the "
            "larger of trainer busy and sampler cpu; 100% is the limit of the slower role.",
        ),
        settings=settings,
        machine=before,
        raw={str(key): [asdict(run) for run in found] for key, found in runs.items()},
    )


async def measure_all(options: argparse.Namespace) -> dict[int, list[Measured]]:
    """All rounds; every other one in reverse order."""
    runs: dict[int, list[Measured]] = {staleness: [] for staleness in options.staleness}

    async def work(run: RunOne) -> None:
        for number in range(options.rounds):
            for staleness in options.staleness if number % 2 == 0 else reversed(options.staleness):
                runs[staleness].append(await measure(run, options.workdir, staleness, options.steps))

    await with_kept_roles(options.workdir, "async_vs_sync", work)
    return runs


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=16, help="counted steps per run")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    options = arguments.parse_args()
    before = machine()
    warm_model(options.workdir)
    runs = asyncio.run(measure_all(options))
    settings = {"steps": options.steps, "skipped": SKIP, "rounds": options.rounds, "rollouts per step": "32 x 8"}
    finish(make_report(runs, settings, before), options.json)


if __name__ == "__main__":
    main()
