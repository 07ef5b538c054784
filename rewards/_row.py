"""Reading dataset rows: a missing field is an error that names the row's fields, never a score of 0."""

from typing import Any

from rlorch.types import Rollout


def field(rollout: Rollout, key: str) -> Any:
    """The value of `key` in the rollout's row. Raises KeyError."""
    if key not in rollout.row:
        fields = ", ".join(sorted(map(str, rollout.row))) or "no fields"
        raise KeyError(f"the row of prompt {rollout.prompt.ordinal} has no {key!r}; it has {fields}")
    return rollout.row[key]
