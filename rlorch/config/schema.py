"""What a config class allows at a key: types, ranges, sections, in words a user reads.

A `Slot` is one possible type at one place of the config; a union gives several. Only what configs use is understood:
pydantic models, unions, Optional, Annotated, Literal, Enum, tuples, lists and dicts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS: Mapping[Any, str] = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    Any: "anything",
}
_PLURALS: Mapping[str, str] = {
    "text": "texts",
    "an integer": "integers",
    "a number": "numbers",
    "true or false": "booleans",
    "a path": "paths",
    "anything": "anything",
}
_BOUNDS: tuple[tuple[str, str], ...] = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


@dataclass(frozen=True, slots=True)
class Slot:
    """A type, its constraints, and the field it belongs to (None for list items and the root)."""

    annotation: Any
    metadata: tuple[Any, ...] = ()
    field: FieldInfo | None = None


def slots_at(cls: type[BaseModel], key: Sequence[str | int]) -> tuple[Slot, ...]:
    """What may stand at `key`; empty where the class knows no such key."""
    slots: tuple[Slot, ...] = (Slot(cls),)
    for part in key:
        slots = tuple(inner for slot in slots for inner in step(slot, part))
    return slots


def step(slot: Slot, part: str | int) -> Iterator[Slot]:
    """What may stand one key or index below `slot`."""
    for annotation in alternatives(slot.annotation):
        origin, args = get_origin(annotation), get_args(annotation)
        if is_model(annotation):
            info = annotation.model_fields.get(part) if isinstance(part, str) else None
            if info is not None:
                yield Slot(info.annotation, tuple(info.metadata), info)
        elif origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
            if isinstance(part, str):
                yield Slot(args[1])
        elif origin is tuple and isinstance(part, int):
            if len(args) == 2 and args[1] is Ellipsis:
                yield Slot(args[0])
            elif part < len(args):
                yield Slot(args[part])
        elif isinstance(origin, type) and issubclass(origin, Sequence) and isinstance(part, int):
            yield Slot(args[0])


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, Annotated stripped; a plain type is its own only member."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(inner for member in get_args(annotation) for inner in alternatives(member))
    return (annotation,)


def is_model(annotation: Any) -> bool:
    """Whether a type is a config section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def section(annotation: Any) -> type[BaseModel] | None:
    """The one section that a field holds (`S` or `S | None`), or None for anything else."""
    found = [member for member in alternatives(annotation) if member is not NoneType]
    return found[0] if len(found) == 1 and is_model(found[0]) else None


def known_keys(slots: Sequence[Slot]) -> tuple[str, ...]:
    """Keys of the sections that may stand at a place, in declaration order."""
    models = [member for slot in slots for member in alternatives(slot.annotation) if is_model(member)]
    return tuple(dict.fromkeys(name for model in models for name in model.model_fields))


def walk(cls: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Slot]]:
    """Every field of a config class and of its sections, depth first. List items appear under the key `0`."""
    for name, info in cls.model_fields.items():
        slot = Slot(info.annotation, tuple(info.metadata), info)
        yield (*prefix, name), slot
        for member in alternatives(info.annotation):
            if is_model(member):
                yield from walk(member, (*prefix, name))
            elif item := _item_model(member):
                yield from walk(item, (*prefix, name, "0"))


def _item_model(annotation: Any) -> type[BaseModel] | None:
    args = get_args(annotation)
    if get_origin(annotation) in (tuple, list) and args:
        return section(args[0])
    return None


def words(slot: Slot) -> str:
    """The type and range as a reader says it: `an integer >= 1 or null`."""
    members = alternatives(slot.annotation)
    plain = [member for member in members if member is not NoneType]
    text = " or ".join(dict.fromkeys(_words(member) for member in plain))
    text += _bounds(slot.metadata, counts=not (plain and plain[0] in (str, Path)))
    return f"{text} or null" if len(plain) < len(members) else text


def _words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in args)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if is_model(annotation):
        return f"a section ({', '.join(annotation.model_fields)})"
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return "a list of " + ", ".join(_words(arg) for arg in args)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {_plural(args[0])} to {' or '.join(_plural(a) for a in alternatives(args[1]))}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list of {_plural(args[0])}"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(annotation: Any) -> str:
    if is_model(annotation):
        return f"sections ({', '.join(annotation.model_fields)})"
    text = _words(annotation)
    return _PLURALS.get(text, text)


def _bounds(metadata: Sequence[Any], *, counts: bool) -> str:
    """Ranges and lengths; `counts` says that a length counts items, not characters."""
    unit = "items" if counts else "characters"
    parts: list[str] = []
    for item in metadata:
        parts += [f"{sign} {getattr(item, name):g}" for name, sign in _BOUNDS if getattr(item, name, None) is not None]
        if (least := getattr(item, "min_length", None)) is not None:
            parts.append("not empty" if least == 1 else f"of at least {least} {unit}")
        if (most := getattr(item, "max_length", None)) is not None:
            parts.append(f"of at most {most} {unit}")
        if (pattern := getattr(item, "pattern", None)) is not None:
            parts.append(f"matching {pattern}")
    if not parts:
        return ""
    text = " and ".join(parts)
    return f", {text}" if text.startswith("not") else f" {text}"
