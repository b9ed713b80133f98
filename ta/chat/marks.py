"""Marks in the strings of a chat, which show where each stands in what a template writes.

A mark is a few private-use characters that nobody can guess. Without its marks, the text that a
template writes of a marked chat must be the text that it writes of the chat itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from ta.chat.messages import REASONING, Chat, Message

Pattern = re.Pattern[str]
_NONCE = "".join(chr(0xE100 + byte) for byte in secrets.token_bytes(8))
_OPEN, _CLOSE, _END = "\ue000", "\ue001", "\ue002"
_SIGNS = "".join(chr(0xE010 + digit) for digit in range(10))
_DIGITS = str.maketrans("0123456789", _SIGNS)
_NUMBERS = str.maketrans(_SIGNS, "0123456789")
# a text without the white space around it
_CORE = re.compile(r"\S(?:.*\S)?", re.DOTALL)
NOWHERE: Mapping[str, int] = {}
_MARK = re.compile(f"([{_OPEN}{_CLOSE}]){_NONCE}([{_SIGNS}]+){_END}")


class Label(NamedTuple):
    """A string of a chat, or a stretch of one, that has a mark on either side."""

    # place of its message; -1: it is no message's, but a tool's description, say
    message: int
    # "content", "reasoning", "calls", or the key of another field
    field: str
    # of a tool call, its place among the message's calls
    call: int = 0
    # what stands beside it in the same string, without marks of its own
    before: str = ""
    after: str = ""


class Written(NamedTuple):
    """What a template wrote of a marked chat."""

    text: str  # without marks
    places: dict[int, list[tuple[int, int]]]  # label -> where in `text` it stands
    broken: bool  # whether some mark stands without its other half


class Marker(NamedTuple):
    """Puts marks into strings, and remembers the label of each."""

    # finds the tokens and tags that a text may hold
    special: Pattern
    labels: list[Label]

    def walk(
        self,
        value: Any,
        label: Label,
        depth: int | None = None,
        depths: Mapping[str, int] = NOWHERE,
    ) -> Any:
        """A value with marks in its strings, as `mark_chat` says of `depth`.

        None marks those that hold a token, and keys that do. `depths` has the depth below some keys
        of objects whose keys are the template's.
        """
        if isinstance(value, str):
            if depth is None and not self.special.search(value):
                return value
            return self._put(value, label, depth or 0)
        if isinstance(value, list):
            return [self.walk(item, label, depth, depths) for item in value]
        if not isinstance(value, dict):
            return value
        known = depths and depth is None
        return {
            key if known else self.walk(key, label): self.walk(
                item, label, depths.get(key, depth), depths
            )
            for key, item in value.items()
        }

    def _put(self, text: str, label: Label, depth: int) -> str:
        out, at = "", 0
        cores = self._cores(text, depth)
        for start, stop in cores:
            sign = _NONCE + str(len(self.labels)).translate(_DIGITS) + _END
            out += text[at:start] + _OPEN + sign + text[start:stop] + _CLOSE + sign
            self.labels.append(label._replace(before=text[at:start]))
            at = stop
        if cores:
            self.labels[-1] = self.labels[-1]._replace(after=text[at:])
        return out + text[at:]

    def _cores(self, text: str, depth: int) -> list[tuple[int, int]]:
        """The stretches of a text that marks go around."""
        tokens = self.special.finditer(text) if depth else ()
        edges = [0, *(edge for token in tokens for edge in token.span()), len(text)]
        found = map(partial(_CORE.search, text), edges[::2], edges[1::2])
        cores = [core.span() for core in found if core]
        if depth == 2:
            cores = [(a + (b - a) // 3, b - (b - a) // 3) for a, b in cores]
        return cores or ([core.span()] if (core := _CORE.search(text)) else [])


def mark_chat(
    messages: Chat,
    arguments: Mapping[str, Any],
    special: Pattern,
    depths: Mapping[int, int],
    names: bool,
) -> tuple[list[Message], dict[str, Any], list[Label]]:
    """The messages and template arguments with marks, and the label of each mark.

    `special` finds the tokens and tags that a text may hold. The messages in `depths` are marked:
    around the whole of a text (0), around the stretches between tokens (1), or around the middle of
    these (2). `names` marks the names of functions. Other strings are marked where they hold a
    token.
    """
    marker, marked = Marker(special, []), list(messages)
    call_depths = {"arguments": 0} | ({"name": 0} if names else {})
    for place, depth in depths.items():
        new = marked[place] = dict(messages[place])
        for key, value in new.items():
            if key == "content":
                whole = depth if isinstance(value, str) else None
                below = {"text": depth, "content": depth}
                new[key] = marker.walk(value, Label(place, key), whole, below)
            elif key in REASONING:
                new[key] = marker.walk(value, Label(place, "reasoning"), depth)
            elif key == "tool_calls":
                new[key] = [
                    marker.walk(call, Label(place, "calls", number), None, call_depths)
                    for number, call in enumerate(value)
                ]
            elif key != "role":
                new[key] = marker.walk(value, Label(place, key))
    values = {key: marker.walk(value, Label(-1, key)) for key, value in arguments.items()}
    return marked, values, marker.labels


def read_marks(text: str) -> Written:
    """The text without its marks, and where the marked strings stand in it."""
    # text, then each mark's kind and number with the text behind it
    parts = _MARK.split(text)
    clean, kinds, numbers = parts[::3], parts[1::3], parts[2::3]
    places: dict[int, list[tuple[int, int]]] = {}
    begun: dict[int, int] = {}
    broken = False
    for size, kind, number in zip(accumulate(map(len, clean)), kinds, numbers, strict=False):
        label = int(number.translate(_NUMBERS))
        if (kind == _OPEN) == (label in begun):
            broken = True
        elif kind == _OPEN:
            begun[label] = size
        else:
            places.setdefault(label, []).append((begun.pop(label), size))
    return Written("".join(clean), places, broken or bool(begun))
