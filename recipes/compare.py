"""Compare two to four runs on one page: curves over each other, settings that differ.

python recipes/compare.py --runs runs/a runs/b --out compare.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ta
from ta.files import locked_file, write_atomic


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...] = ()
    """Run folders, 2 to 4."""
    out: str = "compare.html"
    """File to write."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(config: Config) -> None:
    out = Path(config.out)
    with locked_file(out, config.overwrite):
        write_atomic(out, ta.comparison([Path(run) for run in config.runs]))
    ta.parallel.say(f"done: {out}, open it in a browser")


if __name__ == "__main__":
    ta.cli(main, Config)
