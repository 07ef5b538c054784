"""From a string to code: built-in names, entry points, `module:attr`, and files.

`resolve` reads one plug-in string, in this order:

    path/to/file.py[:attr]   ends in .py before an optional :attr; relative to the working directory
    module:attr              imported; the working directory counts as the last place on sys.path
    name                     a module of the built-in package, else an entry point of the group

Where no attribute is named, the one object that carries the plug-in's decorator and was defined there is meant.
A built-in name wins over an entry point of the same name: what a config means does not change with what is installed.

Every failure is a `PluginError` that names the string, where it was looked for, the nearest known name and the fix; an
exception in the user's code shows its line. `sibling` reaches the packages that ship beside rlorch (`rewards`,
`actors`), which rlorch never imports by name.
"""

import hashlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata, util
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import rlorch
from rlorch.errors import PluginError, RlorchError, ShadowedPackageError


def sibling(name: str) -> ModuleType:
    """Import the top-level package `name`, and only the one that is installed beside rlorch.

    Raises:
        ShadowedPackageError: another package of that name comes first on sys.path.
    """
    module = import_module(name)
    home = Path(rlorch.__file__).resolve().parents[1]
    places = [Path(place).resolve() for place in getattr(module, "__path__", [module.__file__])]
    if places != [home / name]:
        found = ", ".join(str(place) for place in places)
        raise ShadowedPackageError(
            f"`import {name}` finds {found}, but rlorch needs its own {home / name}: rename that folder, or take "
            f"{places[0].parent} off PYTHONPATH and run from another directory"
        )
    return module


@dataclass(frozen=True, slots=True)
class PluginKind:
    """What is being looked for: the words for messages, and where such plug-ins live.

    `builtin_package` None: none is built in. `is_plugin` says whether an object carries the decorator.
    """

    noun: str
    decorator: str
    group: str
    builtin_package: str | None
    is_plugin: Callable[[object], bool]


def resolve(spec: str, kind: PluginKind) -> Any:
    """The object that the plug-in string `spec` names.

    Raises:
        PluginError: it cannot be found or imported, or is not a plug-in of this kind.
        ShadowedPackageError: the built-in package is hidden by another one.
    """
    head, _, attr = spec.partition(".py:") if ".py:" in spec else (spec, "", "")
    if spec.endswith(".py") or attr:
        return _from_file(spec, Path(f"{head}.py" if attr else spec), attr, kind)
    if ":" in spec:
        module_name, _, attr = spec.partition(":")
        if not module_name or not attr:
            raise PluginError(f"{kind.noun} {spec!r}: write module:attr with both parts, e.g. my_package.scores:exact")
        return _attribute(_import(spec, module_name, kind), attr, spec, kind)
    return _by_name(spec, kind)


def known_names(kind: PluginKind) -> tuple[str, ...]:
    """Every name that `resolve` knows without a module or path: built-ins, then entry points; sorted."""
    return tuple(sorted({*_builtin_names(kind), *metadata.entry_points(group=kind.group).names}))


def _by_name(spec: str, kind: PluginKind) -> Any:
    if spec in _builtin_names(kind):
        return _only_plugin(_import(spec, f"{kind.builtin_package}.{spec}", kind), spec, kind)
    for entry in metadata.entry_points(group=kind.group, name=spec):
        try:
            found = entry.load()
        except Exception as error:
            raise _broken(spec, f"entry point {entry.value}", kind, error) from error
        return _checked(found, spec, entry.value, kind)
    near = _nearest(spec, known_names(kind))
    wrong_form = ""
    if Path(f"{spec}.py").is_file():
        wrong_form = f" There is a file {spec}.py: write {spec}.py."
    elif "." in spec or os.sep in spec:
        wrong_form = " For your own code write module:attr or path/to/file.py:attr."
    raise PluginError(
        f"{kind.noun} {spec!r} is neither built in ({', '.join(_builtin_names(kind))}) nor an entry point of group "
        f"{kind.group!r}.{near}{wrong_form}"
    )


