"""The run folder: who may write it, its settings, one JSON object a logged step, and files that appear whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: one writer per folder is then the user's promise
    fcntl = None

RUN_FILES = (
    "config.json",
    "checkpoints",
    "final",
    "metrics.jsonl",
)  # any of these tells a run folder


def write_text(path: Path, text: str) -> None:
    """Write beside, sync, rename: `path` holds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append(path: Path, record: dict) -> None:
    """Append one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict]:
    """The whole objects of a JSONL log; a line torn by a kill is left out."""
    out = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                out.append(json.loads(line))
            except ValueError:
                continue
    return out


def cut_back(path: Path, step: int) -> None:
    """Drop logged objects later than `step`, so that a resumed run tells one story."""
    if path.exists():
        kept = [record for record in read_lines(path) if record.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def check_out(out: str, resume: bool, overwrite: bool) -> list[str]:
    """The names of what a run folder holds; ValueError where it must not be written. Changes nothing."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if resume and overwrite:
        raise ValueError(
            "--resume goes on with a run and --overwrite deletes it: give one of the two"
        )
    held = (
        sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        if folder.exists()
        else []
    )
    if held and not any(name in held for name in RUN_FILES):
        raise ValueError(
            f"--out {out} holds files that are no run ({', '.join(held[:3])}): give a new folder"
        )
    if held and not (resume or overwrite):
        state = "a finished run" if "final" in held else "an unfinished run"
        raise ValueError(
            f"--out {out} holds {state}: give another folder, --resume to go on, or --overwrite to start anew"
        )
    return held


def open_run(
    out: str, config: object, resume: bool, overwrite: bool, more: dict[str, Any] | None = None
):
    """Make the run folder, take its lock and write config.json; keep the returned file open as long as you write.

    `more` goes into config.json beside settings, command and versions. `overwrite` empties a folder that holds a run, and only such a one.
    """
    held = check_out(out, resume, overwrite)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")  # noqa: SIM115 held open on purpose
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--out {out} is being written by another process: wait for it or give another folder"
            ) from error
    if overwrite:
        for name in held:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    settings = {
        "argv": sys.argv,
        "config": dataclasses.asdict(config),
        "versions": versions(),
        **(more or {}),
    }
    write_text(folder / "config.json", json.dumps(settings, indent=1, ensure_ascii=False))
    return lock


def forget(folder: Path) -> None:
    """Take away what `open_run` wrote and the folder with it, where the run has come to nothing more than its settings and drops."""
    opening = {".lock", "config.json", "drops.jsonl"}
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= opening:
        shutil.rmtree(folder)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": sys.version.split()[0]}
    for name in ("ta", "torch", "transformers", "peft", "tokenizers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def table(rows: Iterable[tuple], header: tuple[str, ...], width: int = 48) -> str:
    """A plain-text table; cells are cut to `width` characters and shown on one line."""
    cells = [[str(cell).replace("\n", "⏎") for cell in row] for row in (header, *rows)]
    cells = [
        [cell if len(cell) <= width else cell[: width - 1] + "…" for cell in row] for row in cells
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
