"""From a file and overrides to a checked config, and back to YAML."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlorch.config.document import Document, Key, dotted, dump_yaml, parse_value, read_document
from rlorch.config.explain import explain
from rlorch.config.schema import section, slots_at
from rlorch.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

_INDEX = re.compile(r"\d+")


def load_config(cls: type[M], path: Path | None = None, overrides: Sequence[str] = ()) -> M:
    """Read `path` (or nothing), apply `key=value` overrides in order, and check the result.

    Raises:
        ConfigError: every problem at once, one line each: place, key, value, what is allowed.
    """
    document = read_document(path) if path is not None else Document("the command line")
    data = _with_default_sections(cls, _unshared(document.data))
    problems: list[str] = []
    for text in overrides:
        try:
            _override(cls, data, document, text)
        except ConfigError as error:
            problems.append(str(error))
    try:
        config = cls.model_validate(_with_default_sections(cls, data))
    except ValidationError as error:
        problems += explain(cls, document, error)
    except RecursionError as error:
        raise ConfigError(f"{document.name}: nested too deeply") from error
    else:
        if not problems:
            return config
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError(f"{count} in the config:\n" + "\n".join(f"  {problem}" for problem in problems))


def dump_config(config: BaseModel) -> str:
    """YAML text of a whole config, defaults included; `load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(cls: type[BaseModel], data: dict[str, Any], document: Document, text: str) -> None:
    """Put one `dotted.key=value` into `data`, and its place into the document. Raises `ConfigError`."""
    name, equals, value_text = text.partition("=")
    place = f"override '{text}'"
    if not equals or not name.strip():
        raise ConfigError(f"{place}: an override is key=value, for example train.steps=10")
    parts = name.strip().split(".")
    if not all(parts):
        raise ConfigError(f"{place}: the key {name.strip()!r} has an empty part")
    value = parse_value(value_text, place)
    container: Any = data
    key: Key = ()
    for depth, part in enumerate(parts):
        step = _step(container, key, part, place)
        key = (*key, step)
        if depth == len(parts) - 1:
            _put(container, step, value)
        else:
            container = _descend(cls, container, step, key, place)
    for old in [known for known in document.places if known[: len(key)] == key]:
        del document.places[old]
    document.places[key] = place


def _step(container: Any, key: Key, part: str, place: str) -> str | int:
    """`part` as a key of a mapping or an index of a list; one past the end appends."""
    if not isinstance(container, list):
        return part
    if not _INDEX.fullmatch(part) or int(part) > len(container):
        raise ConfigError(
            f"{place}: {dotted(key)} is a list of {len(container)}: use an index from 0 to {len(container)} "
            f"({len(container)} appends), not {part!r}"
        )
    return int(part)


def _put(container: Any, step: str | int, value: Any) -> None:
    if step == len(container) and isinstance(step, int):
        container.append(value)
    else:
        container[step] = value


def _descend(cls: type[BaseModel], container: Any, step: str | int, key: Key, place: str) -> Any:
    """The mapping or list at `key`, made from the default of the class where the file does not have it."""
    exists = step < len(container) if isinstance(step, int) else container.get(step) is not None
    if not exists:
        _put(container, step, _default_container(cls, key))
    inner = container[step]
    if not isinstance(inner, dict | list):
        raise ConfigError(f"{place}: {dotted(key)} is {inner!r}, which has no keys below it")
    return inner


def _default_container(cls: type[BaseModel], key: Key) -> dict[str, Any] | list[Any]:
    for slot in slots_at(cls, key):
        if slot.field is None or slot.field.is_required() or slot.field.default_factory_takes_validated_data:
            continue
        default = slot.field.get_default(call_default_factory=True)
        if isinstance(default, tuple | list):
            return [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in default]
        if isinstance(default, BaseModel):
            return default.model_dump(mode="json", include=default.model_fields_set)
        if isinstance(default, Mapping):
            return dict(default)
    return {}


def _unshared(value: Any) -> Any:
    """A copy in which a YAML alias is a value of its own, so that an override changes one place only."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _with_default_sections(cls: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """`data`, each section given in part completed from the field's own default section."""
    merged = dict(data)
    for name, info in cls.model_fields.items():
        inner = section(info.annotation)
        if inner is None or not isinstance(merged.get(name), dict):
            continue
        default = None
        if not info.is_required() and not info.default_factory_takes_validated_data:
            default = info.get_default(call_default_factory=True)
        if isinstance(default, inner):
            merged[name] = _completed(default, merged[name])
        merged[name] = _with_default_sections(inner, merged[name])
    return merged


def _completed(default: BaseModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` plus the fields that `default` sets itself; its class fills in the others."""
    completed = dict(given)
    dumped = default.model_dump(mode="json", include=default.model_fields_set)
    for name, value in dumped.items():
        own = getattr(default, name)
        if name not in completed:
            completed[name] = value
        elif isinstance(own, BaseModel) and isinstance(completed[name], dict):
            completed[name] = _completed(own, completed[name])
    return completed
