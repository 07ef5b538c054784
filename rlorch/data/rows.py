"""What a dataset row is: a dict of JSON values, checked where it enters, with the place it came from in every error."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any, cast

import numpy as np
from pydantic import Field

from rlorch.errors import DataError
from rlorch.specs import Spec

Row = dict[str, Any]
Rows = Sequence[Row]


class DataSpec(Spec):
    """Where rows come from. Rows keep all their fields; rewards read them by name (`rollout.row["answer"]`)."""

    source: str = Field(
        min_length=1,
        description="path or glob of .jsonl, .csv, .parquet; a directory; reasoning_gym:<task>; a Hugging Face name",
    )
    split: str = Field(default="train", description="split of a Hugging Face dataset or of a directory with several")
    prompt_field: str | None = Field(
        default=None, description="row field that becomes `prompt`, text or messages; every row must then have it"
    )
    messages_field: str | None = Field(
        default=None, description="row field that becomes `messages`; every row must then have it"
    )
    limit: int | None = Field(default=None, ge=1, description="use only the first rows")
    options: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="reasoning_gym: size, seed and the task's own; Hugging Face: name, revision, data_files, ...",
    )


def check_row(row: Any, where: str, spec: DataSpec) -> Row:
    """The row with `prompt` and `messages` under those names.

    A row needs neither when the spec maps neither: a template may build the prompt from other fields.

    Args:
        row: as read.
        where: `file:line` or the like, for errors.
        spec: which fields become `prompt` and `messages`.

    Raises:
        DataError: not an object, a mapped field is missing, or a prompt that is neither text nor messages.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object with fields, not {shown(row)}")
    row = cast("Row", row)
    for name, mapped in (("prompt", spec.prompt_field), ("messages", spec.messages_field)):
        if mapped is None:
            continue
        if mapped not in row:
            raise DataError(
                f"{where}: no field {mapped!r}; the row has {', '.join(map(repr, row)) or 'none'}. "
                f"Set data.{name}_field to one of them"
            )
        row[name] = row[mapped]
    if "prompt" in row:
        _check_prompt(row["prompt"], where, spec.prompt_field or "prompt")
    if "messages" in row:
        _check_messages(row["messages"], where, spec.messages_field or "messages")
    return row


def _check_prompt(value: Any, where: str, field: str) -> None:
    if isinstance(value, list):
        _check_messages(cast("list[Any]", value), where, field)
    elif not isinstance(value, str):
        raise DataError(f"{where}: {field!r} must be text or a list of messages, not {shown(value)}")
    elif not value:
        raise DataError(f"{where}: {field!r} is empty; remove the row or fill it in")


def _check_messages(value: Any, where: str, field: str) -> None:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field!r} must be a list of messages (role, content), not {shown(value)}")
    for index, message in enumerate(cast("list[Any]", value)):
        at = f"{where}: {field}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{at} must be an object with role and content, not {shown(message)}")
        fields = cast("Row", message)
        if not isinstance(fields.get("role"), str):
            raise DataError(f"{at} needs a 'role' that is text (system, user, assistant), not {shown(fields)}")
        if not isinstance(fields.get("content"), str | list) and not fields.get("tool_calls"):
            raise DataError(f"{at} needs a 'content' that is text, not {shown(fields.get('content'))}")


def jsonable(value: Any, where: str, *, or_text: bool = False) -> Any:
    """A value as JSON has it: tuples and arrays become lists, dates ISO text, keys text.

    Args:
        value: anything.
        where: for errors.
        or_text: what has no JSON form becomes its `str`; else it is an error.

    Raises:
        DataError: no JSON form (bytes, images).
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return jsonable(cast("Any", value).tolist(), where, or_text=or_text)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {str(key): jsonable(item, f"{where}.{key}", or_text=or_text) for key, item in pairs}
    if isinstance(value, set | frozenset):
        value = sorted(cast("Iterable[Any]", value), key=repr)  # sets have no order; rows must be the same every time
    if isinstance(value, list | tuple):
        items = enumerate(cast("Iterable[Any]", value))
        return [jsonable(item, f"{where}[{index}]", or_text=or_text) for index, item in items]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if or_text:
        return str(value)
    raise DataError(f"{where}: a {type(value).__name__} has no JSON form; remove the column or convert it to text")


def shown(value: Any) -> str:
    """A value for an error message, cut to a line."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
