"""Sources of records: which records of which files are used, and why others are not."""

from __future__ import annotations

import gc
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import PurePath
from typing import IO, Any, NamedTuple

from ta.chat.messages import with_system
from ta.data.formats import Format, format_of
from ta.data.jsonl import MAX_LINE, BadRecord, parse_record
from ta.data.readers import read_rows
from ta.data.records import Check
from ta.files import HUB, json_line

# places that are named for each reason
EXAMPLES = 3
# limits of a chunk that is encoded at once
CHUNK_RECORDS = 1000
CHUNK_BYTES = 8 << 20
# ids among which double ones are counted
MAX_IDS = 1 << 20

# fields of records that have a meaning for some method
USED = {
    *("id", "messages", "context", "answer_w", "answer_l", "precomputed_margin", "answer"),
    *("is_desirable", "label", "gold", "answers", "rewards", "title", "text"),
    *("tools", "documents", "chat_template_kwargs"),
}


class Source(NamedTuple):
    """A file and the choice of its records.

    Of the records from `offset` on, `rows` of them or all, a seeded `share` in (0, 1] or a `count`
    is chosen.
    """

    path: str
    share: float | None = None
    count: int | None = None
    offset: int = 0
    rows: int | None = None
    system_prompt: str | None = None


class Record(NamedTuple):
    """One record with its origin."""

    # index of the source
    source: int
    # from 1
    line: int
    path: str
    # the line itself
    raw: bytes
    # as the checker gives it; {} where it is wrong
    data: dict


def parse_source(text: str) -> Source:
    """The Source that a text names: a file and, optionally, a choice of its records.

    The text is `file.jsonl`, `file.jsonl@0.1` (a share has a point), `file.jsonl@500` (count) or
    `file.jsonl@500,offset=10,rows=100,system=Be kind, ...`, where `system=` takes the rest of the
    text. An `@` may belong to the path: the longest path that exists is used. ValueError for
    another form.
    """
    cuts = [i for i, letter in enumerate(text) if letter == "@"]
    if not text or text.startswith("@"):
        raise ValueError(f"source {text!r}: no file named; give file.jsonl or file.jsonl@500")
    if not cuts or os.path.exists(text):
        return Source(text)
    present = [i for i in reversed(cuts) if os.path.exists(text[:i])]
    failures = []
    for i in present[:1] or cuts:
        try:
            return _with_choice(text[:i], text[i + 1 :])
        except ValueError as error:
            failures.append(error)
    raise ValueError(
        f"source {text!r}: {failures[0]}; give file.jsonl@0.1 (share), @500 (count), "
        "@500,offset=10,rows=100,system=TEXT"
    )


def _with_choice(path: str, choice: str) -> Source:
    options, *system = re.split("(?:^|,)system=", choice, maxsplit=1)
    if system == [""]:
        raise ValueError("system= without a text (--ignore-system-prompt removes system messages)")
    fields: dict[str, Any] = {"system_prompt": system[0]} if system else {}
    for option in options.split(",") if options or not system else ():
        key, given, value = option.partition("=")
        if not given:
            key, value = ("count" if option.strip().isdigit() else "share"), option
        key = key.strip()
        if key not in ("share", "count", "offset", "rows") or key in fields:
            raise ValueError(
                f"{option!r} is not a share, a count, offset=, rows= or system=, or stands twice"
            )
        try:
            number = float(value) if key == "share" else int(value)
        except ValueError:
            raise ValueError(f"{option!r} is no number") from None
        share = key == "share"
        if not (0 < number <= 1 if share else number >= (key != "offset")):
            range_of = "a share lies in (0, 1]" if share else "give a positive whole number"
            raise ValueError(f"{key} {value} cannot be; {range_of}")
        fields[key] = number
    if {"share", "count"} <= fields.keys():
        raise ValueError("a share and a count at once")
    return Source(path, **fields)


