"""Environments from a config: which plug-in, with which options, for how long."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import Field

from rlorch.errors import PluginError
from rlorch.plugins import PluginKind, resolve
from rlorch.rollout.environment import Environment
from rlorch.rollout.multi_turn import EpisodeLimits
from rlorch.specs import Spec

METHODS = ("reset", "step", "close")


def _is_environment(found: object) -> bool:
    return isinstance(found, type) and all(callable(getattr(found, name, None)) for name in METHODS)


ENVIRONMENT_KIND = PluginKind(
    noun="environment",
    decorator="the methods reset, step and close",
    group="rlorch.environments",
    builtin_package=None,
    is_plugin=_is_environment,
)
"""A file's only class with these methods need not be named; anything callable that makes one can be."""


class EnvironmentSpec(Spec):
    """What the policy acts in, turn by turn; without it a rollout is one completion."""

    plugin: str = Field(
        description="path/to/file.py[:attr], module:attr, or an entry point; makes one episode's object"
    )
    options: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict[str, "str | int | float | bool | None"], description="arguments of every episode's object"
    )
    limits: EpisodeLimits = EpisodeLimits()


def load_environment(spec: EnvironmentSpec) -> Callable[[], Environment]:
    """Makes the environment of one episode each time it is called.

    Raises:
        PluginError: there is no such plug-in, or it takes other options.
    """
    factory: Callable[..., Any] = resolve(spec.plugin, ENVIRONMENT_KIND)
    try:
        inspect.signature(factory).bind(**spec.options)
    except TypeError as error:
        raise PluginError(f"environment {spec.plugin!r}: options {sorted(spec.options)} do not fit: {error}") from error
    return partial(factory, **spec.options)
