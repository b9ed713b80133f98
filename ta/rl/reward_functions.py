"""The built-in reward functions, and those of files."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ta.rl.sandbox import LEVELS, check_level, run_python

RewardFunction = Callable[[list[dict], str, dict], Any]

NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.S)
# seconds that an answer's code and its tests may take together
CODE_SECONDS = 5.0


def field_text(record: dict, name: str) -> str:
    """A text of the record; ValueError where it has none."""
    if not isinstance(text := record.get(name), str):
        raise ValueError(
            f"the record has no {name}"
            + ("; a chat must end with its right answer" if name == "reference" else "")
        )
    return text


def last_number(text: str) -> float | None:
    """The last number of a text, such as 1,234.5 or -2e3; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(answer: str, right: str) -> bool:
    """Whether the last numbers of two texts are equal; ValueError where the right one has none."""
    if (number := last_number(right)) is None:
        raise ValueError(f"the reference {right!r} holds no number")
    return last_number(answer) == number


# name: whether an answer is as the right one says
COMPARISONS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda answer, right: answer.strip() == right.strip(),
    "number": same_number,
    "contains": lambda answer, right: right.strip() in answer,
}


def compares(name: str, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the comparison holds for the answer and the right one of the record, else 0."""
    return float(COMPARISONS[name](answer, field_text(record, "reference")))


def matches_regex(pattern: re.Pattern, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the pattern is found in the answer, else 0."""
    return float(pattern.search(answer) is not None)


def within_length(most: int, messages: list[dict], answer: str, record: dict) -> float:
    """0 up to `most` characters, then falling linearly to -1 at twice as many."""
    return -min(1.0, max(0, len(answer) - most) / most)


def follows_schema(validator: Any, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the answer is JSON that follows the schema of jsonschema's validator, else 0."""
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    return float(validator.is_valid(value))


def schema_validator(schema: Any, name: str) -> Any:
    """jsonschema's validator of a schema, of the draft that it names; it reaches no network.

    ValueError for what is no schema, and where jsonschema is not there.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as error:
        raise ValueError(
            f"schema:FILE needs jsonschema (pip install jsonschema): {error}"
        ) from None
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{name} is no JSON schema: {error.message}") from None
    return kind(schema, registry=Registry())


def passes_tests(level: str, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the answer's Python passes the record's "tests" (Python that raises), else 0.

    The code is the last block between ``` of the answer, or the whole answer.
    """
    blocks = CODE_BLOCK.findall(answer)
    tests = field_text(record, "tests")
    return float(run_python(blocks[-1] if blocks else answer, tests, CODE_SECONDS, level))


BUILTIN = (*COMPARISONS, "regex", "length", "schema", "code")


def built_in(name: str, argument: str) -> RewardFunction:
    """The function of BUILTIN with what stands behind its colon; ValueError says what to give."""
    match name:
        case "exact" | "number" | "contains":
            if argument:
                raise ValueError(f"{name} takes no argument")
            return partial(compares, name)
        case "regex":
            if not argument:
                raise ValueError("give regex:PATTERN")
            try:
                return partial(matches_regex, re.compile(argument))
            except re.error as error:
                raise ValueError(f"{argument!r} is no regular expression ({error})") from None
        case "length":
            if not argument.isdecimal() or not int(argument):
                raise ValueError("give length:N, a number of characters from 1 up")
            return partial(within_length, int(argument))
        case "schema":
            if not argument or not Path(argument).is_file():
                raise ValueError(f"there is no file {argument!r}; give schema:FILE.json")
            try:
                wanted = json.loads(Path(argument).read_text())
            except ValueError as error:
                raise ValueError(f"{argument} is no JSON ({error})") from None
            return partial(follows_schema, schema_validator(wanted, argument))
    level = argument or "offline"
    if level not in LEVELS:
        raise ValueError(f"there is no sandbox {level!r}; give code:{' or code:'.join(LEVELS)}")
    check_level(level)
    return partial(passes_tests, level)


def load_reward(text: str) -> RewardFunction:
    """The function that NAME, NAME:ARGUMENT or FILE.py:NAME names."""
    head, _, argument = text.partition(":")
    if head in BUILTIN:
        return built_in(head, argument)
    if not callable(function := getattr(load_file(head), argument, None)):
        raise ValueError(f"{head} has no function {argument}")
    return function


def load_file(path: str) -> ModuleType:
    """The module of a file of Python, which may import its neighbours, as when it is run."""
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
