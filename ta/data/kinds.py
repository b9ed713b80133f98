"""From records of each kind to the sequences its method learns from: one checker and one encoder a kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ta.chat.encode import EQUAL, Drop, encode_answers, encode_chats, encode_pairs
from ta.chat.render import Tokens
from ta.chat.tokenizer import tokenizer_settings
from ta.data.prepare import DataConfig, Encoded, Prepared, prepare
from ta.data.records import (
    check_chat,
    check_class,
    check_labelled,
    check_media,
    check_pair,
    check_question,
)
from ta.media.dialogue import encode_media

if TYPE_CHECKING:
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer

Kind = Literal["chat", "pair", "labelled", "class", "media", "question"]


def prepare_kind(
    kind: Kind | Literal["media"],
    sources: Sequence[str],
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    data: DataConfig,
    seed: int = 0,
    **more: Any,
) -> Prepared:
    """`dataset.prepare` for records of a kind, k = 2 for pairs and else 1.

    Extras: `margin` of a pair (NaN where none is given), `desirable` of a labelled answer (0 or 1), `label` of a class.
    """
    check, encode = KINDS[kind]
    if kind in ("chat", "media") and chat.loss_on == "all":
        check = partial(check, need_answer=False)
    made = prepare(
        sources,
        check,
        partial(encode, tokenizer, chat),
        {"method": kind} | tokenizer_settings(tokenizer, chat),
        data,
        seed=seed,
        chat=chat,
        **more,
    )
    equal = made.info["drops"].get(EQUAL, {"count": 0, "first": [""]})
    if equal["count"] > data.max_bad_share * made.info["expected"]:
        raise ValueError(
            f"{equal['first'][0]}: {EQUAL}, as in {equal['count']:,} of {made.info['expected']:,} pairs, over --max-bad-share "
            f"{data.max_bad_share}: mend them or raise it"
        )
    return made


def _chats(tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]) -> list[Encoded | Drop]:
    return [
        _encoded(result)
        for result in encode_chats([record["messages"] for record in records], tokenizer, chat)
    ]


def _pairs(tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]) -> list[Encoded | Drop]:
    contexts, better, worse = (
        [record[key] for record in records] for key in ("context", "answer_w", "answer_l")
    )
    results = encode_pairs(contexts, list(zip(better, worse, strict=True)), tokenizer, chat)
    margins = [record.get("precomputed_margin", math.nan) for record in records]
    return [
        _encoded(result, margin=margin) for result, margin in zip(results, margins, strict=True)
    ]


def _labelled(
    tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]
) -> list[Encoded | Drop]:
    results = encode_answers(
        [record["context"] for record in records],
        [[record["answer"]] for record in records],
        tokenizer,
        chat,
    )
    return [
        _encoded(result, desirable=float(record["is_desirable"]))
        for result, record in zip(results, records, strict=True)
    ]


def _classes(
    tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]
) -> list[Encoded | Drop]:
    """Whole dialogues without a learned token: the label is what is learned. Rendered with every message learned, so that cutting by answers
    does not apply, and the weights then cleared."""
    chats = [
        [{key: message[key] for key in message if key != "loss"} for message in record["messages"]]
        for record in records
    ]
    results = encode_chats(chats, tokenizer, replace(chat, loss_on="all"))
    bare = [
        result if isinstance(result, Drop) else Tokens(result.ids, [0.0] * len(result.ids))
        for result in results
    ]
    return [
        _encoded(result, label=float(record["label"]))
        for result, record in zip(bare, records, strict=True)
    ]


def _media(tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]) -> list[Encoded | Drop]:
    results = encode_media([record["messages"] for record in records], tokenizer, chat)
    return [
        result if isinstance(result, Drop) else Encoded((result[0],), media=result[1])
        for result in results
    ]


def _questions(
    tokenizer: ChatTokenizer, chat: ChatConfig, records: list[dict]
) -> list[Encoded | Drop]:
    """Chats without passages; the last question stays, whatever keep_end says: it is what is searched for."""
    return _chats(tokenizer, replace(chat, keep_end=True), records)


def _encoded(result: Tokens | Sequence[Tokens] | Drop, **extras: float) -> Encoded | Drop:
    if isinstance(result, Drop):
        return result
    return Encoded((result,) if isinstance(result, Tokens) else tuple(result), extras)


KINDS: dict[
    str, tuple[Callable, Callable]
] = {  # check(data) -> data, encode(tokenizer, chat, records) -> [Encoded or Drop]
    "chat": (check_chat, _chats),
    "pair": (check_pair, _pairs),
    "labelled": (check_labelled, _labelled),
    "class": (check_class, _classes),
    "media": (check_media, _media),
    "question": (check_question, _questions),
}
