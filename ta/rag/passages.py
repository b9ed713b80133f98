"""The passages of a collection: one JSONL file with the place of every line, and how passages are put before a question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ta.chat.encode import Drop
from ta.chat.messages import SYSTEM, strip_trailing_answers
from ta.data.records import check_passage
from ta.data.sources import Drops, parse_source, read_records

if TYPE_CHECKING:
    import numpy as np

MARGIN = 8  # tokens kept free below the limit: pieces of text may take a few more where they meet

Chat = Sequence[dict]
Encode = Callable[[list[Chat]], list]  # chats -> token sequences, or Drop where one does not fit


class Passages(NamedTuple):
    """N passages in a file; `offsets[i]:offsets[i + 1]` are the bytes of passage i."""

    path: Path
    offsets: np.ndarray  # (N + 1,) int64


class Joining(NamedTuple):
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
    num_passages: int | None = None
    """Passages found for each question. Default: 4, before a question all together; 1 for what rag.py trained, which reads each by itself."""
    passage_tokens: int | None = None
    """Tokens of a passage at most, as the generator counts them; longer ones are cut at their end. Default: what rag.py trained with, or 256."""
    approximate: bool = False
    """Search the approximate index (build_index --approximate; needs faiss): faster on millions of passages, and now and then misses one."""
    separator: str | None = None
    """Text after each passage; a token of --init-tokens may stand in it. Default: what rag.py trained with, or a blank line."""


def joining(config: RetrievalConfig, manifest: dict[str, Any]) -> Joining:
    """The user's settings over those that the index tells. ValueError for numbers below 1."""
    known = Joining(**manifest.get("joining", {}))._asdict()
    chosen = Joining(
        **{
            key: value if (own := getattr(config, key)) is None else own
            for key, value in known.items()
        }
    )
    for name in ("num_passages", "passage_tokens"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)}: give 1 or more")
    return chosen


def write_passages(sources: Sequence[str], path: Path, seed: int = 0) -> np.ndarray:
    """Write the passages of the sources to `path`, one {"id", "title"?, "text", ...} a line, and give their offsets (N + 1,) int64.

    A passage without an id gets its place, from 0. ValueError with file and line: a passage without text, an id that another passage has.
    """
    import numpy as np

    offsets, seen, paths = [0], {}, sorted(sources)
    with open(path, "wb") as file:
        for place, record in enumerate(read_records(paths, check_passage, Drops(), seed)):
            name, where = str(record.data.get("id", place)), (record.source, record.line)
            if (first := seen.setdefault(name, where)) != where:
                here, there = (
                    f"{parse_source(paths[source]).path}:{line}" for source, line in (where, first)
                )
                raise ValueError(
                    f"{here}: id {name!r} is that of {there} already; give each passage its own id"
                )
            line = json.dumps({**record.data, "id": name}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    return np.array(offsets, np.int64)


def take(passages: Passages, rows: Iterable[int]) -> list[dict]:
    """The passages of `rows`, in their order."""
    with open(passages.path, "rb") as file:
        found = []
        for row in rows:
            start, end = (int(x) for x in passages.offsets[row : row + 2])
            file.seek(start)
            found.append(json.loads(file.read(end - start)))
        return found


def rows_of(passages: Passages, ids: Iterable[str]) -> dict[str, int]:
    """{id: row} of those of `ids` that are there; the file is read once, and no more than that is kept in memory."""
    wanted, found = set(ids), {}
    if wanted:
        with open(passages.path, "rb") as file:
            for row, line in enumerate(file):
                if (name := json.loads(line)["id"]) in wanted:
                    found[name] = row
    return found


def text_of(passage: dict) -> str:
    """What is embedded and read of a passage: its title, where it has one, in a line above its text."""
    return f"{passage['title']}\n{passage['text']}" if passage.get("title") else passage["text"]


def question_of(messages: Chat) -> int:
    """The place of the message that is searched for: the last one before the trailing answer. ValueError where there is none."""
    asked = strip_trailing_answers(messages)
    if not asked or asked[-1]["role"] == SYSTEM:
        raise ValueError(
            "no question: no message of a user comes before the answer, so there is nothing to search for"
        )
    return len(asked) - 1


def put_before(messages: Chat, texts: Sequence[str], separator: str) -> list[dict]:
    """The chat with the passages, each followed by the separator, in front of the question's own text."""
    at = question_of(messages)
    block = "".join(text + separator for text in texts)
    return [
        {**message, "content": block + message["content"]} if i == at else message
        for i, message in enumerate(messages)
    ]


def join(
    chats: Sequence[Chat],
    texts: Sequence[Sequence[str]],
    encode: Encode,
    tokenizer: Any,
    how: Joining,
    max_tokens: int | None,
) -> list[tuple[Any, list[dict], int]]:
    """For each chat (its tokens with its passages or Drop, the joined messages, how many of the passages are in them), best passage first.

    `encode` is `encode_chats` or `encode_prompts` with its settings, under which training and inference get the same text. Of what `max_tokens`
    leaves beside the chat itself the passages take as much as fits: the last one that fits is cut, those after it are left out. The question
    is never touched: where it does not fit by itself, the result is encode's Drop.
    """
    alone = encode(list(chats)) if max_tokens is not None else [None] * len(chats)
    kept = []
    for found, base in zip(texts, alone, strict=True):
        room = (
            None
            if base is None
            else 0
            if isinstance(base, Drop)
            else max_tokens - _length(base) - MARGIN
        )
        kept.append(_cut(found, room, tokenizer, how))
    joined = [
        put_before(chat, found, how.separator) for chat, found in zip(chats, kept, strict=True)
    ]
    results = []
    for chat, found, whole, base, tokens in zip(
        chats, kept, joined, alone, encode(joined), strict=True
    ):
        lost = base is not None and (isinstance(tokens, Drop) or _length(tokens) < _length(base))
        results.append((base, list(chat), 0) if lost else (tokens, whole, len(found)))
    return results


def _length(tokens: Any) -> int:
    return 0 if isinstance(tokens, Drop) else len(getattr(tokens, "ids", tokens))


def _cut(texts: Sequence[str], room: int | None, tokenizer: Any, how: Joining) -> list[str]:
    """As many of the texts as fit into `room` tokens with their separators, each of passage_tokens at most."""
    kept = []
    after = len(tokenizer(how.separator, add_special_tokens=False).input_ids)
    for text in texts:
        limit = how.passage_tokens if room is None else min(how.passage_tokens, room - after)
        if limit < 1:
            break
        whole = text
        if room is not None or len(text.encode()) > limit:  # a token has a byte at least
            spans = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True
            ).offset_mapping
            whole = text if len(spans) <= limit else text[: spans[limit - 1][1]]
            room = None if room is None else room - min(len(spans), limit) - after
        kept.append(whole)
        if len(whole) < len(text) and limit < how.passage_tokens:
            break
    return kept
