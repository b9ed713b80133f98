"""From chats to prompts for generation, in the order of the data.

Trailing answers are taken off, system prompts put in place, what cannot be answered is counted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ta.chat.encode import Drop, encode_prompts
from ta.chat.messages import (
    ANSWER,
    is_question,
    random_cut,
    strip_trailing_answers,
    template_arguments,
)
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.data.records import check_media, check_prompt
from ta.data.sources import Drops, isolate_errors, read_records, source_names

# (chats, tokenizer, config, their template arguments) -> token ids or a Drop for each
Encode = Callable[[Sequence[list[dict]], ChatTokenizer, ChatConfig, Sequence[dict]], list]


def asked(
    messages: Sequence[dict], cut: random.Random | None = None
) -> tuple[list[dict], Any | None]:
    """The messages up to the question that is asked, and the content of the answer that follows it.

    The question is the last one, or with `cut` one before a random answer. The content is None
    where no answer follows, and "" of an answer that only calls tools.
    """
    kept = list(messages)
    first = next((i for i, message in enumerate(messages) if is_question(message)), len(messages))
    if cut and any(message["role"] == ANSWER for message in messages[first:]):
        kept = random_cut(messages, cut)
    kept = strip_trailing_answers(kept)
    return kept, (messages[len(kept)]["content"] or "") if len(kept) < len(messages) else None


def read_prompts(
    paths: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    drops: Drops,
    seed: int = 0,
    cut: bool = False,
    encode: Encode = encode_prompts,
    tools: Sequence[dict] = (),
) -> list[tuple[dict, list[int]]]:
    """(record, token ids of its prompt) of every chat that can be answered.

    The others go to `drops`; ValueError where none is left. A record's messages end where its
    prompt does (before a random answer with `cut`, seeded); the answer that was taken off is its
    "reference". Where there are several sources, "file" is the name of the record's. `encode` makes
    token ids of chats, where these hold more than text. `tools` are those of records without.
    """
    check = partial(check_media, need_answer=False) if tokenizer.placeholders else check_prompt
    records = list(read_records(paths, check, drops, seed))
    names = source_names(paths)
    for n, record in enumerate(records):
        data = record.data
        if tools:
            data.setdefault("tools", list(tools))
        if len(names) > 1:
            data["file"] = names[record.source]
        generator = random.Random(f"{seed} {n}") if cut else None
        kept, reference = asked(data["messages"], generator)
        if reference is not None:
            data["reference"] = reference
        data["messages"] = kept

    def encode_some(some: Sequence[dict]) -> list:
        chats = [data["messages"] for data in some]
        return encode(chats, tokenizer, chat, [template_arguments(data) for data in some])

    encoded = isolate_errors(encode_some, [record.data for record in records])
    prompts = []
    for record, ids in zip(records, encoded, strict=True):
        if isinstance(ids, ValueError):
            drops.bad_record(record, ids)
        elif isinstance(ids, Drop):
            drops.drop(record, ids.reason)
        else:
            prompts.append((record.data, ids))
    if not prompts:
        raise ValueError(f"no record of {', '.join(paths)} can be answered: {drops.table()}")
    return prompts
