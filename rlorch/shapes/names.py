"""Resource names of shapes: `accounts/<account>/trainingShapes/<shape>[/versions/<version>]`, or the bare shape."""

import re
from dataclasses import dataclass
from typing import Literal

from rlorch.errors import ConfigError

DEFAULT_ACCOUNT = "fireworks"
"""Of names given without one: the account under which the public catalogue is published."""

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""A DNS label, as in every resource name of the API."""

Collection = Literal["trainingShapes", "deploymentShapes"]


@dataclass(frozen=True, slots=True)
class ShapeRef:
    """A reference taken apart. `version` None means: whatever the catalogue has."""

    account: str
    name: str
    version: str | None = None


def parse_ref(ref: str, collection: Collection = "trainingShapes") -> ShapeRef:
    """Read a bare or full name, with or without a version.

    Raises:
        ConfigError: it is neither.
    """
    parts = ref.split("/")
    account = DEFAULT_ACCOUNT
    if len(parts) in (4, 6) and parts[0] == "accounts" and parts[2] == collection:
        account, parts = parts[1], parts[3:]
    version = None
    if len(parts) == 3 and parts[1] == "versions":
        version, parts = parts[2], parts[:1]
    if len(parts) != 1 or not all(NAME.fullmatch(part) for part in (account, parts[0], version or "x")):
        raise ConfigError(
            f"{ref!r} is not the name of a shape: write <shape>, or accounts/<account>/{collection}/<shape>, either "
            "with /versions/<version> where one is meant; names are of a-z, 0-9 and -"
        )
    return ShapeRef(account, parts[0], version)


def full_name(account: str, collection: Collection, name: str, version: str) -> str:
    """`accounts/<account>/<collection>/<name>/versions/<version>`."""
    return f"accounts/{account}/{collection}/{name}/versions/{version}"
