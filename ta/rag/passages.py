"""The passages of a collection, a JSONL file, and how passages are put before a question."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ta.chat.encode import Drop
from ta.chat.messages import last_question
from ta.command_line import Range
from ta.data.records import check_passage
from ta.data.sources import parse_source, read_records
from ta.files import json_line

if TYPE_CHECKING:
    import numpy as np

# tokens kept free below the limit: two texts joined may take a few more tokens than each alone
MARGIN = 8

Chat = Sequence[dict]
Encode = Callable[[list[Chat]], list]  # chats -> token sequences, or Drop where one does not fit


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


def join_passages(
    chats: Sequence[Chat],
    texts: Sequence[Sequence[str]],
    encode: Encode,
    tokenizer: Any,
    settings: PassageSettings,
    max_tokens: int | None,
) -> list[tuple[Any, list[dict], int]]:
    """Put the texts of passages, best first, before the question of each chat.

    Gives for each chat its tokens or a Drop, its messages, and how many passages are in them.
    `encode` is `encode_chats` or `encode_prompts` with its settings, so that training and inference
    see the same text. The passages share the tokens that `max_tokens` leaves beside the chat: the
    last one that fits is cut, those after it are left out. The question is never cut: where it does
    not fit by itself, the result is encode's Drop.
    """
    alone = encode(list(chats)) if max_tokens is not None else [None] * len(chats)
    kept = []
    for passages, base in zip(texts, alone, strict=True):
        room = math.inf
        if base is not None:
            room = 0 if isinstance(base, Drop) else max_tokens - _length(base) - MARGIN
        kept.append(_cut(passages, room, tokenizer, settings))
    pairs = zip(chats, kept, strict=True)
    joined = [put_before(chat, passages, settings.separator) for chat, passages in pairs]
    encoded = encode(joined)
    results = []
    for chat, base, messages, passages, tokens in zip(
        chats, alone, joined, kept, encoded, strict=True
    ):
        # the joined text was cut after all: the chat goes without passages
        lost = base is not None and (isinstance(tokens, Drop) or _length(tokens) < _length(base))
        results.append((base, list(chat), 0) if lost else (tokens, messages, len(passages)))
    return results


def _length(tokens: Any) -> int:
    return 0 if isinstance(tokens, Drop) else len(getattr(tokens, "ids", tokens))


def _cut(texts: Sequence[str], room: float, tokenizer: Any, settings: PassageSettings) -> list[str]:
    """As many texts as fit into `room` tokens, separators included.

    Each has passage_tokens at most.
    """
    kept = []
    separator = len(tokenizer(settings.separator, add_special_tokens=False).input_ids)
    for text in texts:
        limit = min(settings.passage_tokens, room - separator)
        if limit < 1:
            break
        cut = text
        if room < math.inf or len(text.encode()) > limit:  # a token has a byte at least
            encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoding.offset_mapping
            cut = text if len(spans) <= limit else text[: spans[limit - 1][1]]
            room -= min(len(spans), limit) + separator
        kept.append(cut)
        if len(cut) < len(text) and limit < settings.passage_tokens:
            break
    return kept
