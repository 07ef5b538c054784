"""Every metric has a documented name."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlorch.observe.metrics import GROUPS, METRICS, check, find, markdown

PAGE = Path(__file__).parents[2] / "docs" / "METRICS.md"


def test_the_committed_page_is_what_the_registry_renders() -> None:
    assert PAGE.read_text() == markdown(), "run: python -m rlorch.observe.metrics > docs/METRICS.md"


def test_running_the_module_prints_the_page() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "rlorch.observe.metrics"], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout == markdown()


@pytest.mark.parametrize(
    "name",
    [
        "train/loss",
        "async/staleness_0",
        "async/staleness_12",
        "drop/too_stale",
        "reward/format",
        "pool/sampler-0_window",
        "rollout/timeout_failures",
        "loss/ratio_p99",
    ],
)
def test_documented_names_and_members_of_families_pass(name: str) -> None:
    check(name)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("train/los", "train/loss"),
        ("perf/step_time", "perf/step_s"),
        ("async/staleness_x", "async/staleness_"),
        ("rollout/reward", "rollout/reward_"),
        ("rollout/tired_failures", "rollout/"),
    ],
)
def test_an_undocumented_name_is_refused_with_the_nearest_one(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match="not a documented metric") as error:
        check(wrong)
    assert f"nearest is '{meant}" in str(error.value)


def test_a_family_name_itself_is_not_a_metric() -> None:
    assert find("drop/<reason>") is None


def test_every_metric_is_in_a_documented_group_with_unit_and_meaning() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name
        assert name.split("/")[0] in GROUPS
        assert metric.unit
        assert len(metric.meaning) > 8


def test_an_exact_name_is_not_taken_for_a_member_of_a_family() -> None:
    for name in METRICS:
        if "<" not in name:
            assert find(name) is METRICS[name]
