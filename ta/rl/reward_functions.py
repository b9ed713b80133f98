"""The built-in reward functions, and the process in which reward functions are called.

Everything here is plain Python, so that such a process starts at once.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from ta.rl.json_schema import check_schema, follows
from ta.rl.sandbox import LEVELS, check_level, run_python

RewardFunction = Callable[[list[dict], str, dict], Any]

NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?")
CODE_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.S)
# seconds that an answer's code and its tests may take together
CODE_SECONDS = 5.0
# what a process says once it has loaded its functions
READY = b"ready\n"
# most characters of an error that are reported
SHOWN = 500


def field_text(record: dict, name: str) -> str:
    """A text of the record; ValueError where it has none."""
    if not isinstance(text := record.get(name), str):
        raise ValueError(
            f"the record has no {name}"
            + ("; a chat must end with its right answer" if name == "reference" else "")
        )
    return text


def equals_reference(messages: list[dict], answer: str, record: dict) -> float:
    """1 where the answer is the record's right one, up to white space around it, else 0."""
    return float(answer.strip() == field_text(record, "reference").strip())


def holds_reference(messages: list[dict], answer: str, record: dict) -> float:
    """1 where the right answer stands in the answer, else 0."""
    return float(field_text(record, "reference").strip() in answer)


def last_number(text: str) -> float | None:
    """The last number of a text, such as 1,234.5 or -2e3; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def same_number(messages: list[dict], answer: str, record: dict) -> float:
    """1 where the last numbers of the answer and of the right answer are equal, else 0."""
    right = last_number(field_text(record, "reference"))
    if right is None:
        raise ValueError(f"the reference {record['reference']!r} holds no number")
    return float(last_number(answer) == right)


def matches_regex(pattern: re.Pattern, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the pattern is found in the answer, else 0."""
    return float(pattern.search(answer) is not None)


def within_length(most: int, messages: list[dict], answer: str, record: dict) -> float:
    """0 up to `most` characters, then falling linearly to -1 at twice as many."""
    return -min(1.0, max(0, len(answer) - most) / most)


def follows_schema(wanted: Any, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the answer is JSON that follows the schema, else 0."""
    try:
        value = json.loads(answer)
    except ValueError:
        return 0.0
    return float(follows(value, wanted))


def passes_tests(level: str, messages: list[dict], answer: str, record: dict) -> float:
    """1 where the answer's Python passes the record's "tests" (Python that raises), else 0.

    The code is the last block between ``` of the answer, or the whole answer.
    """
    blocks = CODE_BLOCK.findall(answer)
    tests = field_text(record, "tests")
    return float(run_python(blocks[-1] if blocks else answer, tests, CODE_SECONDS, level))


def _plain(name: str, function: RewardFunction) -> Callable[[str], RewardFunction]:
    def make(argument: str) -> RewardFunction:
        if argument:
            raise ValueError(f"{name} takes no argument")
        return function

    return make


def _regex(argument: str) -> RewardFunction:
    if not argument:
        raise ValueError("give regex:PATTERN")
    try:
        return partial(matches_regex, re.compile(argument))
    except re.error as error:
        raise ValueError(f"{argument!r} is no regular expression ({error})") from None


def _length(argument: str) -> RewardFunction:
    if not argument.isdecimal() or not int(argument):
        raise ValueError("give length:N, a number of characters from 1 up")
    return partial(within_length, int(argument))


def _schema(argument: str) -> RewardFunction:
    if not argument or not Path(argument).is_file():
        raise ValueError(f"there is no file {argument!r}; give schema:FILE.json")
    try:
        wanted = json.loads(Path(argument).read_text())
    except ValueError as error:
        raise ValueError(f"{argument} is no JSON ({error})") from None
    check_schema(wanted, argument)
    return partial(follows_schema, wanted)


def _code(argument: str) -> RewardFunction:
    level = argument or "offline"
    if level not in LEVELS:
        raise ValueError(f"there is no sandbox {level!r}; give code:{' or code:'.join(LEVELS)}")
    check_level(level)
    return partial(passes_tests, level)


# name: what makes the function of the text behind the colon; ValueError says what to give
BUILTIN: dict[str, Callable[[str], RewardFunction]] = {
    "exact": _plain("exact", equals_reference),
    "number": _plain("number", same_number),
    "contains": _plain("contains", holds_reference),
    "regex": _regex,
    "length": _length,
    "schema": _schema,
    "code": _code,
}


def load_reward(text: str) -> RewardFunction:
    """The function that NAME, NAME:ARGUMENT or FILE.py:NAME names."""
    head, _, argument = text.partition(":")
    if head in BUILTIN:
        return BUILTIN[head](argument)
    folder = str(Path(head).resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the file may import its neighbours, as when it is run
    spec = importlib.util.spec_from_file_location(Path(head).stem, head)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(function := getattr(module, argument, None)):
        raise ValueError(f"{head} has no function {argument}")
    return function


def judged(value: Any) -> tuple[float | None, str]:
    """(a function's value, what is wrong with it): a finite number or None is right."""
    if value is None:
        return None, ""
    if not isinstance(value, Real):
        return None, f"returned {value!r:.80} of type {type(value).__name__}, no number"
    if not math.isfinite(value):
        return None, f"returned {value}, no finite number"
    return float(value), ""


def _loaded(name: str) -> RewardFunction:
    """The function of that name, or one that raises what loading it has raised."""
    try:
        return load_reward(name)
    except Exception as error:
        return partial(_raise, error)


def _raise(error: Exception, *_: Any) -> None:
    raise error


def work(arguments: Sequence[str]) -> None:
    """Answer calls, one JSON line each, until no more come: the main function of a process.

    `arguments` are the file descriptors of calls and of replies, and the names of the functions.
    What a function prints does not reach the replies.
    """
    with suppress(OSError, AttributeError):
        # end with the process that asks, however that ends (PR_SET_PDEATHSIG of Linux)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    calls, replies = os.fdopen(int(arguments[0]), "rb"), int(arguments[1])
    os.set_inheritable(calls.fileno(), False), os.set_inheritable(replies, False)
    functions, own = [_loaded(name) if name else None for name in arguments[2:]], os.getpid()
    os.write(replies, READY)
    for line in calls:
        number, messages, answer, record = json.loads(line)
        try:
            value, fault = judged(functions[number](messages, answer, record))
        except BaseException as error:  # also SystemExit: the call has failed, whatever it raised
            value, fault = None, f"raised {type(error).__name__}: {error}"
        if os.getpid() != own:
            os._exit(0)  # a process that the function forked and that came back here
        os.write(replies, json.dumps([value, fault[:SHOWN]]).encode() + b"\n")
