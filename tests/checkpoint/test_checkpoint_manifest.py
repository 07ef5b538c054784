"""Names, verification and retention: decisions on values."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlorch.checkpoint.manifest import (
    broken_promises,
    check_name,
    damage,
    from_json,
    is_inside,
    oldest_first,
    to_delete,
    to_json,
)
from rlorch.errors import StorageError, UserError
from rlorch.types import CheckpointManifest, FileEntry

FILES = {"weights.safetensors": FileEntry("aa", 10), "sub/state.json": FileEntry("bb", 2)}


def manifest(step: int, **changes: object) -> CheckpointManifest:
    made = CheckpointManifest(f"step-{step}", step, float(step), FILES)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step-10", "final", "v1.2_b", "a" * 128, "0"])
def test_plain_names_are_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\n", "a b", "a\\b", "a\0", "ä", "a" * 129, "-rf", "~x"]
)
def test_names_that_could_leave_the_directory_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name a checkpoint"):
        check_name(name)


@given(st.text(alphabet="./\\ab\0", max_size=8))
def test_a_file_name_inside_a_directory_resolves_to_below_it(name: str) -> None:
    import posixpath

    resolved = posixpath.normpath(posixpath.join("/base/dir", name))
    if is_inside(name):
        assert resolved == f"/base/dir/{name}"


# --- verification -----------------------------------------------------------------------------------------


def test_a_writer_is_held_to_the_digests_it_returned() -> None:
    assert broken_promises({"weights.safetensors": "aa"}, FILES) == []
    assert broken_promises({"weights.safetensors": "zz"}, FILES) == [
        "weights.safetensors has digest aa, its writer says zz"
    ]
    assert broken_promises({"missing": "aa"}, FILES) == ["missing was announced but not written"]
    assert broken_promises({"../x": "aa"}, FILES) == ["'../x' is not a file name inside the checkpoint"]
    assert broken_promises({}, {}) == ["the writer wrote no files"]


def test_damage_names_every_file_that_differs() -> None:
    assert damage(manifest(1), FILES) == []
    found = {"weights.safetensors": FileEntry("aa", 9)}
    assert damage(manifest(1), found) == ["weights.safetensors has 9 bytes instead of 10", "sub/state.json is missing"]
    found = FILES | {"sub/state.json": FileEntry("xx", 2)}
    assert damage(manifest(1), found) == ["sub/state.json has digest xx instead of bb"]


# --- JSON -------------------------------------------------------------------------------------------------


@given(
    step=st.integers(0, 2**40),
    created_s=st.floats(0, 1e11),
    ttl=st.none() | st.floats(0, 1e9),
    extra=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)
def test_a_manifest_comes_back_equal(step: int, created_s: float, ttl: float | None, extra: dict[str, object]) -> None:
    made = manifest(step, created_s=created_s, ttl_seconds=ttl, extra=extra, pinned=True, config_digest="c")
    assert from_json(to_json(made)) == made


def test_an_edited_torn_or_newer_manifest_is_refused() -> None:
    data = to_json(manifest(7))
    with pytest.raises(StorageError, match="own digest"):
        from_json(data.replace(b'"step": 7', b'"step": 8'))
    for torn in (b"", data[:-20], b"[]", b"{}", b"\xff"):
        with pytest.raises(StorageError, match="not a manifest"):
            from_json(torn)
    with pytest.raises(StorageError, match="format 9 is newer"):
        from_json(json.dumps(json.loads(data) | {"format": 9}).encode())
    with pytest.raises(UserError, match="extra cannot be written"):
        to_json(manifest(1, extra={"x": object()}))


# --- retention --------------------------------------------------------------------------------------------


def gone(manifests: list[CheckpointManifest], now_s: float = 0, **policy: int | None) -> set[str]:
    return set(to_delete(manifests, **({"keep_last": None, "keep_every": None} | policy), now_s=now_s))


def test_the_newest_stay_and_multiples_of_keep_every_stay_for_good() -> None:
    manifests = [manifest(step) for step in (10, 20, 30, 40, 50)]
    assert gone(manifests) == set()
    assert gone(manifests, keep_last=2) == {"step-10", "step-20", "step-30"}
    assert gone(manifests, keep_last=2, keep_every=20) == {"step-10", "step-30"}
    assert gone(manifests[::-1], keep_last=4) == {"step-10"}


def test_a_time_to_live_ends_a_checkpoint_and_protects_it_until_then() -> None:
    manifests = [manifest(1, ttl_seconds=10.0), manifest(2), manifest(3), manifest(4)]
    assert gone(manifests, now_s=10.9, keep_last=2) == {"step-2"}
    assert gone(manifests, now_s=11.0, keep_last=2) == {"step-1", "step-2"}


def test_the_newest_resumable_and_pinned_ones_outlive_everything() -> None:
    manifests = [
        manifest(1, ttl_seconds=1.0, pinned=True),
        manifest(2, ttl_seconds=1.0),
        manifest(3, ttl_seconds=1.0, resumable=False),
    ]
    assert gone(manifests, now_s=100.0, keep_last=1) == {"step-3"}


@given(
    st.lists(st.tuples(st.integers(0, 12), st.none() | st.integers(0, 20), st.booleans(), st.booleans()), max_size=12),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 5),
    st.integers(0, 40),
)
def test_retention_always_leaves_a_way_to_resume_and_is_settled_after_one_pass(
    rows: list[tuple[int, int | None, bool, bool]], keep_last: int | None, keep_every: int | None, now_s: int
) -> None:
    manifests = [
        manifest(step, name=f"{index}", ttl_seconds=ttl, pinned=pinned, resumable=resumable)
        for index, (step, ttl, pinned, resumable) in enumerate(rows)
    ]
    names = gone(manifests, now_s, keep_last=keep_last, keep_every=keep_every)
    left = [entry for entry in manifests if entry.name not in names]
    assert not any(entry.pinned for entry in manifests if entry.name in names)
    resumable = [entry for entry in oldest_first(manifests) if entry.resumable]
    assert not resumable or resumable[-1] in left
    if keep_last is not None:
        surplus = [
            entry
            for entry in left
            if not entry.pinned and entry.ttl_seconds is None and (keep_every is None or entry.step % keep_every)
        ]
        assert len(surplus) <= keep_last + 1  # the newest resumable one may be older than all of those
    assert gone(left, now_s, keep_last=keep_last, keep_every=keep_every) == set()
