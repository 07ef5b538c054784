"""The reward plug-in as its author writes it, and what becomes of its answer.

    from rlorch.scoring import reward

    @reward
    def exact(rollout) -> float:
        return float(rollout.completion.strip() == rollout.row["answer"])

A plug-in is a function `(rollout, **options) -> float | Verdict`, sync or async, or a class that is constructed once
with its options and called with each rollout. It reads `rollout.prompt.text`, `rollout.completion`, `rollout.row`,
`rollout.finish_reason` and `rollout.turns` (`rlorch.types.Rollout`).

The answer is a bool, int or finite float, or a `Verdict`. Anything else (None, NaN, a string) is the failure
`invalid`: a plug-in that forgets to return must not train the policy towards 0.
"""

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, TypeVar, cast, overload

from rlorch.errors import PluginError
from rlorch.plugins import PluginKind, describe_exception, resolve
from rlorch.types import Rollout, Verdict

F = TypeVar("F", bound=Callable[..., Any])
MARK = "__rlorch_reward__"


@dataclass(frozen=True, slots=True)
class RewardInfo:
    """What `@reward` was told. `timeout_s` shortens the budget of this plug-in, per rollout; None: the worker's."""

    name: str | None = None
    timeout_s: float | None = None


@overload
def reward(target: F, /) -> F: ...
@overload
def reward(*, name: str | None = None, timeout_s: float | None = None) -> Callable[[F], F]: ...
def reward(
    target: Callable[..., Any] | None = None, /, *, name: str | None = None, timeout_s: float | None = None
) -> Any:
    """Mark a function or class as a reward plug-in; it stays callable as it is.

    Args:
        target: what is decorated, when used without parentheses.
        name: the name of its part in combined scores and metrics; default: the function's or file's name.
        timeout_s: seconds per rollout after which it is killed, where that is less than the worker's budget.

    Raises:
        ValueError: a budget that is not positive.
        TypeError: not used on a function or class.
    """
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"@reward(timeout_s={timeout_s}): the budget must be more than 0 seconds")
    info = RewardInfo(name, timeout_s)

    def mark(plugin: F) -> F:
        if not callable(plugin):
            raise TypeError(f"@reward marks a function or a class, not {plugin!r}")
        setattr(plugin, MARK, info)
        return plugin

    return mark if target is None else mark(target)


def _is_reward(value: object) -> bool:
    return MARK in getattr(value, "__dict__", {})  # its own: not a class's on its instances or subclasses


REWARD_KIND = PluginKind("reward", "@reward", "rlorch.rewards", "rewards", _is_reward)


@dataclass(frozen=True, slots=True)
class RewardTermCall:
    """One loaded plug-in, ready to be called with a rollout. `file` is where it was written."""

    name: str
    weight: float
    timeout_s: float | None
    file: str
    call: Callable[[Rollout], "Awaitable[object] | object"]


def load_term(plugin: str, weight: float, options: Mapping[str, Any]) -> RewardTermCall:
    """Resolve a plug-in string, check its options and construct it.

    Raises:
        PluginError: it cannot be loaded, an option is unknown, or its constructor fails.
    """
    target = resolve(plugin, REWARD_KIND)
    info = cast(RewardInfo, getattr(target, MARK, RewardInfo()))
    is_class = inspect.isclass(target)
    _check_options(plugin, target, options, skip=0 if is_class else 1)
    file = inspect.getsourcefile(target) or "<unknown>"
    if is_class:
        try:
            instance: Any = target(**options)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"reward {plugin!r}: {target.__name__}({_shown(options)}) failed: {describe_exception(error, file)}"
            ) from error
        if not callable(instance):
            raise PluginError(f"reward {plugin!r}: class {target.__name__} needs a method __call__(self, rollout)")
        call = cast("Callable[[Rollout], object]", instance)
    else:
        call = cast("Callable[[Rollout], object]", partial(target, **options) if options else target)
    name = info.name or (plugin if plugin.isidentifier() else str(getattr(target, "__name__", plugin)))
    return RewardTermCall(name, weight, info.timeout_s, file, call)


def _check_options(plugin: str, target: Any, options: Mapping[str, Any], skip: int) -> None:
    try:
        parameters = list(inspect.signature(target).parameters.values())[skip:]
    except ValueError:  # some C callables have no signature: the call itself will tell
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    named = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    unknown = [option for option in options if option not in named]
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in options]
    if unknown:
        raise PluginError(f"reward {plugin!r} has no option {unknown[0]!r}; its options: {', '.join(named) or 'none'}")
    if missing:
        raise PluginError(f"reward {plugin!r} needs the option {missing[0]!r}: set it under options")


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def to_verdict(answer: object) -> Verdict:
    """What a plug-in returned, as a verdict; `invalid` where it is not a finite number or a verdict."""
    if isinstance(answer, Verdict):
        numbers = [value for value in (answer.score, *answer.parts.values()) if value is not None]
        wrong = next((value for value in numbers if not _is_finite_number(value)), None)
        return answer if wrong is None else Verdict(failure="invalid", detail=f"a verdict with {wrong!r}")
    if _is_finite_number(answer):
        return Verdict(float(cast(float, answer)))
    hint = "; did it forget to return?" if answer is None else ""
    return Verdict(
        failure="invalid", detail=f"returned {answer!r:.200} ({type(answer).__name__}), not a finite number{hint}"
    )


def _is_finite_number(value: object) -> bool:
    """A real scalar (Python or numpy) that float64 holds and that is finite."""
    if not (isinstance(value, bool | Real) or (getattr(value, "shape", None) == () and hasattr(value, "item"))):
        return False
    try:
        return math.isfinite(float(cast(float, value)))
    except (TypeError, ValueError, OverflowError):
        return False


def combine(terms: "list[tuple[RewardTermCall, Verdict]]") -> Verdict:
    """The weighted sum of the terms' scores; a failure of any term is the failure of the whole.

    `parts` holds each term's unweighted score by name, and its own parts as `name/part`.
    """
    parts: dict[str, float] = {}
    total = 0.0
    for term, verdict in terms:
        if verdict.failure is not None or verdict.score is None:
            return Verdict(failure=verdict.failure, detail=f"{term.name}: {verdict.detail}")
        parts[term.name] = float(verdict.score)
        parts |= {f"{term.name}/{part}": float(value) for part, value in verdict.parts.items()}
        total += term.weight * float(verdict.score)
    if not math.isfinite(total):
        return Verdict(failure="invalid", detail=f"the weighted sum is {total}: {parts}")
    detail = "; ".join(f"{term.name}: {verdict.detail}" for term, verdict in terms if verdict.detail)
    return Verdict(total, detail=detail, parts=parts)
