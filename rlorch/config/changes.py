"""What differs between two configs, their digest, and whether a run may go on with a changed one."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from rlorch.errors import ResumeError

ABSENT = "(absent)"
"""Stands for the value of a key that one of two configs does not have."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key whose value differs; a missing key has the value `ABSENT`."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def flatten(config: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """Every leaf by dotted key, list items by index; an empty list or mapping is a leaf."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    leaves: dict[str, Any] = {}
    _flatten(data, "", leaves)
    return leaves


def _flatten(value: Any, prefix: str, leaves: dict[str, Any]) -> None:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    if not items and prefix:
        leaves[prefix] = list(value) if isinstance(value, tuple) else value
    for key, inner in items:
        _flatten(inner, f"{prefix}.{key}" if prefix else str(key), leaves)


def diff_configs(old: BaseModel | Mapping[str, Any], new: BaseModel | Mapping[str, Any]) -> tuple[Change, ...]:
    """The leaves that differ, in key order of `old` and then of `new`. A class default counts as its value."""
    before, after = flatten(old), flatten(new)
    return tuple(
        Change(key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in dict.fromkeys((*before, *after))
        if not _same(before.get(key, ABSENT), after.get(key, ABSENT))
    )


def check_resumable(
    old: BaseModel | Mapping[str, Any], new: BaseModel | Mapping[str, Any], may_change: Collection[str]
) -> tuple[Change, ...]:
    """The changes, all of keys in `may_change` (a key covers what is below it).

    Raises:
        ResumeError: another key changed; names each with its values, and the keys that may change.
    """
    changes = diff_configs(old, new)
    if refused := [change for change in changes if not covers(may_change, change.key)]:
        lines = "\n".join(f"  {change}" for change in refused)
        allowed = ", ".join(sorted(may_change)) or "nothing"
        raise ResumeError(
            f"the run was started with another config:\n{lines}\n"
            f"set these back, or start a new run_dir. What may change on resume: {allowed}"
        )
    return changes


def config_digest(config: BaseModel | Mapping[str, Any], ignore: Collection[str] = ()) -> str:
    """SHA-256 hex of the leaves, without the keys in `ignore` and what is below them."""
    leaves = {key: value for key, value in flatten(config).items() if not covers(ignore, key)}
    return hashlib.sha256(json.dumps(leaves, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def covers(keys: Collection[str], key: str) -> bool:
    """Whether `key` is one of `keys` or lies below one."""
    return any(key == outer or key.startswith(f"{outer}.") for outer in keys)


def _same(old: Any, new: Any) -> bool:
    """Equal in type and value: true is not 1, but 2.0 is 2."""
    return old == new and isinstance(old, bool) == isinstance(new, bool)


def _shown(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value, ensure_ascii=False)
