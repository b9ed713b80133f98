"""The passages of a collection, a JSONL file, and how passages are put before a question."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ta.chat.messages import last_question
from ta.command_line import Range
from ta.data.records import check_passage
from ta.data.sources import parse_source, read_records
from ta.files import json_line

if TYPE_CHECKING:
    import numpy as np

Chat = Sequence[dict]


class Passages(NamedTuple):
    """N passages in a file; `offsets[i]:offsets[i + 1]` are the bytes of passage i."""

    path: Path
    offsets: np.ndarray  # (N + 1,) int64


class PassageSettings(NamedTuple):
    """How passages are put before a question."""

    num_passages: int = 4  # before one question, at inference
    passage_tokens: int = 256  # of one passage at most, as the generator counts them
    separator: str = "\n\n"  # after each passage


@dataclass(frozen=True)
class RetrievalConfig:
    index: str | None = None
    """Folder of an index, written by build_index.py, or by rag.py in RUN/final/index."""
    encoder_path: str | None = None
    """Folder of the index's encoder, where it is not where it was when the index was built."""
    num_passages: Annotated[int | None, Range(1)] = None
    """Passages found for each question. Default: 4, before a question all together; 1 for what
    rag.py trained, which reads each by itself."""
    passage_tokens: Annotated[int | None, Range(1)] = None
    """Tokens of a passage at most, as the generator counts them; longer ones are cut at their end.
    Default: what rag.py trained with, or 256."""
    approximate: bool = False
    """Search the approximate index (build_index --approximate; needs faiss): faster on millions of
    passages, and now and then misses one."""
    verify_index: bool = False
    """Read all of the index and compare it with its hashes, not small files alone."""
    separator: str | None = None
    """Text after each passage; a token of --init-tokens may stand in it. Default: what rag.py
    trained with, or a blank line."""


def passage_settings(config: RetrievalConfig, manifest: dict[str, Any]) -> PassageSettings:
    """The settings in an index's manifest, each replaced by the user's where he gives one."""
    settings = PassageSettings(**manifest.get("joining", {}))
    given = {name: getattr(config, name) for name in PassageSettings._fields}
    return settings._replace(**{name: x for name, x in given.items() if x is not None})


def write_passages(sources: Sequence[str], path: Path) -> np.ndarray:
    """Write the passages of the sources to `path`; their offsets, (N + 1,) int64.

    A line is {"id", "title"?, "text", ...}. A passage without an id gets its place, from 0.
    ValueError with file and line for a passage without text and for an id that another one has.
    """
    import numpy as np

    offsets, seen, paths = [0], {}, list(sources)
    with open(path, "wb") as file:
        for place, record in enumerate(read_records(paths, check_passage)):
            name, where = str(record.data.get("id", place)), (record.source, record.line)
            if (first := seen.setdefault(name, where)) != where:
                here, there = (
                    f"{parse_source(paths[source]).path}:{line}" for source, line in (where, first)
                )
                raise ValueError(
                    f"{here}: id {name!r} is that of {there} already; give each passage its own id"
                )
            line = json_line({**record.data, "id": name}).encode()
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    return np.array(offsets, np.int64)


def read_passages(passages: Passages, rows: Iterable[int]) -> list[dict]:
    """The passages of `rows`, in their order."""
    with open(passages.path, "rb") as file:
        read = []
        for row in rows:
            file.seek(int(passages.offsets[row]))
            read.append(json.loads(file.readline()))
        return read


def rows_of(passages: Passages, ids: Iterable[str]) -> dict[str, int]:
    """{id: row} of those `ids` that are in the collection; the file is read once."""
    wanted, rows = set(ids), {}
    if wanted:
        with open(passages.path, "rb") as file:
            for row, line in enumerate(file):
                if (name := json.loads(line)["id"]) in wanted:
                    rows[name] = row
    return rows


def text_of(passage: dict) -> str:
    """The text of a passage as it is embedded and read: a line with its title, if any, above it."""
    return f"{passage['title']}\n{passage['text']}" if passage.get("title") else passage["text"]


def question_place(messages: Chat) -> int:
    """The index of the message that passages are found for, the last that asks.

    ValueError where there is none.
    """
    place = last_question(messages)
    if place is None:
        raise ValueError(
            "no question: no message of a user comes before the answer, so there is nothing to "
            "search for"
        )
    return place


def put_before(messages: Chat, texts: Sequence[str], separator: str) -> list[dict]:
    """The chat with the passages' texts, each followed by the separator, before the question's."""
    place = question_place(messages)
    block = "".join(text + separator for text in texts)
    return [
        {**message, "content": block + message["content"]} if i == place else message
        for i, message in enumerate(messages)
    ]
