"""A JSONL output that survives being killed: each object is appended as it is made, and the whole is rewritten in order at the end.

Process r of w appends to `.NAME.part-r` beside the output and shares nothing with the others; the last one to finish finds all objects there and
publishes the file by one rename. Every object carries a `key`, a hash of what it answers, by which a later run knows what it need not do again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ta.train.run_folder import write_text


def check(out: Path, resume: bool, overwrite: bool, rank: int = 0, world: int = 1) -> None:
    """ValueError where `out`, or a part of it, exists and neither resume nor overwrite is asked. Changes nothing."""
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
    """Make the folder, and with `overwrite` delete what there is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for path in _own(out, rank, world) + [out] * (rank == 0):
            path.unlink(missing_ok=True)


def done(out: Path, keys: Iterable[str]) -> dict[str, dict]:
    """{key: object} of those of `keys` that `out` and its parts hold; lines torn by a kill are left out."""
    wanted, found = set(keys), {}
    for path in (out, *_parts(out)):
        with contextlib.suppress(FileNotFoundError):  # another process has just published the whole
            for line in path.read_bytes().split(b"\n")[:-1]:
                record = _parsed(line)
                if record is not None and record.get("key") in wanted:
                    found.setdefault(record["key"], record)
    return found


class Part:
    """The part file of one process, made at its first object; a line torn by an earlier kill is cut off first."""

    def __init__(self, out: Path, rank: int = 0):
        self.path = out.with_name(f".{out.name}.part-{rank}")
        if self.path.exists():
            whole = self.path.read_bytes().rpartition(b"\n")
            with open(self.path, "r+b") as file:
                file.truncate(len(whole[0]) + len(whole[1]))
        self.file = None

    def append(self, record: dict) -> None:
        self.file = self.file or open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by __exit__
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()


def publish(out: Path, keys: Sequence[str]) -> bool:
    """Write `out` in the order of `keys` and delete the parts, if all are there; False where other processes are still at work."""
    found = done(out, keys)
    if len(found) < len(set(keys)):
        return False
    write_text(out, "".join(json.dumps(found[key], ensure_ascii=False) + "\n" for key in keys))
    for part in _parts(out):
        part.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def progress(name: str, total: int, show: bool) -> Iterator[Callable[[Sequence], None]]:
    """A bar over records with tokens a second and time left; gives the function to call with the answers of each."""
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
    """The parts that this process answers for: each has one such process, whatever the number of processes that wrote them."""
    return [part for part in _parts(out) if int(part.name.rpartition("-")[2]) % world == rank]


def _parts(out: Path) -> list[Path]:
    if not out.parent.is_dir():
        return []
    head = f".{out.name}.part-"
    return sorted(
        path
        for path in out.parent.iterdir()
        if path.name.startswith(head) and path.name[len(head) :].isdigit()
    )


def _parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
