"""From chats to prompts for generation, in the order of the data: trailing answers off, system prompts in place, what cannot be answered counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ta.chat.encode import Drop
from ta.chat.messages import ANSWER, random_cut, strip_trailing_answers, with_system
from ta.chat.template import ChatConfig
from ta.data.records import check_media, check_prompt
from ta.data.sources import Drops, parse_source, pin_errors, read_records
from ta.media.dialogue import Media, encode_media

if TYPE_CHECKING:
    from ta.chat.tokenizer import ChatTokenizer


def read_prompts(
    paths: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    drops: Drops,
    seed: int = 0,
    cut: bool = False,
) -> list[tuple[dict, list[int], Media]]:
    """(record, prompt ids, its pictures and sounds) of every chat that can be answered; the others go to `drops`. ValueError where none is left.

    A record's messages end where its prompt does (before a random answer with `cut`, seeded); the answer that was taken off is its "reference".
    """
    paths = sorted(paths)  # the order of read_records
    sources = [parse_source(path) for path in paths]
    found = list(
        read_records(
            paths,
            partial(check_media, need_answer=False) if tokenizer.placeholders else check_prompt,
            drops,
            seed,
        )
    )
    for n, record in enumerate(found):
        whole = record.data["messages"]
        kept = (
            random_cut(whole, random.Random(f"{seed} {n}"))
            if cut and any(m["role"] == ANSWER for m in whole)
            else whole
        )
        kept = strip_trailing_answers(kept)
        if len(kept) < len(whole):
            record.data["reference"] = whole[len(kept)]["content"]
        record.data["messages"] = with_system(kept, sources[record.source].system_prompt)
    encode = lambda chats: encode_media(chats, tokenizer, chat, prompts=True)
    records = []
    for record, prompt in zip(
        found, pin_errors(encode, [record.data["messages"] for record in found]), strict=True
    ):
        where = record.source, sources[record.source].path, record.line
        if isinstance(prompt, ValueError):
            drops.bad_record(*where, prompt, b"")
        elif isinstance(prompt, Drop):
            drops.drop(*where, prompt.reason)
        else:
            records.append((record.data, prompt[0].ids, prompt[1]))
    if not records:
        raise ValueError(f"no record of {', '.join(paths)} can be answered: {drops.table()}")
    return records
