"""Sources of records: which records of which files are taken, and why others are not used."""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import pairwise
from typing import IO, Any, NamedTuple

from ta.data.jsonl import MAX_LINE, parse_record, read_lines

EXAMPLES = 3  # places named for each reason
CHUNK_RECORDS, CHUNK_BYTES = 1000, 8 << 20  # what is encoded at once

Check = Callable[[dict], dict]


class Source(NamedTuple):
    """A file and what is taken of it.

    Of `rows` records from `offset` a seeded `share` in (0, 1] or `count` is chosen.
    """

    path: str
    share: float | None = None
    count: int | None = None
    offset: int = 0
    rows: int | None = None
    system_prompt: str | None = None


class Record(NamedTuple):
    """One checked record with its origin: index of the source, 1-based line."""

    source: int
    line: int
    data: dict


def parse_source(text: str) -> Source:
    """Read a file's name and the choice of its records.

    It is `file.jsonl`, `file.jsonl@0.1` (share, has a point), `file.jsonl@500` (count) or
    `file.jsonl@500,offset=10,rows=100,system=Be kind, ...`, where `system=` takes the rest of the
    text. An `@` may belong to the path: the longest path that exists is taken.
    """
    cuts = [i for i, letter in enumerate(text) if letter == "@"]
    if not text or text.startswith("@"):
        raise ValueError(f"source {text!r}: no file named; give file.jsonl or file.jsonl@500")
    if not cuts or os.path.exists(text):
        return Source(text)
    present = [i for i in reversed(cuts) if os.path.exists(text[:i])]
    failure = None
    for i in present[:1] or cuts:
        try:
            return _with_choice(text[:i], text[i + 1 :])
        except ValueError as error:
            failure = failure or error
    raise ValueError(
        f"source {text!r}: {failure}; give file.jsonl@0.1 (share), @500 (count), "
        "@500,offset=10,rows=100,system=TEXT"
    )


def _with_choice(path: str, choice: str) -> Source:
    found: dict[str, Any] = {}
    options, mark, system = (
        choice.partition("system=")
        if choice.startswith("system=")
        else choice.partition(",system=")
    )
    if mark and not system:
        raise ValueError("system= without a text (--ignore-system-prompt removes system messages)")
    if mark:
        found["system_prompt"] = system
    for option in options.split(",") if options or not mark else ():
        key, given, value = option.partition("=")
        if not given:
            key, value = ("count" if option.strip().isdigit() else "share"), option
        key = key.strip()
        if key not in ("share", "count", "offset", "rows") or key in found:
            raise ValueError(
                f"{option!r} is not a share, a count, offset=, rows= or system=, or stands twice"
            )
        try:
            number = float(value) if key == "share" else int(value)
        except ValueError:
            raise ValueError(f"{option!r} is no number") from None
        if not (0 < number <= 1 if key == "share" else number >= (key != "offset")):
            raise ValueError(
                f"{key} {value} cannot be; "
                + ("a share lies in (0, 1]" if key == "share" else "give a positive whole number")
            )
        found[key] = number
    if {"share", "count"} <= found.keys():
        raise ValueError("a share and a count at once")
    return Source(path, **found)


def select(source: Source, seed: int) -> tuple[bytearray, str]:
    """Which records of a source are taken: a flag for each line that is not blank; and a remark.

    The choice ranks records by a keyed hash of their line. It depends on the seed and the lines
    alone, not on other sources, names or order; a larger share contains the smaller one. Identical
    lines are as many records. The remark is "" where there is nothing to say.
    """
    chosen = source.share is not None or source.count is not None
    ranks, key = array("Q"), str(seed).encode()[:64]
    for _, raw in read_lines(source.path):
        ranks.append(int.from_bytes(blake2b(raw, digest_size=8, key=key).digest()) if chosen else 0)
    window = range(len(ranks))[source.offset :][: source.rows]
    if not window:
        raise ValueError(
            f"{source.path}: offset={source.offset} leaves nothing of its {len(ranks)} records; "
            "give a smaller offset"
        )
    want = (
        source.count
        if source.count is not None
        else max(round((source.share or 1.0) * len(window)), 1)
    )
    keep = bytearray(len(ranks))
    for i in sorted(window, key=ranks.__getitem__)[:want] if chosen else window:
        keep[i] = 1
    wanted = source.rows or 0 if source.count is None else source.count
    return keep, f"{wanted} records asked for, {len(window)} there, all taken" if wanted > len(
        window
    ) else ""