def _from_file(spec: str, path: Path, attr: str, kind: PluginKind) -> Any:
    path = path.expanduser()
    if not path.is_file():
        folder = path.parent
        others = sorted(str(folder / other.name) for other in folder.glob("*.py")) if folder.is_dir() else []
        raise PluginError(
            f"{kind.noun} {spec!r}: there is no file {path.absolute()}.{_nearest(str(path), others)} "
            f"Relative paths start at the working directory, {Path.cwd()}"
        )
    path = path.resolve()
    module_name = f"rlorch_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = sys.modules.get(module_name) or _execute(spec, module_name, path, kind)
    return _attribute(module, attr, spec, kind) if attr else _only_plugin(module, spec, kind)


def _execute(spec: str, module_name: str, path: Path, kind: PluginKind) -> ModuleType:
    loader = SourceFileLoader(module_name, str(path))
    module = util.module_from_spec(ModuleSpec(module_name, loader, origin=str(path)))
    module.__file__ = str(path)
    _append_to_path(path.parent)  # the file may import its neighbours; last, so that they hide nothing
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, RlorchError) or not isinstance(error, Exception | SystemExit):
            raise
        raise _broken(spec, str(path), kind, error) from error
    return module


def _import(spec: str, module_name: str, kind: PluginKind) -> ModuleType:
    _append_to_path(Path.cwd())
    try:
        if kind.builtin_package is not None and module_name.partition(".")[0] == kind.builtin_package:
            sibling(kind.builtin_package)
        return import_module(module_name)
    except RlorchError:
        raise
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise PluginError(
                f"{kind.noun} {spec!r}: there is no module {missing!r} on sys.path or in the working directory, "
                f"{Path.cwd()}.{_nearest(spec, known_names(kind))} For a file write path/to/file.py:attr"
            ) from error
        raise _broken(spec, f"module {module_name}", kind, error) from error


def _attribute(module: ModuleType, attr: str, spec: str, kind: PluginKind) -> Any:
    found: Any = module
    for part in attr.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            raise PluginError(f"{kind.noun} {spec!r}: {module.__file__} defines no {attr!r}.{_nearest(part, names)}")
        found = getattr(found, part)
    return _checked(found, spec, str(module.__file__), kind)


def _checked(found: Any, spec: str, where: str, kind: PluginKind) -> Any:
    if not callable(found):
        raise PluginError(
            f"{kind.noun} {spec!r}: {where} holds a {type(found).__name__}, which cannot be called; name a function "
            f"or class marked with {kind.decorator}"
        )
    return found


def _only_plugin(module: ModuleType, spec: str, kind: PluginKind) -> Any:
    own = {
        name: value
        for name, value in vars(module).items()
        if kind.is_plugin(value) and getattr(value, "__module__", None) == module.__name__
    }
    if len(own) == 1:
        return next(iter(own.values()))
    if not own:
        raise PluginError(
            f"{kind.noun} {spec!r}: {module.__file__} defines nothing marked with {kind.decorator}; put "
            f"{kind.decorator} above the function, or name it: {spec}:function"
        )
    raise PluginError(
        f"{kind.noun} {spec!r}: {module.__file__} defines {', '.join(sorted(own))}; name one, e.g. {spec}:{min(own)}"
    )


def _broken(spec: str, where: str, kind: PluginKind, error: BaseException) -> PluginError:
    return PluginError(f"{kind.noun} {spec!r}: {where} cannot be imported: {describe_exception(error)}")


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """Type, message and the line that raised: the last frame inside `file`, else the last one that is not importlib.

    One line, e.g. `ValueError: bad answer (at scores.py:12 in check: raise ValueError("bad answer"))`.
    """
    message = str(error) or "no message"
    said = message if isinstance(error, RlorchError) else f"{type(error).__name__}: {message}"
    if isinstance(error, SyntaxError):
        return f"{said} (at {error.filename}:{error.lineno}: {(error.text or '').strip()})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen importlib")
    ]
    own = [frame for frame in frames if frame.filename == file] or frames
    if not own or own[-1].filename == __file__:
        return said
    last = own[-1]
    return f"{said} (at {last.filename}:{last.lineno} in {last.name}: {last.line})"


def _builtin_names(kind: PluginKind) -> tuple[str, ...]:
    if kind.builtin_package is None:
        return ()
    modules = pkgutil.iter_modules(sibling(kind.builtin_package).__path__)
    return tuple(sorted(module.name for module in modules if not module.name.startswith("_")))


def _nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
