"""A JSONL output that survives being killed: each object is appended as it is made, and the whole
is rewritten in order at the end.

Process r of w appends to `.NAME.part-r` beside the output and shares nothing with the others; the
last one to finish finds all objects there and publishes the file by one rename. Every object
carries a `key`, a hash of what it answers, by which a later run knows what it need not do again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ta.files import append_line, locked, read_lines, write_atomic


def check(out: Path, resume: bool, overwrite: bool, rank: int = 0, world: int = 1) -> None:
    """ValueError where `out`, or a part of it, exists and neither resume nor overwrite is asked.
    Changes nothing.
    """
    if resume and overwrite:
        raise ValueError(
            "--resume goes on with an output and --overwrite deletes it: give one of the two"
        )
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file, such as {out / 'answers.jsonl'}")
    if resume or overwrite:
        return
    if out.exists():
        raise ValueError(
            f"--out {out} exists: give another file, --resume to add what is missing, or --overwrite to start anew"
        )
    if _own(out, rank, world):
        raise ValueError(
            f"--out {out} was begun and not finished: give --resume to go on, or --overwrite to start anew"
        )


def begin(out: Path, overwrite: bool, rank: int = 0, world: int = 1) -> None:
    """Make the folder, and with `overwrite` delete what there is.

    ValueError, and nothing is deleted, where another process is writing it.
    """
    parts = _own(out, rank, world)
    with contextlib.ExitStack() as stack:
        for number in {rank, *map(_number, parts)}:
            stack.enter_context(locked(out, share=f"part-{number}"))
        if overwrite:
            for path in parts + [out] * (rank == 0):
                path.unlink(missing_ok=True)


def done(out: Path, keys: Iterable[str]) -> dict[str, dict]:
    """{key: object} of those of `keys` that `out` and its parts hold; torn lines are left out."""
    wanted, found = set(keys), {}
    for path in (out, *_parts(out)):
        for record in read_lines(path):  # none where another process has just published the whole
            if record.get("key") in wanted:
                found.setdefault(record["key"], record)
    return found


class Part:
    """The part file of one process, made at its first object; ValueError where another writes it."""

    def __init__(self, out: Path, rank: int = 0):
        self.path = out.with_name(f".{out.name}.part-{rank}")
        self.lock = locked(out, share=f"part-{rank}")

    def append(self, record: dict) -> None:
        """Add an object; a line torn by an earlier kill is cut off first."""
        append_line(self.path, record)

    def __enter__(self) -> Part:
        self.lock.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.lock.__exit__(*error)


def publish(out: Path, keys: Sequence[str]) -> bool:
    """Write `out` in the order of `keys` and delete the parts, if all are there; else False.

    Then other processes are still at work.
    """
    found = done(out, keys)
    if len(found) < len(set(keys)):
        return False
    write_atomic(out, "".join(json.dumps(found[key], ensure_ascii=False) + "\n" for key in keys))
    for part in _parts(out):
        part.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def progress(name: str, total: int, show: bool) -> Iterator[Callable[[Sequence], None]]:
    """A bar over records with tokens a second and time left; gives the function to call with the
    answers of each.
    """
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=name,
        unit="record",
        disable=not show or not total,
        dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:
        start, tokens = time.perf_counter(), 0

        def advance(answers: Sequence) -> None:
            nonlocal tokens
            tokens += sum(len(answer.ids) for answer in answers)
            bar.set_postfix_str(
                f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False
            )
            bar.update()

        yield advance


def _own(out: Path, rank: int, world: int) -> list[Path]:
    """The parts that this process answers for.

    Each part has one such process, whatever the number of processes that wrote them.
    """
    return [part for part in _parts(out) if _number(part) % world == rank]


def _number(part: Path) -> int:
    return int(part.name.rpartition("-")[2])


def _parts(out: Path) -> list[Path]:
    if not out.parent.is_dir():
        return []
    head = f".{out.name}.part-"
    return sorted(
        path
        for path in out.parent.iterdir()
        if path.name.startswith(head) and path.name[len(head) :].isdigit()
    )
