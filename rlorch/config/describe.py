"""The reference of a config class, from the class itself: key, type, default, meaning."""

import json
from dataclasses import dataclass

from pydantic import BaseModel

from rlorch.config.document import dotted
from rlorch.config.schema import Slot, alternatives, is_model, walk, words

REQUIRED = "(required)"
"""Stands for the default of a key that has none."""


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One key of a config. For a section, `type` is empty and `meaning` the first line of its class."""

    key: str
    type: str
    default: str
    meaning: str
    is_section: bool


def field_docs(cls: type[BaseModel]) -> tuple[FieldDoc, ...]:
    """Every key, sections before what they hold; list items appear under the index 0."""
    defaults = _defaults(cls)
    return tuple(_doc(path, slot, defaults) for path, slot in walk(cls))


def describe(cls: type[BaseModel]) -> str:
    """The reference as text, one block per key, wide lines left to the terminal."""
    lines = [_first_line(cls)]
    for doc in field_docs(cls):
        if doc.is_section:
            lines += ["", f"{doc.key}  -  {doc.meaning}" if doc.meaning else doc.key]
        else:
            meaning = f"  {doc.meaning}" if doc.meaning else ""
            lines.append(f"  {doc.key} = {doc.default}  [{doc.type}]{meaning}")
    return "\n".join(lines)


def _doc(path: tuple[str, ...], slot: Slot, defaults: dict[tuple[str, ...], str]) -> FieldDoc:
    models = [member for member in alternatives(slot.annotation) if is_model(member)]
    meaning = (slot.field.description if slot.field else None) or (_first_line(models[0]) if models else "")
    default = defaults.get(path, _own_default(slot))
    return FieldDoc(dotted(path), "" if models else words(slot), default, meaning, bool(models))


def _defaults(cls: type[BaseModel], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Defaults that a default section sets, by path; they win over those of the section's class."""
    found: dict[tuple[str, ...], str] = {}
    for name, info in cls.model_fields.items():
        for member in alternatives(info.annotation):
            if is_model(member):
                found |= _defaults(member, (*prefix, name))
        if info.is_required() or info.default_factory_takes_validated_data:
            continue
        default = info.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            found |= _instance_defaults(default, (*prefix, name))
    return found


def _instance_defaults(default: BaseModel, prefix: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for name in default.model_fields_set:
        value = getattr(default, name)
        if isinstance(value, BaseModel):
            found |= _instance_defaults(value, (*prefix, name))
        else:
            found[*prefix, name] = _json(value)
    return found


def _own_default(slot: Slot) -> str:
    if slot.field is None or slot.field.is_required():
        return REQUIRED
    if slot.field.default_factory_takes_validated_data:
        return "(computed)"
    return _json(slot.field.get_default(call_default_factory=True))


def _json(value: object) -> str:
    if isinstance(value, tuple | list):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    elif isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, ensure_ascii=False, default=str)


def _first_line(cls: type[BaseModel]) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]
