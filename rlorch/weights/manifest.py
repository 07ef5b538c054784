"""Manifests as JSON, and the digests and keys that name what they describe.

Owns the wire form of `rlorch.types.Manifest`: one JSON object whose keys are the field names. Reading is strict:
an unknown, missing, mistyped or out-of-range field is a `StorageError`, and a manifest whose `digest` is not the
digest of its own entries is a `DigestMismatchError`, so that a truncated or edited file is never acted on.
"""

from collections.abc import Iterable
from dataclasses import asdict, fields
from math import prod
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from rlorch.errors import DigestMismatchError, StorageError
from rlorch.types import Manifest, TensorEntry

DTYPE_BYTES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
    "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "U16": 2, "U32": 4, "U64": 8, "BOOL": 1,
    "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
"""Bytes per element, by safetensors name or torch name."""

_CODINGS = ("same", "full", "xor", "sparse")
_MANIFEST_FIELDS = frozenset(f.name for f in fields(Manifest))
_ENTRY_FIELDS = frozenset(f.name for f in fields(TensorEntry))
_HEX = frozenset("0123456789abcdef")


def digest(data: NDArray[Any] | bytes | bytearray | memoryview) -> str:
    """xxh3-128, as 32 hex digits, of bytes or of an array's elements in C order."""
    if isinstance(data, np.ndarray):
        flat = np.ascontiguousarray(data).reshape(-1)
        return xxhash.xxh3_128_hexdigest(flat.view(np.uint8).data if flat.size else b"")
    return xxhash.xxh3_128_hexdigest(data)


def state_digest(entries: Iterable[TensorEntry]) -> str:
    """The digest that names a whole state: of (name, dtype, shape, digest) of every tensor, sorted by name.

    It does not depend on how the tensors are coded: an anchor and a delta of the same weights have the same one.
    """
    rows = sorted((e.name, e.dtype, e.shape, e.digest) for e in entries)
    return digest(orjson.dumps(rows))


def tensor_bytes(entry: TensorEntry) -> int:
    """Size of the tensor that the entry describes, in bytes. Raises `DigestMismatchError` for an unknown dtype."""
    width = DTYPE_BYTES.get(entry.dtype)
    if width is None:
        raise DigestMismatchError(f"tensor {entry.name!r} has unknown dtype {entry.dtype!r}; known: {[*DTYPE_BYTES]}")
    return width * prod(entry.shape)


def payload_key(version: int, kind: str, payload_digest: str) -> str:
    """The store key of a payload. It holds the digest, so a key never names two different payloads."""
    return f"v{version:08d}-{kind}-{payload_digest}.rlw"


def key_version(key: str) -> int | None:
    """The version in a key made by `payload_key`; None for other keys."""
    head = key.split("-", 1)[0]
    return int(head[1:]) if head[:1] == "v" and head[1:].isdecimal() and head.isascii() else None


def manifest_to_json(manifest: Manifest) -> bytes:
    """The manifest as JSON; `manifest_from_json` gives back an equal value."""
    return orjson.dumps(asdict(manifest))


def manifest_from_json(data: bytes, where: str = "a manifest") -> Manifest:
    """Read `manifest_to_json`'s output. `where` names the source in messages.

    Raises:
        StorageError: it is not JSON, or a field is missing, unknown, of the wrong type or out of range.
        DigestMismatchError: the entries are not those that `digest` was computed over.
    """
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise StorageError(f"{where} is not JSON ({error}): the file is damaged; delete it and publish again") from None
    fault = _Fault(where)
    row = fault.record(row, _MANIFEST_FIELDS)
    fault.unless(_is_a(list, row["tensors"]), "`tensors` must be a list")
    row["tensors"] = tuple(_entry(entry, fault) for entry in row["tensors"])
    manifest = Manifest(**row)
    _check_manifest(manifest, fault)
    if manifest.digest != state_digest(manifest.tensors):
        raise DigestMismatchError(
            f"{where} (version {manifest.version}) says digest {manifest.digest}, but its entries have "
            f"{state_digest(manifest.tensors)}: the file is damaged; re-seed from the newest anchor"
        )
    return manifest


class _Fault:
    """Turns a broken expectation into a `StorageError` that names the source."""

    def __init__(self, where: str) -> None:
        self.where = where

    def unless(self, holds: bool, expectation: str) -> None:
        """Raise when `holds` is false."""
        if not holds:
            raise StorageError(f"{self.where} is malformed: {expectation}; the file is damaged or of another release")

    def record(self, row: Any, names: frozenset[str]) -> dict[str, Any]:
        """`row` as a dict with exactly these keys."""
        self.unless(_is_a(dict, row) and row.keys() == names, f"an object must have the fields {sorted(names)}")
        return row


def _entry(row: Any, fault: _Fault) -> TensorEntry:
    row = fault.record(row, _ENTRY_FIELDS)
    name = row["name"]
    fault.unless(_is_a(str, name) and bool(name), "a tensor's `name` must be a non-empty string")
    fault.unless(
        _is_a(str, row["dtype"]) and row["dtype"] in DTYPE_BYTES, f"{name!r} has an unknown dtype {row['dtype']!r}"
    )
    fault.unless(row["coding"] in _CODINGS, f"{name!r} has an unknown coding {row['coding']!r}")
    shape = row["shape"]
    fault.unless(_is_a(list, shape) and all(_is_count(size) for size in shape), f"{name!r} has a bad shape")
    fault.unless(_is_digest(row["digest"]), f"{name!r} has a bad digest")
    for key in ("offset", "length", "changed"):
        fault.unless(_is_count(row[key]), f"{name!r} has a bad `{key}` {row[key]!r}")
    row["shape"] = tuple(shape)
    return TensorEntry(**row)


def _check_manifest(manifest: Manifest, fault: _Fault) -> None:
    for key in ("version", "payload_bytes", "full_bytes"):
        fault.unless(_is_count(getattr(manifest, key)), f"bad `{key}` {getattr(manifest, key)!r}")
    fault.unless(_is_digest(manifest.digest) and _is_digest(manifest.payload_digest), "bad digest")
    fault.unless(_is_a(str, manifest.payload) and bool(manifest.payload), "bad `payload`")
    names = {entry.name for entry in manifest.tensors}
    fault.unless(len(names) == len(manifest.tensors), "a tensor's name appears twice")
    if manifest.kind == "anchor":
        fault.unless(manifest.base_version is None, f"an anchor has no base, not {manifest.base_version!r}")
        return
    fault.unless(manifest.kind == "delta", f"bad `kind` {manifest.kind!r}")
    base: Any = manifest.base_version
    fault.unless(_is_count(base) and base < manifest.version, f"a delta's base must be older, not {base!r}")


def _is_a(kind: type, value: Any) -> bool:
    return type(value) is kind


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: Any) -> bool:
    return _is_a(str, value) and len(value) == 32 and _HEX.issuperset(value)
