"""Pieces of a rendered chat to token ids and loss weights, with one call of the tokenizer for many chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

Encode = Callable[[Sequence[str]], list[list[int]]]

# what tokenizers strip beside a special token that swallows white space
SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


class Piece(NamedTuple):
    """A stretch of a rendered chat."""

    text: str
    weight: float  # of each of its tokens in the loss; 0: not learned
    control: bool  # template text: its special tokens are real; False: content, which is literal
    joins: bool = False  # tokenized together with the text before it; False: by itself


class Tokens(NamedTuple):
    """One sequence; weights[i] != 0 means that token i is a target (not shifted)."""

    ids: list[int]
    weights: list[float]


class Vocabulary(NamedTuple):
    """What tokenizing pieces needs of a tokenizer; made by tokenizer.vocabulary."""

    encode: Encode  # literal: no special token comes out; no space comes in front
    special: Mapping[str, int] = {}  # added tokens, real in control text
    content: frozenset[str] = frozenset()  # those of `special` that are real in content too, and so in no template
    bos_id: int | None = None
    encode_start: Encode | None = None  # for the start of a text, where the tokenizer puts a space there; None: as encode
    start_after_special: bool = False  # whether a text starts again after each special token
    strips: Mapping[int, tuple[bool, bool]] = {}  # special tokens that swallow the white space on their left, right


class Encoded(NamedTuple):
    tokens: Tokens
    lengths: list[int]  # tokens of each message; of text that runs over a border, with the message where it ends


def tokenize_chats(chats: Sequence[list[list[Piece]]], vocabulary: Vocabulary) -> list[Encoded]:
    """Tokenizes many rendered chats with one call of the vocabulary's encoder (two where it has a start form)."""
    table: list[list[int]] = []  # slot -> ids
    waiting: tuple[list[str], list[str]] = ([], [])  # texts for encode, encode_start
    slots: tuple[list[int], list[int]] = ([], [])
    known: dict[tuple[str | int, bool], int] = {}  # slots of control text, which comes again and again
    cut_control = lru_cache(maxsize=None)(lambda text: _parts(text, vocabulary, True))

    def slot_of(text: str | int, start: bool, constant: bool) -> int:
        slot = known.get((text, start)) if constant else None
        if slot is None:
            slot = len(table)
            table.append([text] if isinstance(text, int) else [])
            if not isinstance(text, int):
                waiting[start].append(text)
                slots[start].append(slot)
            if constant:
                known[text, start] = slot
        return slot

    plans = [_plan(chat, vocabulary, cut_control, slot_of) for chat in chats]
    for encode, texts, places in zip((vocabulary.encode, vocabulary.encode_start), waiting, slots, strict=True):
        for slot, ids in zip(places, encode(texts) if texts else (), strict=True):
            table[slot] = ids
    return [_assemble(plan, table) for plan in plans]


@lru_cache(maxsize=64)
def special_border(names: frozenset[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first, and keeps it when it splits."""
    return re.compile("(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")" if names else "((?!))")


def _parts(text: str, vocabulary: Vocabulary, control: bool) -> list[str | int]:
    """The text cut at its real special tokens, which become ids."""
    names = frozenset(vocabulary.special) if control else vocabulary.content
    parts = special_border(names).split(text)
    if control and not vocabulary.content.isdisjoint(parts[1::2]):
        used = ", ".join(sorted(vocabulary.content.intersection(parts[1::2])))
        raise ValueError(
            f"the chat template writes {used}, so content must not: a user could forge turns; take it off the tokens declared for content"
        )
    return [vocabulary.special[part] if i % 2 else part for i, part in enumerate(parts) if part]


def _plan(chat: list[list[Piece]], vocabulary: Vocabulary, cut_control: Callable, slot_of: Callable) -> list[list[tuple[int, float]]]:
    """For each message its units, as (slot, weight). A unit is text that is tokenized as one, or one special token."""
    has_start, after_special, strips = vocabulary.encode_start is not None, vocabulary.start_after_special, vocabulary.strips
    plan: list[list[tuple[int, float]]] = []
    held, weight, start, constant, strip = "", 0.0, has_start, True, False
    for pieces in chat:
        units: list[tuple[int, float]] = []
        plan.append(units)
        for text, new_weight, control, joins in pieces:
            if not joins:
                if held:
                    units.append((slot_of(held, start, constant), weight))
                    held, start, constant = "", False, True
                strip = False
            weight = new_weight
            for part in cut_control(text) if control else _parts(text, vocabulary, False) if vocabulary.content else (text,):
                if isinstance(part, str):
                    held += part.lstrip(SPACE) if strip and not held else part
                    strip, constant = strip and not held, constant and control
                    continue
                left, strip = strips.get(part, (False, False)) if strips else (False, False)
                held = held.rstrip(SPACE) if left else held
                if held:
                    units.append((slot_of(held, start, constant), weight))
                units.append((slot_of(part, False, True), weight))
                held, start, constant = "", has_start and after_special, True
    if held:
        plan[-1].append((slot_of(held, start, constant), weight))
    return plan


def _assemble(plan: list[list[tuple[int, float]]], table: list[list[int]]) -> Encoded:
    ids: list[int] = []
    weights: list[float] = []
    lengths = []
    for units in plan:
        before = len(ids)
        for slot, weight in units:
            part = table[slot]
            ids += part
            weights += [weight] * len(part)
        lengths.append(len(ids) - before)
    return Encoded(Tokens(ids, weights), lengths)


def tokenize_with_loss_mask(pieces: Sequence[Piece], vocabulary: Vocabulary) -> Tokens:
    """Ids and weights of rendered pieces."""
    return tokenize_chats([[list(pieces)]], vocabulary)[0].tokens


def show(tokens: Tokens, decode: Callable[[list[int]], str]) -> str:
    """The decoded sequence for a terminal: learned tokens green (yellow where the weight is not 1), the rest dim."""
    shown, at = [], 0
    while at < len(tokens.ids):
        weight, end = tokens.weights[at], at + 1
        while end < len(tokens.ids) and tokens.weights[end] == weight:
            end += 1
        colour = "2" if not weight else "32" if weight == 1 else "33"
        shown.append(f"\x1b[{colour}m{decode(tokens.ids[at:end])}\x1b[0m")
        at = end
    return "".join(shown)
