"""The process in which functions of users are called: rewards and tools.

Everything here is plain Python, so that such a process starts at once.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from ta.rl.reward_functions import load_file, load_reward

# most characters of an error that are reported
SHOWN = 500
# in front of the path of a file of tools
TOOLS = "--tools "
# types of JSON by the annotations of parameters
TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object",
}  # fmt: skip


def judged(value: Any) -> tuple[float | None, str]:
    """(a reward, what is wrong with it): a finite number or None is right."""
    if value is None:
        return None, ""
    if not isinstance(value, Real):
        return None, f"returned {value!r:.80} of type {type(value).__name__}, no number"
    if not math.isfinite(value):
        return None, f"returned {value}, no finite number"
    return float(value), ""


def load_tools(path: str) -> Callable[[str, dict], Any]:
    """call(name, arguments) of the functions of a file; of no name it gives their schemas."""
    module = load_file(path)
    tools = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }

    def call(name: str, arguments: dict) -> Any:
        if not name:
            return [schema_of(tool) for tool in tools.values()]
        if name not in tools:
            raise ValueError(f"there is no tool {name}")
        value = tools[name](**arguments)
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return call


def schema_of(tool: Callable) -> dict:
    """What a chat template is told of a function: its name, docstring and parameters.

    A parameter whose annotation is no type of JSON may be anything.
    """
    known, needed = {}, []
    for name, parameter in inspect.signature(tool).parameters.items():
        # annotations may be texts
        kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
        known[name] = {"type": TYPES[kind]} if kind in TYPES else {}
        if parameter.default is parameter.empty:
            needed.append(name)
    about = {"name": tool.__name__, "description": inspect.getdoc(tool) or ""}
    about["parameters"] = {"type": "object", "properties": known, "required": needed}
    return {"type": "function", "function": about}


def load_function(name: str) -> Callable[..., tuple[Any, str]]:
    """The function of that name, which gives (value, fault).

    A reward, as `load_reward` knows it, or TOOLS with the path of a file.
    """
    if name.startswith(TOOLS):
        tools = load_tools(name.removeprefix(TOOLS))
        return lambda *arguments: (tools(*arguments), "")
    reward = load_reward(name)
    return lambda *arguments: judged(reward(*arguments))


def work(arguments: Sequence[str]) -> None:
    """Answer calls, one message of JSON each, until no more come: the main function of a process.

    `arguments` are the file descriptor of the pipe of calls and replies, and the names of the
    functions. What a function prints does not reach the replies. The first reply, to no call, says
    that the functions are loaded, or why not.
    """
    with suppress(OSError, AttributeError):
        # end with the process that asks, however that ends (PR_SET_PDEATHSIG of Linux)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    pipe, own = Connection(int(arguments[0])), os.getpid()
    os.set_inheritable(pipe.fileno(), False)
    value, fault = None, ""
    try:
        functions = [load_function(name) if name else None for name in arguments[1:]]
    except BaseException as error:
        fault = f"raised {type(error).__name__}: {error}"
    while True:
        pipe.send_bytes(json.dumps([value, fault[:SHOWN]]).encode())
        try:
            number, given = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            value, fault = functions[number](*given)
        except BaseException as error:  # also SystemExit: the call has failed, whatever it raised
            value, fault = None, f"raised {type(error).__name__}: {error}"
        if os.getpid() != own:
            os._exit(0)  # a process that the function forked and that came back here
