"""pydantic's validation errors as lines that say where, which key, which value and what is allowed."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rlorch.config.document import Document, Key, dotted
from rlorch.config.schema import Slot, known_keys, slots_at, step, walk, words

_LONGEST_VALUE = 80
"""Characters of a value that a message repeats."""


def explain(cls: type[BaseModel], document: Document, error: ValidationError) -> list[str]:
    """One line per wrong key, in the order of the config class."""
    lines: dict[Key, str] = {}
    for problem in error.errors(include_url=False):
        key = _key(cls, problem["loc"], problem["type"])
        if problem["type"] == "too_short" and len(problem["input"]) >= problem.get("ctx", {}).get("min_length", 0):
            continue  # pydantic also counts the items that were refused; they have lines of their own
        if key not in lines:
            lines[key] = f"{document.place(key)}: {_line(cls, key, problem)}"
    return list(lines.values())


def _key(cls: type[BaseModel], loc: tuple[str | int, ...], kind: str) -> Key:
    """`loc` without the parts that name members of unions."""
    key: Key = ()
    slots: tuple[Slot, ...] = (Slot(cls),)
    for position, part in enumerate(loc):
        inner = tuple(found for slot in slots for found in step(slot, part))
        if inner or (kind == "extra_forbidden" and position == len(loc) - 1):
            key, slots = (*key, part), inner
    return key


def _line(cls: type[BaseModel], key: Key, problem: Mapping[str, Any]) -> str:
    name, value = dotted(key), _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_nearest(cls, key)}"
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])
        return f"{name} = {value}: {reason}" if slots_at(cls, key) and key else reason
    slots = slots_at(cls, key)
    allowed = " or ".join(dict.fromkeys(words(slot) for slot in slots)) or problem["msg"]
    if problem["type"] == "missing":
        meaning = next((slot.field.description for slot in slots if slot.field and slot.field.description), "")
        return f"{name}: required, {allowed}" + (f" ({meaning})" if meaning else "")
    if not key:
        return f"must be {allowed}, not {value}"
    return f"{name} = {value}: must be {allowed}"


def _nearest(cls: type[BaseModel], key: Key) -> str:
    """The known key that an unknown one most likely means: of the same section first, else of any section."""
    known = known_keys(slots_at(cls, key[:-1]))
    last = str(key[-1])
    if close := difflib.get_close_matches(last, known, 1):
        return f"did you mean {dotted((*key[:-1], close[0]))}?"
    elsewhere = {dotted(path): path[-1] for path, _ in walk(cls)}
    if exact := [path for path, leaf in elsewhere.items() if leaf == last]:
        return f"did you mean {' or '.join(exact[:3])}?"
    if close := difflib.get_close_matches(last, list(elsewhere.values()), 1):
        return f"did you mean {next(path for path, leaf in elsewhere.items() if leaf == close[0])}?"
    return f"known here: {', '.join(known)}"


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
