"""A chat rendered by its template, and the rendered chat as token ids with loss weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ta.chat.jinja import (
    NO_ARGUMENTS,
    Arguments,
    JinjaTemplate,
    Span,
    Writer,
    content_parts,
    plain_contents,
    special_pattern,
)
from ta.chat.messages import ANSWER, Chat, check_messages, message_weight
from ta.chat.template import Template, split_chat
from ta.printable import printable

Encode = Callable[[Sequence[str]], list[list[int]]]
Rendered = list[list["Piece"]]  # the pieces of each message, in order

# chats that are encoded by one call of the tokenizer
GROUP = 128
# weights of the messages of one skeleton that are remembered
FRAMES = 256
# equal tokens in a row that are shown as one with their number
RUN = 8

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
    # who wrote it, which decides the added tokens that are real in it: all in the template's text,
    # all but those of turns in an answer's, declared ones in anyone else's
    by: Writer
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
    # added tokens, real in the template's text
    special: Mapping[str, int] = {}
    # those of `special` that are real in what others write: declared ones
    content: frozenset[str] = frozenset()
    # those that are real in answers: all but those that would forge turns or pictures
    answer: frozenset[str] = frozenset()
    # for the start of a text, where the tokenizer puts a space there; None: as `encode`
    encode_start: Encode | None = None
    # whether a text starts again after each special token
    start_after_special: bool = False
    # special tokens that swallow the white space on their (left, right)
    strips: Mapping[int, tuple[bool, bool]] = {}
    # hash of the tokenizer, its added tokens included
    key: str = ""


class Tokenized(NamedTuple):
    """A rendered chat as tokens."""

    tokens: Tokens
    # tokens of each message; text that runs over a border counts with the message where it ends
    lengths: list[int]


# a text that the tokenizer encodes as a whole, and whether it may put a space in front
Run = tuple[str, bool]
# of a run over a border: what another message ends with, and its weight
Head = tuple[Run, float]
# (place of the message where it ends, special token or run, weight, head)
Unit = tuple[int, int | Run, float, Head | None]


def render_chat(
    messages: Chat,
    template: Template,
    weights: Sequence[float] | None = None,
    opened: bool = False,
    arguments: Arguments = NO_ARGUMENTS,
    notes: list[str] | None = None,
) -> Rendered:
    """The pieces of each message, in order; with `opened` one more list, the answer's prefix.

    `weights` has the loss weight of each message (`encode.loss_weights`). None: answers weigh 1
    and others 0, unless a message has a `loss` of its own. `arguments` are what the template is
    given beside the messages, such as {"tools": [...]}. `notes` gets a line for each thing that
    the template leaves out. ValueError: unknown role, a template that cannot write the chat or,
    where a message is learned, does not tell where it begins and ends.
    """
    check_messages(messages)
    if weights is None:
        weights = [message_weight(m, i, m["role"] == ANSWER) for i, m in enumerate(messages)]
    if len(weights) != len(messages) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights}: give one finite number for each message")
    plain = isinstance(template, JinjaTemplate) and plain_contents(
        messages, template, opened, arguments
    )
    if not plain:
        spans = split_chat(messages, template, opened, arguments, notes)
        return _in_pieces(spans, messages, template, weights)
    # the same but for contents: what is around them is written once
    skeleton, contents = plain
    key = tuple(weights)
    if key not in skeleton.frames:
        if len(skeleton.frames) >= FRAMES:
            skeleton.frames.clear()
        skeleton.frames[key] = _in_pieces(skeleton.spans, messages, template, weights)
    if notes is not None:
        notes += skeleton.notes
    rendered = [*map(list.copy, skeleton.frames[key])]
    filled = zip(skeleton.spans, rendered, contents, messages, strict=False)
    for span, pieces, content, message in filled:
        at = len(span.prefix) + len(span.body) - 1
        _, weight, by, joins = pieces[at]
        pieces[at] = Piece(content, weight, by, joins)
        if "parts" in message:
            pieces[at : at + 1] = [
                Piece(text, weight if who == by else 0.0, who, joins or n > 0)
                for n, (text, who, _) in enumerate(content_parts(content, message["parts"], by))
            ]
    return rendered


def _in_pieces(
    spans: Sequence[Span], messages: Chat, template: Template, weights: Sequence[float]
) -> Rendered:
    glued = isinstance(template, JinjaTemplate)
    rendered, border = [], False
    roles = [*(message["role"] for message in messages), ANSWER]
    written = zip(spans, roles, [*weights, 0.0], strict=False)
    for i, (span, role, weight) in enumerate(written):
        if weight and span.fault:
            raise ValueError(
                f"message {i + 1} ({role}) is to be learned, but the chat template does not show "
                f"what of it the model writes: {span.fault}"
            )
        # an answer stands apart, learned or not: training ids begin with the ids of its prompt
        apart = role == ANSWER or weight != 0
        pieces, joins, before = [], glued and not border, None
        for text, by, _ in span.prefix:
            pieces.append(Piece(text, 0.0, by, joins))
            joins = glued
        joins, border = glued and not apart, apart
        for text, by, owner in (*span.body, (span.suffix, "template", None)):
            if text:
                own = weight if owner is None else weights[owner]
                joins, before = joins and owner == before, owner
                pieces.append(Piece(text, 0.0 if by == "media" else own, by, joins))
                joins, border = glued, border or owner is not None
        rendered.append(pieces)
        if border and glued and template.special.search(span.suffix):
            # the token that ends an answer keeps it apart
            border = False
    return rendered


def tokenize_with_loss_mask(rendered: Rendered, vocabulary: Vocabulary) -> Tokens:
    """Token ids and loss weights of a chat that `render_chat` has rendered."""
    return tokenize_chats([rendered], vocabulary)[0].tokens


def tokenize_chats(chats: Sequence[Rendered], vocabulary: Vocabulary) -> list[Tokenized]:
    """Ids, loss weights and message lengths of rendered chats, in order."""
    known: dict[str, list[int | str]] = {}
    done = []
    for start in range(0, len(chats), GROUP):
        group = chats[start : start + GROUP]
        runs: dict[Run, list[int]] = {}
        units = [_units(chat, vocabulary, known, runs) for chat in group]
        for starts, encode in ((False, vocabulary.encode), (True, vocabulary.encode_start)):
            keys = [run for run in runs if run[1] == starts]
            if keys:
                runs |= zip(keys, encode([text for text, _ in keys]), strict=True)
        done += [_join(chat, len(pieces), runs) for chat, pieces in zip(units, group, strict=True)]
    return done


def _units(
    chat: Rendered,
    vocabulary: Vocabulary,
    known: dict[str, list[int | str]],
    runs: dict[Run, list[int]],
) -> list[Unit]:
    """The chat cut where the tokenizer must not merge: at special tokens and between pieces.

    `known` remembers how control texts are split; `runs` gets each run that is to be encoded.
    """
    units: list[Unit] = []
    spaced = vocabulary.encode_start is not None
    text, message, weight, starts_text, strip, head = "", 0, 0.0, spaced, False, None

    def end_run() -> None:
        run = text, starts_text
        runs[run] = []
        units.append((message, run, weight, head))

    for i, pieces in enumerate(chat):
        for piece in pieces:
            if not piece.joins:
                if text:
                    end_run()
                    text, starts_text, head = "", False, None
                strip = False
            for part in _split_special(piece, vocabulary, known):
                if isinstance(part, str):
                    if text and piece.weight != weight:
                        head = (text, starts_text), weight
                        runs[text, starts_text] = []
                    text += part.lstrip(SPACE) if strip and not text else part
                    message, weight, strip = i, piece.weight, strip and not text
                    continue
                strip_left, strip = vocabulary.strips.get(part, (False, False))
                text = text.rstrip(SPACE) if strip_left else text
                if text:
                    end_run()
                units.append((i, part, piece.weight, None))
                text, starts_text, head = "", spaced and vocabulary.start_after_special, None
    if text:
        end_run()
    return units


def _split_special(
    piece: Piece, vocabulary: Vocabulary, known: dict[str, list[int | str]]
) -> list[int | str]:
    """The piece's text cut at the special tokens that are real in it, which become ids."""
    control = piece.by in ("template", "media")
    if not piece.text:
        return []
    if control and piece.text in known:
        return known[piece.text]
    names = vocabulary.answer if piece.by == "answer" else vocabulary.content
    names = frozenset(vocabulary.special) if control else names
    if not names:
        return [piece.text]
    parts = special_pattern(names).split(piece.text)
    cut = [vocabulary.special[part] if i % 2 else part for i, part in enumerate(parts) if part]
    if control:
        known[piece.text] = cut
    return cut


