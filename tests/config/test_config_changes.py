"""Digests, differences and the resume check."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from rlorch.config import check_resumable, config_digest, describe, diff_configs, field_docs, flatten
from rlorch.errors import ResumeError
from rlorch.specs import RewardSpec, RewardTerm, SamplerSpec, Spec


class Inner(Spec):
    """What is inside."""

    rate: float = Field(1.0, gt=0, description="how fast, per second")
    names: tuple[str, ...] = ()


class Outer(Spec):
    """What is outside."""

    steps: int = Field(ge=1, description="optimizer steps")
    inner: Inner = Inner(rate=2.0)
    rewards: RewardSpec = RewardSpec(terms=(RewardTerm(plugin="exact"),))
    sampler: SamplerSpec = SamplerSpec()


def test_leaves_are_named_by_dotted_keys_and_indices() -> None:
    leaves = flatten(Outer(steps=1))
    assert leaves["rewards.terms.0.plugin"] == "exact"
    assert leaves["inner.names"] == []
    assert leaves["rewards.terms.0.options"] == {}


def test_equal_configs_do_not_differ() -> None:
    assert diff_configs(Outer(steps=1), Outer(steps=1)) == ()


def test_a_difference_names_key_old_and_new() -> None:
    old = Outer(steps=1)
    new = Outer(steps=2, inner=Inner(rate=2.0, names=("a",)))
    assert [str(change) for change in diff_configs(old, new)] == [
        "steps: 1 -> 2",
        "inner.names: [] -> (absent)",
        'inner.names.0: (absent) -> "a"',
    ]


def test_resume_lists_what_changed_and_what_may() -> None:
    old, new = Outer(steps=1), Outer(steps=2, inner=Inner(rate=3.0), sampler=SamplerSpec(replicas=2))
    with pytest.raises(ResumeError) as caught:
        check_resumable(old, new, {"steps", "sampler"})
    message = str(caught.value)
    assert "inner.rate: 2.0 -> 3.0" in message
    assert "steps:" not in message
    assert "sampler.replicas:" not in message
    assert "What may change on resume: sampler, steps" in message


def test_resume_with_allowed_changes_returns_them() -> None:
    changes = check_resumable(Outer(steps=1), Outer(steps=2), {"steps"})
    assert [change.key for change in changes] == ["steps"]


def test_a_key_that_only_starts_alike_is_not_covered() -> None:
    with pytest.raises(ResumeError):
        check_resumable({"steps_total": 1}, {"steps_total": 2}, {"steps"})


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_digests_agree_exactly_where_nothing_but_ignored_keys_differs(a: int, b: int, x: int, y: int) -> None:
    one = Outer(steps=a, sampler=SamplerSpec(replicas=x))
    two = Outer(steps=b, sampler=SamplerSpec(replicas=y))
    assert (config_digest(one) == config_digest(two)) == (a == b and x == y)
    assert (config_digest(one, ["sampler"]) == config_digest(two, ["sampler"])) == (a == b)
    assert (config_digest(one, ["sampler.replicas"]) == config_digest(two, ["sampler.replicas"])) == (a == b)


def test_the_reference_gives_type_default_and_meaning_of_every_key() -> None:
    docs = {doc.key: doc for doc in field_docs(Outer)}
    assert (docs["steps"].type, docs["steps"].default) == ("an integer >= 1", "(required)")
    assert docs["inner.rate"].default == "2.0"
    assert docs["inner"].meaning == "What is inside."
    assert docs["rewards.terms.0.weight"].default == "1.0"
    text = describe(Outer)
    assert "  inner.rate = 2.0  [a number > 0]  how fast, per second" in text.splitlines()
    assert "inner  -  What is inside." in text.splitlines()
