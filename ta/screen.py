"""What a person sees while a command runs: progress, and colours where they can be shown."""

from __future__ import annotations

import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO, Any

from ta.printable import printable

# seconds between two lines of progress in a file or a pipe
LINE_EVERY = 30
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def has_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal whose user wants colours (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def shown(text: str, stream: IO[str]) -> str:
    """The text as a stream can show it: without colours where it has none."""
    return text if has_colours(stream) else COLOUR.sub("", text)


def progress(
    total: int | None, what: str, unit: str, *, done: int = 0, show: bool = True, **more: Any
) -> Any:
    """A tqdm bar on stderr: in a terminal a bar, in a file or a pipe a line every LINE_EVERY s.

    `more` are arguments of tqdm, such as `delay` in seconds.
    """
    from tqdm import tqdm

    class Lines(tqdm):
        """Progress as lines."""

        @staticmethod
        def status_printer(file):
            def write(text: str) -> None:
                if text.strip():
                    file.write(text.strip() + "\n")
                    file.flush()

            return write

    terminal = sys.stderr.isatty()
    settings = {
        "total": total,
        "desc": printable(what),
        "unit": unit,
        "initial": done,
        "disable": not show,
    }
    if terminal:
        return tqdm(**settings, mininterval=0.5, dynamic_ncols=True, **more)
    more.pop("leave", None)
    more["delay"] = max(more.get("delay", 0), LINE_EVERY)
    counts = "{n_fmt}/{total_fmt}" if total else "{n_fmt}"
    plain = "{desc}: " + counts + " {unit}s, {elapsed}, {rate_fmt}{postfix}"
    return Lines(**settings, mininterval=LINE_EVERY, miniters=1, bar_format=plain, **more)


def table(rows: Iterable[Sequence], header: Sequence[str], width: int = 0, lines: int = 8) -> str:
    """A plain-text table as wide as the terminal, or `width` columns.

    The widest columns give way first; a cell goes on over several lines, of which at most `lines`
    are shown, from its beginning and its end. What could move a cursor is written out.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    cells = [[printable(str(cell)).expandtabs(2) for cell in row] for row in (header, *rows)]
    widths = [
        max(columns(line) for row in cells for line in row[i].split("\n"))
        for i in range(len(header))
    ]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    out = []
    for row in cells:
        wrapped = [_wrapped(cell, w, lines) for cell, w in zip(row, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            parts = [part[i] if i < len(part) else "" for part in wrapped]
            padded = [
                part + " " * (w - columns(part)) for part, w in zip(parts, widths, strict=True)
            ]
            out.append("  ".join(padded).rstrip())
        if len(out) == max(map(len, wrapped)) and row is cells[0]:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def columns(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for a mark."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me") for c in text)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """The text in lines of at most `width` columns, broken at spaces where there are some.

    Of more than `most` lines the first and the last are kept.
    """
    reach = most * width
    if len(text) > 2 * reach:  # what lies between is never shown
        text = f"{text[:reach]}\n{text[-reach:]}"
    out = []
    for line in text.split("\n"):
        while (cut := _fits(line, width)) < len(line):
            space = line.rfind(" ", 1, cut + 1)
            cut = space if space > 0 else max(cut, 1)
            out.append(line[:cut].rstrip())
            line = line[cut:].lstrip()
        out.append(line)
    if len(out) > most:
        out = [*out[: most // 2], "…", *out[most // 2 + 1 - most :]]
    return out


def _fits(line: str, width: int) -> int:
    """How many of the first characters take at most `width` columns."""
    used = 0
    for place, character in enumerate(line):
        used += columns(character)
        if used > width:
            return place
    return len(line)
