"""What a person sees while a command runs: progress, and colours where they can be shown."""

from __future__ import annotations

import os
import re
import sys
from typing import IO, Any

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
    settings = {"total": total, "desc": what, "unit": unit, "initial": done, "disable": not show}
    if terminal:
        return tqdm(**settings, mininterval=0.5, dynamic_ncols=True, **more)
    more.pop("leave", None)
    more["delay"] = max(more.get("delay", 0), LINE_EVERY)
    counts = "{n_fmt}/{total_fmt}" if total else "{n_fmt}"
    plain = "{desc}: " + counts + " {unit}s, {elapsed}, {rate_fmt}{postfix}"
    return Lines(**settings, mininterval=LINE_EVERY, miniters=1, bar_format=plain, **more)
