"""From records of each kind to training sequences: one encoder a kind, and what it depends on, so that prepared data knows its key."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.chat import ChatConfig, Drop, Template, Tokens, Vocabulary, encode_answers, encode_chats, encode_pairs
from ta.dataset import DataConfig, Encoded, Prepared, prepare
from ta.kinds import check_chat, check_class, check_labelled, check_pair
from ta.tokenizer import export_template, template_of, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Kind = Literal["chat", "pair", "labelled", "class"]


class Coding(NamedTuple):
    """What turns messages into ids: the template, the tokenizer's vocabulary, the chat settings, and a JSON value that names all three."""

    template: Template
    vocabulary: Vocabulary
    config: ChatConfig
    settings: dict[str, Any]


def coding(tokenizer: PreTrainedTokenizerFast, config: ChatConfig, content_tokens: Sequence[str] = ()) -> Coding:
    """The Coding of a tokenizer; make it again after adding tokens. `content_tokens` count in content too (see tokenizer.vocabulary)."""
    template = template_of(tokenizer, config)
    state = tokenizer.backend_tokenizer.to_str() + repr(sorted(tokenizer.special_tokens_map.items()))
    settings = {
        "template": export_template(template),
        "tokenizer": hashlib.sha256(state.encode()).hexdigest(),
        "content_tokens": sorted(content_tokens),
        "chat": asdict(config),
    }
    return Coding(template, vocabulary(tokenizer, content_tokens), config, settings)


def prepare_kind(kind: Kind, sources: Sequence[str], coding: Coding, data: DataConfig, seed: int = 0, **more: Any) -> Prepared:
    """`dataset.prepare` for records of a kind, k = 2 for pairs and else 1.

    Extras: `margin` of a pair (NaN where none is given), `desirable` of a labelled answer (0 or 1), `label` of a class.
    """
    check, encode = KINDS[kind]
    if kind == "chat" and coding.config.loss_on == "all":
        check = partial(check_chat, need_answer=False)
    return prepare(sources, check, partial(encode, coding), {"kind": kind, **coding.settings}, data, seed=seed, chat=coding.config, **more)


def _chats(coding: Coding, records: list[dict]) -> list[Encoded | Drop]:
    return [_encoded(result) for result in encode_chats([record["messages"] for record in records], *coding[:3])]


def _pairs(coding: Coding, records: list[dict]) -> list[Encoded | Drop]:
    contexts, better, worse = ([record[key] for record in records] for key in ("context", "answer_w", "answer_l"))
    results = encode_pairs(contexts, better, worse, *coding[:3])
    margins = [record.get("precomputed_margin", math.nan) for record in records]
    return [_encoded(result, margin=margin) for result, margin in zip(results, margins, strict=True)]


def _labelled(coding: Coding, records: list[dict]) -> list[Encoded | Drop]:
    results = encode_answers([record["context"] for record in records], [[record["answer"]] for record in records], *coding[:3])
    return [_encoded(result, desirable=float(record["is_desirable"])) for result, record in zip(results, records, strict=True)]


def _classes(coding: Coding, records: list[dict]) -> list[Encoded | Drop]:
    """Whole dialogues without a learned token: the label is what is learned. Rendered with every message learned, so that cutting by answers
    does not apply, and the weights then cleared."""
    chats = [[{key: message[key] for key in message if key != "loss"} for message in record["messages"]] for record in records]
    results = encode_chats(chats, coding.template, coding.vocabulary, replace(coding.config, loss_on="all"))
    bare = [result if isinstance(result, Drop) else Tokens(result.ids, [0.0] * len(result.ids)) for result in results]
    return [_encoded(result, label=float(record["label"])) for result, record in zip(bare, records, strict=True)]


def _encoded(result: Tokens | Sequence[Tokens] | Drop, **extras: float) -> Encoded | Drop:
    if isinstance(result, Drop):
        return result
    return Encoded((result,) if isinstance(result, Tokens) else tuple(result), extras)


KINDS: dict[str, tuple[Callable[[dict], dict], Callable[[Coding, list[dict]], list[Encoded | Drop]]]] = {
    "chat": (check_chat, _chats),
    "pair": (check_pair, _pairs),
    "labelled": (check_labelled, _labelled),
    "class": (check_class, _classes),
}