def _join(units: list[Unit], messages: int, runs: Mapping[Run, list[int]]) -> Tokenized:
    ids, weights = tokens = Tokens([], [])
    lengths = [0] * messages
    for message, token, weight, head in units:
        if isinstance(token, int):
            ids.append(token)
            weights.append(weight)
            lengths[message] += 1
            continue
        part = runs[token]
        size = len(part)
        ids += part
        weights += [weight] * size
        lengths[message] += size
        # where no token stands on both sides of the border, each side has its own weight
        before = runs[head[0]] if head else []
        if before and part[: len(before)] == before:
            begin = len(ids) - size
            weights[begin : begin + len(before)] = [head[1]] * len(before)
    return Tokenized(tokens, lengths)


def spans(
    tokens: Tokens,
    decode: Callable[[list[int]], str],
    most: int = 0,
    files: Mapping[int, Iterator[str]] = {},
) -> list[tuple[str, float]]:
    """The decoded sequence in stretches of one weight: (text, weight).

    A run of RUN equal tokens or more is one text with its number, with the name of its file where
    `files` has names for the token. With `most`, the middle of a longer sequence is left out and
    counted.
    """
    pairs = list(zip(*tokens, strict=True))
    if 0 < most < len(pairs):
        half, rest = most // 2, len(pairs) - most
        learned = sum(map(bool, tokens.weights[half : half + rest]))
        cut = (f" … {rest:,} tokens, {learned:,} of them learned … ", 0.0)
        ends = (pairs[:half], pairs[half + rest :])
        first, last = (spans(Tokens(*zip(*end, strict=True)), decode, files=files) for end in ends)
        return [*first, cut, *last]
    found: list[tuple[str, float]] = []
    for weight, stretch in groupby(pairs, key=lambda pair: pair[1]):
        text, plain = "", []
        for token, run in groupby(i for i, _ in stretch):
            count = len(list(run))
            if count < RUN:
                plain += [token] * count
                continue
            name = next(files.get(token, iter(())), decode([token]))
            text += (decode(plain) if plain else "") + f"[{name}, {count:,} tokens]"
            plain = []
        found.append((text + (decode(plain) if plain else ""), weight))
    return found


def show(found: list[tuple[str, float]]) -> str:
    """Spans for a terminal: learned ones green (yellow where the weight is not 1), others dim."""
    colour = lambda weight: "2" if not weight else "32" if weight == 1 else "33"
    return "".join(f"\x1b[{colour(weight)}m{printable(text)}\x1b[0m" for text, weight in found)
