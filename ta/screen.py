"""What a person sees while a command runs: progress, and colours where they can be shown."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import IO, Any

from ta.printable import printable

# seconds between two lines of progress in a file or a pipe
LINE_EVERY = 30
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
COLOURED = re.compile(r"\x1b\[(\d+)m(.*?)\x1b\[0m", re.DOTALL)
# what stands around green and yellow text where there are no colours
QUOTES = {"32": "«»", "33": "‹›"}


def has_colours(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that has colours and whose user wants them (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def shown(text: str, stream: IO[str]) -> str:
    """The text as a stream can show it: «green» and ‹yellow› in marks where it has no colours."""
    if has_colours(stream):
        return text
    return COLOURED.sub(lambda found: _in_marks(found[2], QUOTES.get(found[1], "")), text)


def _in_marks(text: str, marks: str) -> str:
    """The text between two marks; a last line break is written out before the second one."""
    if marks and text.endswith("\n"):
        return f"{marks[0]}{text[:-1]}⏎{marks[1]}\n"
    return text.join(marks or ("", ""))


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

    settings = {
        "total": total,
        "desc": printable(what),
        "unit": unit,
        "initial": done,
        "disable": not show,
    }
    if sys.stderr.isatty():
        # with a postfix, which tells how fast it goes, there is room for both in 80 columns
        if total:
            more["bar_format"] = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(**settings, mininterval=0.5, dynamic_ncols=True, **more)
    more.pop("leave", None)
    more["delay"] = max(more.get("delay", 0), LINE_EVERY)
    counts = "{n_fmt}/{total_fmt}" if total else "{n_fmt}"
    plain = "{desc}: " + counts + " {unit}s, {elapsed}, {rate_fmt}{postfix}"
    return Lines(**settings, mininterval=LINE_EVERY, miniters=1, bar_format=plain, **more)


def table(rows: Iterable[Sequence], header: Sequence[str], width: int = 0, lines: int = 6) -> str:
    """A plain-text table as wide as the terminal, or `width` columns.

    The widest columns give way first; a cell goes on over several lines, of which at most `lines`
    are shown, from its beginning and its end. An empty line stands between rows of several lines.
    What could move a cursor is written out.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    cells = [[printable(str(cell)).expandtabs(2) for cell in row] for row in (header, *rows)]
    widths = [
        max(columns(line) for cell in column for line in cell.split("\n"))
        for column in zip(*cells, strict=True)
    ]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    blocks = []
    for row in cells:
        wrapped = [_wrapped(cell, w, lines) for cell, w in zip(row, widths, strict=True)]
        block = []
        for parts in zip_longest(*wrapped, fillvalue=""):
            line = ""
            for part, w in zip(parts, widths, strict=True):
                line += part + " " * (w + 2 - columns(part))
            block.append(line.rstrip())
        blocks.append("\n".join(block))
    blocks[0] += "\n" + "  ".join("-" * w for w in widths)
    between = "\n\n" if any("\n" in block for block in blocks[1:]) else "\n"
    return blocks[0] + "\n" + between.join(blocks[1:])


def wrapped_page(text: str, width: int = 0) -> str:
    """A page of Markdown as wide as the terminal, at most 100 columns, or `width` columns.

    Paragraphs and items are wrapped between words and tables drawn; code stays as it is.
    """
    width = width or min(shutil.get_terminal_size().columns, 100)
    out = []
    for code, rest in re.findall(r"(?ms)(^```.*?^```\n)|(.+?)(?=^```|\Z)", text):
        parts = re.split(r"(\A\n+|\n{2,}|\n\Z)", rest)
        out += [code, *(_block(part, width) if part.strip() else part for part in parts)]
    return "".join(out)


def _block(block: str, width: int) -> str:
    """What stands between two empty lines, wrapped."""
    if block.startswith("|"):
        cells = [re.split(r" +\| +", line.strip("| ")) for line in block.split("\n")]
        return table(cells[2:], cells[0], width)
    if block.startswith(("    ", "#")):
        return block
    items = re.split(r"\n(?=\* |- |\d+\. )", block)
    return "\n".join(
        hanging(item, width, 2 * bool(re.match(r"[*-] |\d+\. ", item))) for item in items
    )


def hanging(text: str, width: int, indent: int, begin: str = "") -> str:
    """A paragraph behind `begin`, wrapped between words; further lines are indented."""
    return textwrap.fill(
        " ".join(text.split()),
        width,
        initial_indent=begin,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(text: str) -> str:
    """A line for stderr, wrapped between words where that is a terminal."""
    if not sys.stderr.isatty():
        return text
    return hanging(text, shutil.get_terminal_size((120, 24)).columns - 1, 2)


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
    ends = accumulate(map(columns, line))
    return bisect_right(list(ends), width)