class Drops:
    """Counts what was not used, by reason, and names the first places.

    It writes each as a line of JSON to `aside` and decides when bad records are an error.
    """

    def __init__(
        self,
        on_bad_record: str = "error",
        max_bad_share: float = 0.01,
        expected: int = 0,
        aside: IO[str] | None = None,
    ):
        self.skip, self.max_bad_share, self.expected, self.aside = (
            on_bad_record == "skip",
            max_bad_share,
            expected,
            aside,
        )
        self.bad = 0
        self.counts: dict[str, int] = {}
        self.notes: dict[str, int] = {}
        self.first: dict[str, list[tuple[int, int]]] = {}

    def bad_record(self, source: int, path: str, line: int, error: ValueError, raw: bytes) -> None:
        """Count a record that is wrong, or raise ValueError.

        It raises always unless bad records are skipped, and when skipped ones are more than
        `max_bad_share` allows.
        """
        if getattr(error, "unusable", False):
            return self.drop(source, path, line, error.reason)
        if not self.skip:
            raise ValueError(f"{path}:{line}: {error}") from None
        self.bad += 1
        text = (raw if len(raw) <= MAX_LINE else raw[:1000]).decode(errors="backslashreplace")
        self.drop(
            source, path, line, getattr(error, "reason", "") or str(error).partition(":")[0], text
        )
        if self.bad > self.max_bad_share * self.expected:
            raise ValueError(
                f"{path}:{line}: {error}\nbad records: {self.bad} so far of {self.expected}, over "
                f"--max-bad-share {self.max_bad_share}; "
                f"mend them or raise it. By reason: {self.table()}"
            ) from None

    def drop(self, source: int, path: str, line: int, reason: str, text: str | None = None) -> None:
        """Count a record that is right but cannot be used (or, with `text`, a bad one)."""
        self._count(self.counts, reason, source, line)
        if self.aside:
            entry = {"file": path, "line": line, "reason": reason} | (
                {} if text is None else {"text": text}
            )
            self.aside.write(json.dumps({"source": source} | entry, ensure_ascii=False) + "\n")

    def note(self, source: int, line: int, remark: str) -> None:
        """Count something odd in a record that is used."""
        self._count(self.notes, remark, source, line)

    def _count(self, counts: dict[str, int], key: str, source: int, line: int) -> None:
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= EXAMPLES:
            self.first.setdefault(key, []).append((source, line))

    def reasons(self) -> dict[str, dict]:
        """{reason: {"count", "first": [(source, line)]}}, most frequent first."""
        return self._sorted(self.counts)

    def remarks(self) -> dict[str, dict]:
        """The same for what was noted."""
        return self._sorted(self.notes)

    def _sorted(self, counts: dict[str, int]) -> dict[str, dict]:
        return {
            key: {"count": counts[key], "first": self.first[key]}
            for key in sorted(counts, key=counts.__getitem__, reverse=True)
        }

    def table(self) -> str:
        """The reasons in one line, with count and the first line."""
        return ", ".join(
            f"{entry['count']} {reason} (line {entry['first'][0][1]})"
            for reason, entry in self.reasons().items()
        )


def scan(
    index: int, source: Source, keep: Sequence[int], check: Check, drops: Drops
) -> Iterator[tuple[Record, bytes]]:
    """Stream the chosen records of one source, checked, each with its line as bytes.

    The rest goes to `drops`.
    """
    chosen: Iterable = (
        numbered for numbered, kept in zip(read_lines(source.path), keep, strict=False) if kept
    )
    for line, raw in chosen:
        try:
            data = check(parse_record(raw))
        except ValueError as error:
            drops.bad_record(index, source.path, line, error, raw)
            continue
        roles = [message["role"] for message in data.get("messages") or data.get("context") or ()]
        if any(
            a == b == "assistant" for a, b in pairwise(roles + ["assistant"] * ("context" in data))
        ):
            drops.note(index, line, "answers twice in a row")
        yield Record(index, line, data), raw


def chunks(stream: Iterable[tuple[Record, bytes]]) -> Iterator[list[tuple[Record, bytes]]]:
    """Lists of at most CHUNK_RECORDS records and about CHUNK_BYTES.

    Memory therefore does not grow with the data.
    """
    chunk, size = [], 0
    for record, raw in stream:
        chunk.append((record, raw))
        size += len(raw)
        if len(chunk) == CHUNK_RECORDS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
            gc.collect(0)
    if chunk:
        yield chunk


@contextmanager
def no_long_collections() -> Iterator[None]:
    """Turn off Python's search for dead cycles, which would walk all tokens again and again.

    The search among what is new, which `chunks` asks for, is enough.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def pin_errors(many: Callable[[list[dict]], Sequence], records: list[dict]) -> list:
    """`many(records)`, with a ValueError in the place of each record that causes one.

    Those are found by halving, so that the other records do not fail.
    """
    try:
        return list(many(records))
    except ValueError as error:
        if len(records) == 1:
            return [error]
    half = len(records) // 2
    return pin_errors(many, records[:half]) + pin_errors(many, records[half:])


def read_records(
    sources: Iterable[str], check: Check, drops: Drops | None = None, seed: int = 0
) -> Iterator[Record]:
    """Stream the checked records of several sources without preparing them.

    Sources go in the order of their text, as in `prepare`.
    """
    drops = drops or Drops()
    parsed = [parse_source(text) for text in sorted(sources)]
    kept = [select(source, seed) for source in parsed]
    drops.expected = sum(sum(keep) for keep, _ in kept)
    for index, (source, (keep, _)) in enumerate(zip(parsed, kept, strict=True)):
        for record, _ in scan(index, source, keep, check, drops):
            yield record
