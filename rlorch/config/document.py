"""A YAML file as data plus the place of every key, and data back to YAML.

Scalars follow the YAML 1.2 core schema, not PyYAML's 1.1: `1e-4` is a float, `017` is seventeen, and yes, no, on,
off, dates and `1:30` are text. What `dump_yaml` writes, `read_document` and `parse_value` read back equal.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rlorch.errors import ConfigError

Key = tuple[str | int, ...]
"""The path of a value: mapping keys and list indices."""


@dataclass(frozen=True, slots=True)
class Document:
    """The data of a file (or of no file) and where each of its keys was written, as `file:line`."""

    name: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    places: dict[Key, str] = field(default_factory=dict[Key, str])

    def place(self, key: Key) -> str:
        """Where `key`, or the nearest thing that encloses it, was written."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.name


class _Loader(yaml.SafeLoader):
    """PyYAML takes its scalar rules from class attributes, so a subclass is the only way to change them."""


class _Dumper(yaml.SafeDumper):
    """The same scalar rules on the way out: text that would be read as a number is quoted."""


_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", "<"),
)


def _construct_int(loader: yaml.SafeLoader, node: ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Line breaks to YAML 1.1 but not to YAML 1.2 or JSON: PyYAML would fold them away unless they are escaped."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _BREAKS.search(text) else None)


def _install_scalars() -> None:
    for owner in (_Loader, _Dumper):
        owner.yaml_implicit_resolvers = {}
        for tag, pattern, first in _SCALARS:
            letters = ["" if letter == "\0" else letter for letter in first]
            owner.add_implicit_resolver(tag, re.compile(pattern), letters)
    _Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
    _Dumper.add_representer(str, _represent_text)


_install_scalars()


def read_document(path: Path) -> Document:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file cannot be read, is not YAML, repeats a key, or is not a mapping; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory; name the YAML file in it") from error
    except FileNotFoundError as error:
        raise ConfigError(f"there is no config file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}") from error
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> Document:
    """`read_document` for text; `name` stands for the file in messages. An empty text is an empty mapping."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(name)
        places: dict[Key, str] = {}
        _check_and_locate(node, (), name, places, ())
        if not isinstance(node, MappingNode):
            raise ConfigError(f"{name}:{_line(node)}: a config is a mapping of keys to values, not {_kind(node)}")
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return Document(name, data, places)


def parse_value(text: str, what: str) -> Any:
    """One YAML value, as written on the command line. Raises `ConfigError` naming `what`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: the value {text!r} is not valid YAML; quote it: key='\"text\"'") from error


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Data of JSON types as YAML, keys in their order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _check_and_locate(node: Node, key: Key, name: str, places: dict[Key, str], enclosing: tuple[Node, ...]) -> None:
    """Record the line of every key under `node`; refuse repeated keys, keys that are not text, and cycles."""
    places.setdefault(key, f"{name}:{_line(node)}")
    if any(node is outer for outer in enclosing):
        raise ConfigError(f"{name}:{_line(node)}: an alias that contains itself")
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise ConfigError(f"{name}:{_line(key_node)}: a key must be text, not {_kind(key_node)}")
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            part = key_node.value
            if key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(f"{name}:{_line(key_node)}: the key {part} must be text: write '{part}'")
            if part in seen:
                raise ConfigError(f"{name}:{_line(key_node)}: {dotted((*key, part))} is given twice")
            seen.add(part)
            places[(*key, part)] = f"{name}:{_line(key_node)}"
            _check_and_locate(value_node, (*key, part), name, places, (*enclosing, node))
    elif isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            _check_and_locate(item, (*key, index), name, places, (*enclosing, node))


def _line(node: Node) -> int:
    return node.start_mark.line + 1 if node.start_mark else 1


def _kind(node: Node) -> str:
    return {MappingNode: "a mapping", SequenceNode: "a list"}.get(type(node), f"the value {node.value!r}")


def dotted(key: Key) -> str:
    """`rewards.terms.0.weight`."""
    return ".".join(str(part) for part in key)
