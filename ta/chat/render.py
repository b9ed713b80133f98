"""A chat rendered by its template, and the rendered chat as token ids with loss weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from ta.chat.messages import ANSWER, Chat, message_weight
from ta.chat.template import JinjaTemplate, Span, Template, split_chat

Encode = Callable[[Sequence[str]], list[list[int]]]
Parts = Sequence[tuple[str, bool]]  # a content cut into (text, whether it is placeholders of media)
Rendered = list[list["Piece"]]  # the pieces of each message, in order

# chats that are encoded by one call of the tokenizer
GROUP = 128

# what tokenizers strip beside a special token that swallows white space
SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


class Piece(NamedTuple):
    """A stretch of a rendered chat."""

    text: str
    # of each of its tokens in the loss; 0: not learned
    weight: float
    # template text, whose special tokens are real; False: content, which is literal
    control: bool
    # tokenized together with the text before it; False: by itself
    joins: bool = False


class Tokens(NamedTuple):
    """One sequence; weights[i] != 0 means that token i is a target (not shifted)."""

    ids: list[int]
    weights: list[float]


class Vocabulary(NamedTuple):
    """What tokenizing pieces needs of a tokenizer; made by `tokenizer.vocabulary`."""

    # literal: no special token comes out, and no space comes in front
    encode: Encode
    # added tokens, real in control text
    special: Mapping[str, int] = {}
    # those of `special` that are real in content too, and therefore stand in no template
    content: frozenset[str] = frozenset()
    bos_id: int | None = None
    # for the start of a text, where the tokenizer puts a space there; None: as `encode`
    encode_start: Encode | None = None
    # whether a text starts again after each special token
    start_after_special: bool = False
    # special tokens that swallow the white space on their (left, right)
    strips: Mapping[int, tuple[bool, bool]] = {}


class Tokenized(NamedTuple):
    """A rendered chat as tokens."""

    tokens: Tokens
    # tokens of each message; text that runs over a border counts with the message where it ends
    lengths: list[int]


class Unit(NamedTuple):
    """One special token, or a run of text that the tokenizer encodes as a whole."""

    # place of the message where it ends
    message: int
    token: int | str
    weight: float
    # the tokenizer may put a space in front
    starts_text: bool = False


def render_chat(
    messages: Chat,
    template: Template,
    weights: Sequence[float] | None = None,
    opened: bool = False,
) -> Rendered:
    """The pieces of each message, in order; with `opened` one more list, the answer's prefix.

    `weights` has the loss weight of each message (`encode.loss_weights`). None: answers weigh 1
    and others 0, unless a message has a `loss` of its own. ValueError: unknown role, a template
    that cannot write the chat or, where a message is learned, does not tell where it begins and
    ends.
    """
    if weights is None:
        weights = [message_weight(m, i, m["role"] == ANSWER) for i, m in enumerate(messages)]
    glued = isinstance(template, JinjaTemplate)
    spans = split_chat(messages, template, opened)
    rendered, border = [], False
    for i, span in enumerate(spans):
        role, weight, parts = ANSWER, 0.0, ()
        if i < len(messages):
            role, weight, parts = messages[i]["role"], weights[i], messages[i].get("parts", ())
        if weight and span.fault:
            raise ValueError(
                f"message {i + 1} ({role}) is to be learned, but the chat template does not tell "
                f"its borders: {span.fault}"
            )
        # an answer stands apart, learned or not: training ids begin with the ids of its prompt
        apart = role == ANSWER or weight != 0
        rendered.append(
            _pieces(span, weight, glued, glued and not border, glued and not apart, parts)
        )
        border = apart
    return rendered


def _pieces(
    span: Span, weight: float, glued: bool, prefix_joins: bool, joins: bool, parts: Parts
) -> list[Piece]:
    pieces = [Piece(span.prefix, 0.0, True, prefix_joins)] if span.prefix else []
    for text, own, control in (
        (span.opening, weight, True),
        *_content(span.content, weight, parts),
        (span.suffix, weight, True),
    ):
        if text:
            pieces.append(Piece(text, own, control, joins))
            joins = glued
    return pieces


def _content(content: str, weight: float, parts: Parts) -> list[tuple[str, float, bool]]:
    """(text, weight, control) of a message's content.

    Placeholders of media are real tokens and never learned; the rest is literal.
    """
    if not parts:
        return [(content, weight, False)]
    # a template may have stripped the content
    at = "".join(text for text, _ in parts).index(content)
    cut = []
    for text, media in parts:
        stays = text[max(at, 0) : max(at + len(content), 0)]
        cut.append((stays, 0.0 if media else weight, media))
        at -= len(text)
    return cut


def tokenize_with_loss_mask(rendered: Rendered, vocabulary: Vocabulary) -> Tokens:
    """Token ids and loss weights of a chat that `render_chat` has rendered."""
    return tokenize_chats([rendered], vocabulary)[0].tokens


def tokenize_chats(chats: Sequence[Rendered], vocabulary: Vocabulary) -> list[Tokenized]:
    """Ids, loss weights and message lengths of rendered chats, in order."""
    known: dict[str, list[int | str]] = {}
    done = []
    for start in range(0, len(chats), GROUP):
        group = chats[start : start + GROUP]
        units = [list(_units(chat, vocabulary, known)) for chat in group]
        ids = _encode_texts(units, vocabulary)
        done += [
            _join(chat, len(messages), ids) for chat, messages in zip(units, group, strict=True)
        ]
    return done


def _encode_texts(
    units: list[list[Unit]], vocabulary: Vocabulary
) -> dict[tuple[str, bool], list[int]]:
    """The ids of each distinct (text, whether it starts a text) of some chats."""
    texts = dict.fromkeys(
        (unit.token, unit.starts_text)
        for chat in units
        for unit in chat
        if isinstance(unit.token, str)
    )
    ids: dict[tuple[str, bool], list[int]] = {}
    for starts, encode in ((False, vocabulary.encode), (True, vocabulary.encode_start)):
        keys = [key for key in texts if key[1] == starts]
        if keys:
            ids |= zip(keys, encode([text for text, _ in keys]), strict=True)
    return ids


def _units(
    chat: Rendered, vocabulary: Vocabulary, known: dict[str, list[int | str]]
) -> Iterator[Unit]:
    """The chat cut where the tokenizer must not merge: at special tokens and between pieces.

    `known` remembers how control texts are split.
    """
    spaced = vocabulary.encode_start is not None
    text, message, weight, starts_text, strip = "", 0, 0.0, spaced, False
    for i, pieces in enumerate(chat):
        for piece in pieces:
            if not piece.joins:
                if text:
                    yield Unit(message, text, weight, starts_text)
                    text, starts_text = "", False
                strip = False
            weight = piece.weight
            for part in _split_special(piece, vocabulary, known):
                if isinstance(part, str):
                    text += part.lstrip(SPACE) if strip and not text else part
                    message, strip = i, strip and not text
                    continue
                strip_left, strip = vocabulary.strips.get(part, (False, False))
                text = text.rstrip(SPACE) if strip_left else text
                if text:
                    yield Unit(message, text, weight, starts_text)
                yield Unit(i, part, weight)
                text, starts_text = "", spaced and vocabulary.start_after_special
    if text:
        yield Unit(message, text, weight, starts_text)


def _split_special(
    piece: Piece, vocabulary: Vocabulary, known: dict[str, list[int | str]]
) -> list[int | str]:
    """The piece's text cut at the special tokens that are real in it, which become ids."""
    if not piece.control and not vocabulary.content:
        return [piece.text]
    if piece.control and piece.text in known:
        return known[piece.text]
    names = frozenset(vocabulary.special) if piece.control else vocabulary.content
    parts = special_border(names).split(piece.text)
    if piece.control and (forged := vocabulary.content.intersection(parts[1::2])):
        raise ValueError(
            f"the chat template writes {', '.join(sorted(forged))}: declared for content, it would "
            "let a user forge turns; take it off those tokens"
        )
    cut = [vocabulary.special[part] if i % 2 else part for i, part in enumerate(parts) if part]
    if piece.control:
        known[piece.text] = cut
    return cut


@lru_cache(maxsize=64)
def special_border(names: frozenset[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest first, and keeps it when it splits."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if names else "((?!))")


def _join(units: list[Unit], messages: int, ids: dict[tuple[str, bool], list[int]]) -> Tokenized:
    tokens = Tokens([], [])
    lengths = [0] * messages
    for message, token, weight, starts_text in units:
        part = [token] if isinstance(token, int) else ids[token, starts_text]
        tokens.ids.extend(part)
        tokens.weights.extend([weight] * len(part))
        lengths[message] += len(part)
    return Tokenized(tokens, lengths)


def show(tokens: Tokens, decode: Callable[[list[int]], str]) -> str:
    """The decoded sequence for a terminal.

    Learned tokens are green (yellow where the weight is not 1), the rest is dim.
    """
    shown, at = [], 0
    while at < len(tokens.ids):
        weight, end = tokens.weights[at], at + 1
        while end < len(tokens.ids) and tokens.weights[end] == weight:
            end += 1
        colour = "2" if not weight else "32" if weight == 1 else "33"
        shown.append(f"\x1b[{colour}m{decode(tokens.ids[at:end])}\x1b[0m")
        at = end
    return "".join(shown)
