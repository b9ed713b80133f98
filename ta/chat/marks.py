"""Marks in the strings of a chat, which show where each stands in what a template writes.

A mark is a few private-use characters that nobody can guess. Without its marks, the text that a
template writes of a marked chat must be the text that it writes of the chat itself.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ta.chat.messages import REASONING, Message

_NONCE = "".join(chr(0xE100 + byte) for byte in secrets.token_bytes(8))
_OPEN, _CLOSE, _END = "\ue000", "\ue001", "\ue002"
_DIGITS = str.maketrans("0123456789", "".join(chr(0xE010 + digit) for digit in range(10)))
_MARK = re.compile(f"([{_OPEN}{_CLOSE}]){_NONCE}([\ue010-\ue019]+){_END}")


class Label(NamedTuple):
    """A string of a chat, or a stretch of one, that has a mark on either side."""

    # place of its message; -1: it is no message's, but a tool's description, say
    message: int
    # "content", "reasoning", "calls", or the key of another field
    field: str
    # of a tool call, its place among the message's calls
    call: int
    text: str
    # what stands beside it in the same string, without marks of its own
    before: str
    after: str


class Written(NamedTuple):
    """What a template wrote of a marked chat."""

    text: str  # without marks
    places: dict[int, list[tuple[int, int]]]  # label -> where in `text` it stands
    broken: bool  # whether some mark stands without its other half


def mark_chat(
    messages: Sequence[Message],
    arguments: Mapping[str, Any],
    border: re.Pattern[str],
    depths: Mapping[int, int],
    names: bool = True,
) -> tuple[list[Message], dict[str, Any], list[Label]]:
    """The messages and template arguments with marks, and the label of each mark.

    `border` finds the tokens and tags that a text may hold. The messages in `depths` are marked:
    around the whole of a text (0), around the stretches between tokens (1), or around the middle of
    these (2). `names` marks the names of functions. Other strings are marked where they hold a
    token.
    """
    labels: list[Label] = []

    def put(text: str, message: int, field: str, call: int, depth: int) -> str:
        pieces = border.split(text) if depth else [text]
        if not any(piece.strip() for piece in pieces[::2]):
            pieces = [text]
        out, before, first = "", "", len(labels)
        for place, piece in enumerate(pieces):
            core = piece.strip()
            if place % 2 or not core:
                out, before = out + piece, before + piece
                continue
            at = piece.index(core)
            if depth == 2 and len(core) > 2:
                at, core = at + len(core) // 3, core[len(core) // 3 : -(len(core) // 3)]
            out += piece[:at] + _mark(_OPEN, len(labels)) + core + _mark(_CLOSE, len(labels))
            out += piece[at + len(core) :]
            labels.append(Label(message, field, call, core, before + piece[:at], ""))
            before = piece[at + len(core) :]
        if len(labels) > first:
            labels[-1] = labels[-1]._replace(after=before)
        return out

    def risky(value: Any, message: int, field: str) -> Any:
        """Any other value: its strings are marked where they hold the text of a token."""
        if isinstance(value, str):
            return put(value, message, field, 0, 0) if border.search(value) else value
        if isinstance(value, list):
            return [risky(item, message, field) for item in value]
        if isinstance(value, dict):
            return {
                risky(key, message, field): risky(item, message, field)
                for key, item in value.items()
            }
        return value

    def leaves(value: Any, message: int, call: int) -> Any:
        if isinstance(value, str):
            return put(value, message, "calls", call, 0)
        if isinstance(value, list):
            return [leaves(item, message, call) for item in value]
        if isinstance(value, dict):
            return {
                risky(key, message, "calls"): leaves(item, message, call)
                for key, item in value.items()
            }
        return value

    def call_of(value: Any, message: int, call: int) -> Any:
        marked = {}
        for key, item in value.items():
            if key == "function" and isinstance(item, dict):
                marked[key] = call_of(item, message, call)
            elif key == "arguments":
                marked[key] = leaves(item, message, call)
            elif key == "name" and names and isinstance(item, str):
                marked[key] = put(item, message, "calls", call, 0)
            else:
                marked[key] = risky(item, message, "calls")
        return marked

    def content_of(value: Any, place: int, depth: int) -> Any:
        if isinstance(value, str):
            return put(value, place, "content", 0, depth)
        if not isinstance(value, list):
            return risky(value, place, "content")
        return [
            {
                key: put(item, place, "content", 0, depth)
                if key in ("text", "content") and isinstance(item, str)
                else risky(item, place, "content")
                for key, item in part.items()
            }
            if isinstance(part, dict)
            else risky(part, place, "content")
            for part in value
        ]

    marked = []
    for place, message in enumerate(messages):
        if place not in depths:
            marked.append(message)
            continue
        new = {}
        for key, value in message.items():
            if key == "content":
                new[key] = content_of(value, place, depths[place])
            elif key in REASONING and isinstance(value, str):
                new[key] = put(value, place, "reasoning", 0, depths[place])
            elif key == "tool_calls":
                new[key] = [call_of(call, place, number) for number, call in enumerate(value)]
            else:
                new[key] = value if key == "role" else risky(value, place, key)
        marked.append(new)
    return marked, {key: risky(value, -1, key) for key, value in arguments.items()}, labels


def _mark(kind: str, label: int) -> str:
    return f"{kind}{_NONCE}{str(label).translate(_DIGITS)}{_END}"


def read_marks(text: str) -> Written:
    """The text without its marks, and where the marked strings stand in it."""
    clean: list[str] = []
    places: dict[int, list[tuple[int, int]]] = {}
    begun: dict[int, int] = {}
    size = at = 0
    broken = False
    for mark in _MARK.finditer(text):
        clean.append(text[at : mark.start()])
        size += mark.start() - at
        at = mark.end()
        label = int("".join(chr(ord(digit) - 0xE010 + 48) for digit in mark[2]))
        if mark[1] == _OPEN:
            broken = broken or label in begun
            begun[label] = size
        elif label in begun:
            places.setdefault(label, []).append((begun.pop(label), size))
        else:
            broken = True
    clean.append(text[at:])
    return Written("".join(clean), places, broken or bool(begun))
