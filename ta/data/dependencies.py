"""All that the result of a function depends on, for the key of a cache."""

from __future__ import annotations

import dis
import hashlib
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial, partialmethod
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ta.files import hash_json

INSTALLED = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
INSTALLED.append(str(Path(__file__).parents[1]))
# what an object of these types consists of
PARTS = {
    partial: ("func", "args", "keywords"),
    partialmethod: ("func", "args", "keywords"),
    MethodType: ("__func__", "__self__"),
    cached_property: ("func",),
    property: ("fget", "fset"),
    CodeType: ("co_code", "co_names", "co_consts"),
}
# attributes of a class that say nothing of what it does
NOT_MEANT = ("__dict__", "__weakref__", "__doc__", "__firstlineno__", "__module__")


def dependencies(value: Any) -> str:
    """A hash of what `value` is, the same in every process.

    Of a function of the user it covers the code, defaults and enclosed values, and the same of
    every global that it names, in its own module and in others. What is installed, this package
    included, is known by its name. ValueError for a value that cannot be compared between
    processes.
    """
    return _hash(value, {})


def _hash(value: Any, known: dict[int, tuple[Any, str]]) -> str:
    """`known` holds what was met, so that a value that holds itself is followed once."""
    if id(value) not in known:
        known[id(value)] = value, "itself"
        known[id(value)] = value, hash_json(_described(value, lambda inner: _hash(inner, known)))
    return known[id(value)][1]


def _described(value: Any, follow: Callable[[Any], str]) -> Any:
    if isinstance(value, bool | int | float | str | bytes | None):
        return repr(value)
    for kind, parts in PARTS.items():
        if isinstance(value, kind):
            return [kind.__name__, *(follow(getattr(value, part)) for part in parts)]
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, ModuleType | None):
        return ["method", value.__name__, follow(value.__self__)]
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, list | tuple):
        return [*map(follow, value)]
    if isinstance(value, set | frozenset):
        return sorted(map(follow, value))
    if isinstance(value, Mapping):
        return [[*map(follow, pair)] for pair in value.items()]
    if isinstance(value, FunctionType) and _of_the_user(value.__module__):
        return ["function", *map(follow, _parts(value))]
    if isinstance(value, type) and _of_the_user(value.__module__):
        own = {name: part for name, part in vars(value).items() if name not in NOT_MEANT}
        return ["class", value.__qualname__, follow(value.__bases__), follow(own)]
    if hasattr(value, "__wrapped__"):
        # a static or class method, or a function that remembers its results
        return [type(value).__qualname__, follow(value.__wrapped__)]
    if hasattr(value, "__qualname__"):
        return [str(getattr(value, "__module__", "")), value.__qualname__]
    if _of_the_user(type(value).__module__) and hasattr(value, "__dict__"):
        return ["object", follow(type(value)), follow(vars(value))]
    try:
        return hashlib.sha256(pickle.dumps(value)).hexdigest()
    except Exception as error:  # whatever an object's own pickling raises
        raise ValueError(
            f"prepared data would depend on a {type(value).__name__}, which cannot be compared "
            f"with that of an earlier run ({error}); let the function take plain values instead"
        ) from None


def _parts(function: FunctionType) -> Iterator[Any]:
    yield function.__code__
    yield function.__defaults__
    yield function.__kwdefaults__
    yield [cell.cell_contents for cell in function.__closure__ or ()]
    codes = list(_codes(function.__code__))
    steps = [step for code in codes for step in dis.get_instructions(code)]
    read = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    late = {step.argval for step in steps if step.opname == "IMPORT_NAME"}
    names = sorted({name for code in codes for name in code.co_names})
    known = function.__globals__
    found = {name: known[name] for name in sorted(read & known.keys())}
    yield found
    modules = [*filter(_is_users_module, (*found.values(), *map(_imported, sorted(late))))]
    for module in modules:
        found = {name: getattr(module, name) for name in names if hasattr(module, name)}
        yield found
        # modules inside it, too
        modules += [
            value for value in found.values() if _is_users_module(value) and value not in modules
        ]


def _imported(name: str) -> ModuleType | None:
    """The module of the user that a function imports when it runs; None for another's."""
    try:
        spec = find_spec(name.partition(".")[0])
        return import_module(name) if spec and _is_users_file(spec.origin) else None
    except (ImportError, ValueError):
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code and that of the functions inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _is_users_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and _of_the_user(value.__name__)


def _of_the_user(module: str | None) -> bool:
    """Whether a module is neither installed nor part of this package."""
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    return module == "__main__" or _is_users_file(file)


def _is_users_file(file: str | None) -> bool:
    return file is not None and not any(Path(file).is_relative_to(folder) for folder in INSTALLED)
