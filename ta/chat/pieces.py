"""Pieces of a rendered chat to token ids and loss weights, with one call of the tokenizer for many chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

Encode = Callable[[Sequence[str]], list[list[int]]]
Plan = list[list[tuple[int, float]]]  # for each message its units: (slot of its ids, weight)
GROUP = 128  # chats that are encoded by one call

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
    content: frozenset[str] = (
        frozenset()
    )  # those of `special` that are real in content too, and so in no template
    bos_id: int | None = None
    encode_start: Encode | None = (
        None  # for the start of a text, where the tokenizer puts a space there; None: as encode
    )
    start_after_special: bool = False  # whether a text starts again after each special token
    strips: Mapping[
        int, tuple[bool, bool]
    ] = {}  # special tokens that swallow the white space on their left, right


class Encoded(NamedTuple):
    tokens: Tokens
    lengths: list[
        int
    ]  # tokens of each message; of text that runs over a border, with the message where it ends


def tokenize_chats(chats: Iterable[list[list[Piece]]], vocabulary: Vocabulary) -> list[Encoded]:
    """Ids, weights and message lengths of rendered chats, which may come from a generator: while one group is encoded the next is made."""
    done: list[Encoded] = []
    ahead: tuple[Future, list[Plan]] | None = None
    chats = iter(chats)
    with ThreadPoolExecutor(1) as pool:
        while True:
            group = _Group(vocabulary)
            plans = [_plan(chat, group) for chat in islice(chats, GROUP)]
            running = (pool.submit(group.encode), plans) if plans else None
            if ahead:
                table = ahead[0].result()
                done += [_assemble(plan, table) for plan in ahead[1]]
            if not running:
                return done
            ahead = running


@lru_cache(maxsize=64)
def special_border(names: frozenset[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first, and keeps it when it splits."""
    return re.compile(
        "(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"
        if names
        else "((?!))"
    )


class _Group:
    """The distinct control texts and all content texts of some chats, each in a slot of a table that one call of the tokenizer fills."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.table: list[list[int]] = []  # slot -> ids
        self.texts: tuple[list[str], list[str]] = ([], [])  # for encode, encode_start
        self.slots: tuple[list[int], list[int]] = ([], [])
        self.known: dict[
            tuple[str | int, bool], int
        ] = {}  # slots of control text, which comes again and again
        self.control = frozenset(vocabulary.special)
        self.cut_control = lru_cache(maxsize=None)(self.cut_control)

    def slot(self, text: str | int, start: bool, constant: bool) -> int:
        """Where the ids of a text will stand (start: with the space a tokenizer begins a text with), or of a special token."""
        found = self.known.get((text, start)) if constant else None
        if found is None:
            found = len(self.table)
            self.table.append([text] if isinstance(text, int) else [])
            if not isinstance(text, int):
                self.texts[start].append(text)
                self.slots[start].append(found)
            if constant:
                self.known[text, start] = found
        return found

    def cut_control(self, text: str) -> list[str | int]:
        """Control text cut at its special tokens, which become ids."""
        parts = special_border(self.control).split(text)
        forged = self.vocabulary.content.intersection(parts[1::2])
        if forged:
            used = ", ".join(sorted(forged))
            raise ValueError(
                f"the chat template writes {used}: declared for content, it would let a user forge turns; take it off those tokens"
            )
        return self._ids(parts)

    def cut_content(self, text: str) -> list[str | int]:
        """Content cut at the tokens declared for content."""
        return self._ids(special_border(self.vocabulary.content).split(text))

    def _ids(self, parts: list[str]) -> list[str | int]:
        return [
            self.vocabulary.special[part] if i % 2 else part for i, part in enumerate(parts) if part
        ]

    def encode(self) -> list[list[int]]:
        for encode, texts, slots in zip(
            (self.vocabulary.encode, self.vocabulary.encode_start),
            self.texts,
            self.slots,
            strict=True,
        ):
            for slot, ids in zip(slots, encode(texts) if texts else (), strict=True):
                self.table[slot] = ids
        return self.table


def _plan(chat: list[list[Piece]], group: _Group) -> Plan:
    """The units of each message. A unit is text that is tokenized as one, or one special token."""
    vocabulary, slot_of = group.vocabulary, group.slot
    has_start, after_special, strips = (
        vocabulary.encode_start is not None,
        vocabulary.start_after_special,
        vocabulary.strips,
    )
    plan: Plan = []
    held, owner, weight, start, constant, strip = "", [], 0.0, has_start, True, False
    for pieces in chat:
        units: list[tuple[int, float]] = []
        plan.append(units)
        for text, new_weight, control, joins in pieces:
            if not joins:
                if held:
                    owner.append((slot_of(held, start, constant), weight))
                    held, start, constant = "", False, True
                strip = False
            weight = new_weight
            for part in (
                group.cut_control(text)
                if control
                else group.cut_content(text)
                if vocabulary.content
                else (text,)
            ):
                if isinstance(part, str):
                    held += part.lstrip(SPACE) if strip and not held else part
                    owner, strip, constant = units, strip and not held, constant and control
                    continue
                left, strip = strips.get(part, (False, False)) if strips else (False, False)
                held = held.rstrip(SPACE) if left else held
                if held:
                    owner.append((slot_of(held, start, constant), weight))
                units.append((slot_of(part, False, True), weight))
                held, start, constant = "", has_start and after_special, True
    if held:
        owner.append((slot_of(held, start, constant), weight))
    return plan


def _assemble(plan: Plan, table: list[list[int]]) -> Encoded:
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