def select(source: Source, seed: int) -> tuple[bytearray, str]:
    """A flag for each line of a source that is not blank: whether it is used; and a remark or "".

    The choice ranks records by a keyed hash of their line. It depends on the seed and the lines
    alone, not on other sources, names or order; a larger share contains the smaller one. Equal
    lines count as separate records. ValueError where an offset leaves no record.
    """
    chosen = source.share is not None or source.count is not None
    ranks, key = array("Q"), str(seed).encode()[:64]
    for _, raw in read_rows(source.path):
        ranks.append(int.from_bytes(blake2b(raw, digest_size=8, key=key).digest()) if chosen else 0)
    window = range(len(ranks))[source.offset :][: source.rows]
    if not window:
        raise ValueError(
            f"{source.path}: offset={source.offset} leaves nothing of its {len(ranks)} records; "
            "give a smaller offset"
        )
    count = source.count
    if count is None:
        count = max(round((source.share or 1.0) * len(window)), 1)
    keep = bytearray(len(ranks))
    for i in sorted(window, key=ranks.__getitem__)[:count]:
        keep[i] = 1
    wanted = source.rows or 0 if source.count is None else source.count
    remark = f"{wanted} records asked for, {len(window)} there, all taken"
    return keep, remark if wanted > len(window) else ""


class Tally(dict[str, dict[str, Any]]):
    """{reason: {"count", "first": [(source, line)]}}, the first EXAMPLES places of each reason."""

    def add(self, reason: str, record: Record) -> None:
        """Count a record."""
        entry = self.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if entry["count"] <= EXAMPLES:
            entry["first"].append((record.source, record.line))

    def sorted(self) -> dict[str, dict[str, Any]]:
        """The reasons, the most frequent first."""
        return dict(sorted(self.items(), key=lambda item: -item[1]["count"]))


@dataclass
class Drops:
    """Counts of records that are not used, by reason, with the first places of each.

    Each is written to `aside` as a line of JSON. Bad records are an error unless `on_bad_record` is
    "skip", and are one again when they exceed `max_bad_share` of `expected`.
    """

    on_bad_record: str = "error"
    max_bad_share: float = 0.01
    expected: int = 0
    aside: IO[str] | None = None
    bad: int = 0
    counts: Tally = field(default_factory=Tally)
    # remarks on records that are used
    notes: Tally = field(default_factory=Tally)
    # of each source: its records by the format from which they were converted
    formats: dict[int, Counter[Format]] = field(default_factory=dict)
    # records that have a field which no method reads
    unused: Counter[str] = field(default_factory=Counter)
    # hashes of the ids so far
    ids: set[int] = field(default_factory=set)

    def bad_record(self, record: Record, error: ValueError) -> None:
        """Count a bad record, or raise ValueError.

        It raises where bad records are not skipped, and where more are skipped than `max_bad_share`
        allows. A record that is only unusable is dropped.
        """
        if getattr(error, "unusable", False):
            return self.drop(record, error.reason)
        what = f"{record.path}:{record.line}: {error}"
        if self.on_bad_record != "skip":
            raise ValueError(what) from None
        self.bad += 1
        shown = record.raw if len(record.raw) <= MAX_LINE else record.raw[:1000]
        reason = getattr(error, "reason", "") or str(error).partition(":")[0]
        self.drop(record, reason, shown.decode(errors="backslashreplace"))
        if self.bad > self.max_bad_share * self.expected:
            raise ValueError(
                f"{what}\nbad records: {self.bad} so far of {self.expected}, over "
                f"--max-bad-share {self.max_bad_share}; mend them or raise it. "
                f"By reason: {self.table()}"
            ) from None

    def drop(self, record: Record, reason: str, text: str | None = None) -> None:
        """Count a well-formed record that cannot be used (or, with `text`, a bad one)."""
        self.counts.add(reason, record)
        if self.aside:
            origin = {"source": record.source, "file": record.path, "line": record.line}
            entry = {**origin, "reason": reason} | ({} if text is None else {"text": text})
            self.aside.write(json_line(entry))

    def table(self) -> str:
        """The reasons in one line, each with its count and first line."""
        return ", ".join(
            f"{entry['count']} {reason} (line {entry['first'][0][1]})"
            for reason, entry in self.counts.sorted().items()
        )


