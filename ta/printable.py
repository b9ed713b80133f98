"""Text that is not ours, made safe to look at, and secrets masked in what is kept."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# argument names whose values are secrets, and our own names that only look like them
SECRET = re.compile(r"token|key|password|secret|credential", re.IGNORECASE)
NO_SECRET = re.compile(r"tokens|tokenizer|(pad|bos|eos|image|audio)_token$", re.IGNORECASE)
MASK = "***"


def printable(text: str, most: int = 0) -> str:
    """The text with what could move a cursor, hide or reorder letters written as \\x1b, \\u202e.

    Newlines, tabs, spaces of any width and the joiners of scripts and emoji stay. With `most`, a
    text of more characters is cut in its middle.
    """
    if 0 < most < len(text):
        text = f"{text[: most // 2]}…{text[-(most // 2) :]}"
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    stays = character.isprintable() or character in "\n\t\u200c\u200d"
    if stays or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def one_line(text: str, most: int = 2000) -> str:
    """`printable` text on one line of at most about `most` characters."""
    return printable(" ".join(text.split("\n")), most)


def plain_markdown(value: Any) -> str:
    """A value as text that is no markup where Markdown stands, also in a table."""
    text = html.escape(printable(str(value), 4000), quote=False)
    return text.replace("\n", "<br>").replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table of Markdown, whose cells are plain."""
    lines = (header, ["---"] * len(header), *rows)
    return "".join(f"| {' | '.join(map(plain_markdown, line))} |\n" for line in lines)


def masked(value: Any) -> Any:
    """JSON values with secrets as ***: values of secret names in mappings and in NAME=VALUE, words
    after a flag of such a name, and passwords in URLs.
    """
    if isinstance(value, dict):
        hidden = {name for name, x in value.items() if isinstance(x, str) and x and _secret(name)}
        return {name: MASK if name in hidden else masked(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        before = [None, *value]
        return [
            MASK if isinstance(flag, str) and flag[:2] == "--" and _secret(flag) else masked(x)
            for flag, x in zip(before, value, strict=False)
        ]
    if not isinstance(value, str):
        return value
    name, equals, rest = value.partition("=")
    if equals and rest and _secret(name):
        return f"{name}={MASK}"
    return re.sub(r"(://[^/\s:@]*:)[^/\s@]+@", rf"\1{MASK}@", value)


def _secret(name: str) -> bool:
    name = name.lstrip("-").replace("-", "_")
    return name.isidentifier() and bool(SECRET.search(NO_SECRET.sub("", name)))
