from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weights_world import manifest_of

from rlorch.errors import DigestMismatchError, StorageError
from rlorch.weights.manifest import key_version, manifest_from_json, manifest_to_json, payload_key


@pytest.mark.parametrize("base", [None, 2])
def test_a_manifest_survives_json(base: int | None) -> None:
    manifest, _ = manifest_of(3, base)
    assert manifest_from_json(manifest_to_json(manifest)) == manifest


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_a_storage_error(data: bytes) -> None:
    with pytest.raises(StorageError):
        manifest_from_json(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "3"), ("version", -1), ("version", True), ("version", 1.0), ("kind", "full"), ("kind", []),
        ("base_version", None), ("base_version", 3), ("base_version", "2"), ("digest", "abc"), ("digest", None),
        ("payload", ""), ("payload", 7), ("payload_digest", "Z" * 32), ("payload_bytes", None), ("full_bytes", -1),
        ("tensors", {}), ("tensors", [1]), ("tensors", [{}]), ("surprise", 1),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_or_range_is_a_storage_error(key: str, value: Any) -> None:
    row = orjson.loads(manifest_to_json(manifest_of(3, 2)[0]))
    row[key] = value
    with pytest.raises(StorageError, match="malformed"):
        manifest_from_json(orjson.dumps(row), "log/3.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", ""), ("name", None), ("dtype", "BF17"), ("dtype", []), ("shape", [1, -1]), ("shape", 3),
        ("shape", [1.5]), ("coding", "zip"), ("offset", -1), ("length", "1"), ("changed", None), ("digest", 5),
        ("surprise", 0),
    ],
)  # fmt: skip
def test_a_tensor_entry_of_the_wrong_type_or_range_is_a_storage_error(key: str, value: Any) -> None:
    row = orjson.loads(manifest_to_json(manifest_of(3, 2)[0]))
    row["tensors"][1][key] = value
    with pytest.raises(StorageError, match="malformed"):
        manifest_from_json(orjson.dumps(row))


def test_missing_fields_and_repeated_tensors_are_a_storage_error() -> None:
    row = orjson.loads(manifest_to_json(manifest_of(3)[0]))
    with pytest.raises(StorageError, match="malformed"):
        manifest_from_json(orjson.dumps({key: value for key, value in row.items() if key != "kind"}))
    row["tensors"].append(row["tensors"][0])
    with pytest.raises(StorageError, match="twice"):
        manifest_from_json(orjson.dumps(row))


def test_an_edited_tensor_digest_is_noticed() -> None:
    row = orjson.loads(manifest_to_json(manifest_of(3)[0]))
    row["tensors"][0]["digest"] = "0" * 32
    with pytest.raises(DigestMismatchError, match="version 3"):
        manifest_from_json(orjson.dumps(row))


def test_a_truncated_file_names_itself() -> None:
    with pytest.raises(StorageError, match="log/7"):
        manifest_from_json(manifest_to_json(manifest_of(3)[0])[:-10], "log/7")


def test_payload_keys_name_their_version() -> None:
    assert key_version(payload_key(12, "delta", "ab" * 16)) == 12
    assert [key_version(key) for key in ("lora-3", "v-anchor", "vx1-anchor", "", "v٣-delta")] == [None] * 5