def scan(
    index: int, source: Source, keep: Sequence[int], check: Check, drops: Drops
) -> Iterator[Record]:
    """Stream the chosen records of one source, checked.

    The other records are counted in `drops`.
    """
    formats = drops.formats.setdefault(index, Counter())
    family = None
    flagged = zip(read_rows(source.path), keep, strict=False)
    for line, raw in (numbered for numbered, kept in flagged if kept):
        origin = index, line, source.path, raw
        try:
            data, form = canonical(parse_record(raw), check, family)
        except ValueError as error:
            drops.bad_record(Record(*origin, {}), error)
            continue
        record = Record(*origin, with_own_system(data, source))
        if form:
            formats[form] += 1
        family = form.family if form else ""
        if unused := data.keys() - USED:
            drops.unused.update(unused)
        if "id" in data and len(drops.ids) < MAX_IDS:
            if (name := hash(str(data["id"]))) in drops.ids:
                drops.notes.add("id given twice", record)
            drops.ids.add(name)
        roles = [message["role"] for message in data.get("messages") or data.get("context") or ()]
        roles += ["assistant"] * ("context" in data)
        if any(a == b == "assistant" for a, b in pairwise(roles)):
            drops.notes.add("answers twice in a row", record)
        yield record


def with_own_system(data: dict, source: Source) -> dict:
    """A checked record with the source's own system prompt, if it has one, before its messages."""
    if source.system_prompt is None:
        return data
    chats = {key: data[key] for key in ("messages", "context") if key in data}
    return data | {key: with_system(chat, source.system_prompt) for key, chat in chats.items()}


def canonical(data: dict, check: Check, family: str | None = None) -> tuple[dict, Format | None]:
    """A record in the form of its checker, and the format from which it was converted, if any.

    `family` is that of the records before it in the file ("": they were canonical). An id that is a
    list or an object becomes its JSON text. BadRecord for a record of another format, and for what
    the checker refuses.
    """
    form = format_of(data, check)
    if family not in (None, form.family if form else ""):
        fields = ", ".join(list(data)[:8])
        raise BadRecord(
            "another format",
            f"the record (fields: {fields}) has another format than those before it; give one "
            "format a file",
        )
    if form is None:
        data = check(data)
    else:
        try:
            data = check(form.convert(data))
        except BadRecord as error:
            what = f"{error} (the record is read as {form.name})"
            raise BadRecord(error.reason, what, error.unusable) from None
    if isinstance(data.get("id"), list | dict):
        data = {**data, "id": json.dumps(data["id"], ensure_ascii=False)}
    return data, form


def source_names(texts: Sequence[str]) -> list[str]:
    """A short name for each source: its file's name, with the folders that tell it from others.

    A source that is given twice gets a number too. ValueError as of `parse_source`.
    """
    paths = [parse_source(text).path for text in texts]
    parts = [PurePath(path.removeprefix(HUB)).parts or (path,) for path in paths]
    stems = []
    for *folders, name in parts:
        stems.append((*folders, name.partition(".")[0] or name))
    names = []
    for stem in stems:
        others, size = {*stems} - {stem}, 1
        while size < len(stem) and any(other[-size:] == stem[-size:] for other in others):
            size += 1
        name = "/".join(stem[-size:]).lstrip("/")
        again = stems[: len(names)].count(stem)
        names.append(f"{name}#{again + 1}" if again else name)
    return names


def chunks(stream: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of at most CHUNK_RECORDS records and about CHUNK_BYTES bytes.

    Memory therefore does not grow with the data.
    """
    chunk, size = [], 0
    for record in stream:
        chunk.append(record)
        size += len(record.raw)
        if len(chunk) == CHUNK_RECORDS or size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
            gc.collect(0)
    if chunk:
        yield chunk


@contextmanager
def no_full_gc() -> Iterator[None]:
    """Turn off Python's search for dead cycles, which would visit all tokens again and again.

    The search among new objects, which `chunks` asks for, is enough.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def isolate_errors(many: Callable[[list[dict]], Sequence], records: list[dict]) -> list:
    """`many(records)`, with a ValueError in the place of each record that causes one.

    Those are found by halving, so that the other records do not fail.
    """
    try:
        return list(many(records))
    except ValueError as error:
        if len(records) < 2:
            return [error] * len(records)
    half = len(records) // 2
    return isolate_errors(many, records[:half]) + isolate_errors(many, records[half:])


def read_records(
    sources: Iterable[str], check: Check, drops: Drops | None = None, seed: int = 0
) -> Iterator[Record]:
    """Stream the checked records of several sources, in the order given, without preparing them."""
    drops = drops or Drops()
    parsed = [parse_source(text) for text in sources]
    kept = [select(source, seed) for source in parsed]
    drops.expected = sum(sum(keep) for keep, _ in kept)
    for index, (source, (keep, _)) in enumerate(zip(parsed, kept, strict=True)):
        for record in scan(index, source, keep, check, drops):
            # many may be held at once
            yield record._replace(raw=b"")
