"""A tokenizer's own chat template: what it writes of a chat, and what of that the model writes.

The chat is written twice, plain and with a mark around each of its texts (`marks`). What stands
between two marks is template text. Where in it a turn ends and an answer begins is what the
template writes of the beginning of the chat alone, with and without a generation prompt.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import Any, Literal, NamedTuple

from ta.chat.marks import Label, Pattern, mark_chat, read_marks
from ta.chat.messages import ANSWER, REASONING, SYSTEM, Chat, Message

Tags = Mapping[str, str]  # role -> the template's name for it
# what a template is given beside the messages: tools, documents, and arguments of its own
Arguments = Mapping[str, Any]
# (messages, add_generation_prompt, arguments) -> text; ValueError where the template refuses
Render = Callable[[Chat, bool, Arguments], str]

DEFAULT_TAGS = {role: role for role in (SYSTEM, "developer", "user", ANSWER, "tool")}
# keys of a message that are ours, not the template's
OURS = ("loss", "disable_loss", "type", "parts")
PLAIN = {"role", "content"}.union(OURS)
# tags that templates look for in texts, beside the tokenizer's own tokens
TAGS = ("<think>", "</think>", "<tool_response>", "</tool_response>")
# where marks are put, in the order they are tried: depth in answers, in others, names of functions
WAYS = (
    (1, 0, True),
    (1, 1, True),
    (0, 0, True),
    (0, 1, True),
    (2, 2, True),
    (1, 0, False),
    (0, 0, False),
    (2, 2, False),
)
NO_ARGUMENTS: Arguments = {}
# what a cache of texts holds before it starts again
MEMORY = 4096


# the template; the model, as text of an answer; anyone else; placeholders of pictures and sounds
Writer = Literal["template", "answer", "other", "media"]


class Part(NamedTuple):
    """A stretch of what a template writes."""

    text: str
    by: Writer
    # the answer it belongs to where it stands behind a later message; None: that of its span
    owner: int | None = None


class Span(NamedTuple):
    """One message as the template writes it: prefix + body + suffix."""

    prefix: tuple[Part, ...]  # never learned; for an answer it ends where generation starts
    body: tuple[Part, ...]  # the message's text, and the template's in between
    suffix: str  # the template's text from there to the end of the turn
    fault: str = ""  # why this message cannot be learned: its borders are not known


class Skeleton(NamedTuple):
    """What a template writes around the contents of n messages that have nothing else."""

    texts: tuple[str, ...]  # n + 1: before each content, and after the last
    spans: list[Span]  # one a message, whose body ends in its content; and the opened answer
    notes: list[str]
    frames: dict  # the caller's own, by what its messages weigh


class Border(NamedTuple):
    """Where a turn ends and the next begins, in the text between two marks."""

    end: int
    open: int
    end_fault: str = ""  # why the end is a guess
    open_fault: str = ""
    note: str = ""


class JinjaTemplate(NamedTuple):
    """A tokenizer's own chat template."""

    render: Render
    role_tags: Tags
    source: str
    # finds the tokenizer's tokens in a text, and keeps them when it splits
    special: Pattern
    # the same with the tags that templates look for
    special_or_tags: Pattern
    # roles and whether an answer is opened -> Skeleton, or None where there is none
    skeletons: dict[tuple, Skeleton | None]
    borders: dict[tuple, Border]
    # what the generation prompt writes behind a question, by arguments
    opening: Callable[[str], str]
    # of each key of reasoning that the template does not read, the one that it reads
    reasoning_keys: Mapping[str, str]


def jinja_template(
    render: Render, special: Iterable[str], source: str, tags: Tags
) -> JinjaTemplate:
    """A tokenizer's chat template.

    `special` are its added tokens. `tags` has the roles known, each with the name that the template
    is given for it.
    """
    names = frozenset(name for name in special if name.strip(" \n\t\u2581"))
    pattern = special_pattern(names)

    @lru_cache(maxsize=64)
    def opening(arguments: str) -> str:
        question = [{"role": tags.get("user", "user"), "content": "x"}]
        try:
            asked, opened = (render(question, ask, json.loads(arguments)) for ask in (False, True))
        except ValueError:
            return ""
        if opened.startswith(asked):
            return opened[len(asked) :]
        return opened[_common_parts(asked, opened, pattern) :]

    read = [key for key in REASONING if re.search(rf"\.{key}\b|(['\"]){key}\1", source)]
    keys = {key: read[0] for key in REASONING if read and key not in read}
    tokens = special_pattern(names.union(TAGS))
    return JinjaTemplate(render, tags, source, pattern, tokens, {}, {}, opening, keys)


@lru_cache(maxsize=64)
def _reads(source: str) -> frozenset[str]:
    """The names of the arguments that a template reads."""
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template(source)
    return frozenset(find_undeclared_variables(compiled.environment.parse(source)))


@lru_cache(maxsize=64)
def special_pattern(names: frozenset[str]) -> Pattern:
    """Finds any of the names, the longest first, and keeps it when it splits."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if names else "((?!))")


def split_jinja(
    messages: Chat,
    template: JinjaTemplate,
    opened: bool,
    arguments: Arguments,
    notes: list[str],
) -> list[Span]:
    """One Span a message, and one more for the opened answer if `opened`.

    `notes` gets a line for each thing that the template leaves out or writes otherwise. ValueError
    where the template cannot write the chat, or leaves out what a message says.
    """
    given = [_given(message, template.role_tags) for message in messages]
    for key, own in template.reasoning_keys.items():
        if any(key in message for message in given):
            notes.append(f"{key} is given to the chat template as {own}, which it reads")
            given = [{own if k == key else k: v for k, v in m.items()} for m in given]
    unread = [name for name in arguments if name not in _reads(template.source)]
    error = None
    for spelled, how in _spellings(given):
        found: list[str] = []
        try:
            spans = _split(spelled, messages, template, opened, arguments, found)
        except ValueError as refused:
            error = error or refused
            continue
        notes += [f"{name} of the record is not read by the chat template" for name in unread]
        notes += [how] * bool(how) + found
        return spans
    raise error


def _given(message: Message, tags: Tags) -> Message:
    """The message as the template gets it: without what is ours, with its own name of the role."""
    if len(message) == 2 and tags[message["role"]] == message["role"]:
        return message
    return {k: v for k, v in message.items() if k not in OURS} | {"role": tags[message["role"]]}


def _spellings(given: list[Message]) -> Iterator[tuple[list[Message], str]]:
    """The messages as they are; then, for templates that take only those, other spellings."""
    yield given, ""
    empty = "empty content beside calls is {}, because the chat template takes no other"
    absent = lambda m: {k: v for k, v in m.items() if k != "content" or v}
    beside_calls = {
        "arguments of calls are given to the template as objects": partial(_with_calls, _parsed),
        "arguments of calls are given to the template as text": partial(_with_calls, _dumped),
        empty.format("left out"): absent,
        empty.format('""'): lambda m: {**m, "content": m.get("content") or ""},
        empty.format("null"): lambda m: {**m, "content": m.get("content") or None},
    }
    for how, change in beside_calls.items():
        spelled = [change(m) if m.get("tool_calls") else m for m in given]
        if spelled != given:
            yield spelled, how
    parts = lambda text: [{"type": "text", "text": text}] if isinstance(text, str) else text
    spelled = [{**m, "content": parts(m.get("content"))} for m in given]
    if spelled != given:
        yield (
            spelled,
            "contents are given to the template as lists of parts, because it takes no text",
        )


def _with_calls(change: Callable[[Any], Any], message: Message) -> Message:
    """A message with other arguments of its tool calls."""
    return message | {"tool_calls": [_call_with(call, change) for call in message["tool_calls"]]}


def _call_with(call: dict, change: Callable[[Any], Any]) -> dict:
    """A tool call with other arguments."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _call_with(inner, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _parsed(value: Any) -> Any:
    with suppress(ValueError, TypeError):
        return json.loads(value)
    return value


def _dumped(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def plain_contents(
    messages: Chat, template: JinjaTemplate, opened: bool, arguments: Arguments
) -> tuple[Skeleton, list[str]] | None:
    """The skeleton of messages that have contents only, and the contents as they are written.

    None for other messages, and where the template looks at contents.
    """
    roles = tuple([message["role"] for message in messages])
    if arguments or not template.role_tags.keys() >= {*roles}:
        return None
    for message in messages:
        if not isinstance(message.get("content"), str) or not message.keys() <= PLAIN:
            return None
    key, skeletons = (roles, opened), template.skeletons
    if key not in skeletons:
        if len(skeletons) >= MEMORY:
            skeletons.clear()
        skeletons[key] = None
        with suppress(ValueError):
            skeletons[key] = _skeleton(roles, template, opened)
    if (skeleton := skeletons[key]) is None:
        return None
    given = [_given(message, template.role_tags) for message in messages]
    contents = _contents(template.render(given, opened, {}), skeleton.texts, given)
    return contents and (skeleton, contents)


def _skeleton(roles: tuple[str, ...], template: JinjaTemplate, opened: bool) -> Skeleton:
    given = [{"role": template.role_tags[role], "content": "x"} for role in roles]
    named = [{"role": role, "content": "x"} for role in roles]
    notes: list[str] = []
    spans = _split(given, named, template, opened, {}, notes)
    texts = [""]
    for i, (prefix, body, suffix, _) in enumerate(spans):
        *around, content = *prefix, *body, Part("", "other")
        if i < len(roles):
            *around, content = around
        if content.by == "template" or any(part.by != "template" for part in around):
            raise ValueError("the contents do not stand one behind another")
        texts[-1] += "".join([part.text for part in around])
        texts += [suffix] * (i < len(roles))
    return Skeleton(tuple(texts), spans, notes, {})


def _contents(text: str, texts: tuple[str, ...], messages: Chat) -> list[str] | None:
    """The contents as the template wrote them, as they are or stripped.

    None where the text is not texts and contents in turn.
    """
    if not text.startswith(texts[0]):
        return None
    at, found = len(texts[0]), []
    for message, rest in zip(messages, texts[1:], strict=True):
        form = content = message["content"]
        if not text.startswith(content + rest, at):
            forms = (content.lstrip(), content.rstrip(), content.strip())
            form = next((form for form in forms if text.startswith(form + rest, at)), None)
            if form is None:
                return None
        found.append(form)
        at += len(form) + len(rest)
    return found if at == len(text) else None


def content_parts(content: str, parts: Sequence | None, by: Writer) -> tuple[Part, ...]:
    """A content as parts; `parts` are its (text, whether it is placeholders of media)."""
    if not parts:
        return (Part(content, by),)
    # a template may have stripped the content
    at = "".join(text for text, _ in parts).index(content)
    cut = []
    for text, media in parts:
        stays = text[max(at, 0) : max(at + len(content), 0)]
        cut += [Part(stays, "media" if media else by)] if stays else []
        at -= len(text)
    return tuple(cut)


class Place(NamedTuple):
    """Where a marked text stands in what the template wrote."""

    # between its marks
    start: int
    stop: int
    number: int
    label: Label
    # it stands nowhere else, and so tells where its message is
    once: bool
    # the message it stands with: its own, or a later one that is written before it
    home: int
    # with what stands beside it in the same text of the chat
    left: int
    right: int


class Marked(NamedTuple):
    """A chat with marks around its texts, as the template is given it, and what it writes of it."""

    roles: tuple[str, ...]
    messages: list[Message]
    arguments: Arguments
    labels: list[Label]
    # of each message that has pictures or sounds, its parts
    media: Mapping[int, Sequence]
    template: JinjaTemplate
    opened: bool
    # the template's own arguments as JSON
    key: str
    # without marks, and where the marked texts stand in it
    text: str
    places: list[Place]


def _split(
    given: list[Message],
    messages: Chat,
    template: JinjaTemplate,
    opened: bool,
    arguments: Arguments,
    notes: list[str],
) -> list[Span]:
    """The spans of messages in one spelling, `given`.

    They are found by marks that change nothing of the text that the template writes. Some templates
    look at how a text begins or ends, some take it apart: marks stand around the whole of it,
    behind tokens and tags, or further inside.
    """
    text = template.render(given, opened, arguments)
    null = "None" in text and any(message.get("content", "") is None for message in given)
    if null and "None" not in json.dumps([given, arguments]) + template.source:
        raise ValueError("the chat template writes null content as the word None")
    roles = tuple(message["role"] for message in messages)
    media = {i: message["parts"] for i, message in enumerate(messages) if "parts" in message}
    own = {name: value for name, value in arguments.items() if name not in ("tools", "documents")}
    key = json.dumps(own, sort_keys=True)

    def mark(depths: dict[int, int], names: bool) -> Marked | None:
        marked, values, labels = mark_chat(
            given, arguments, template.special_or_tags, depths, names
        )
        try:
            written = read_marks(template.render(marked, opened, values))
        except ValueError:
            return None
        if written.broken or written.text != text:
            return None
        places = _places(labels, written.places, text, template.special_or_tags)
        return Marked(roles, marked, values, labels, media, template, opened, key, text, places)

    for answers, others, names in WAYS:
        depths = {i: answers if role == ANSWER else others for i, role in enumerate(roles)}
        if chat := mark(depths | dict.fromkeys(media, 0), names):
            break
    else:
        alone = lambda i: any(mark({i: depth}, False) for depth in (0, 1, 2))
        place = next((i for i in range(len(given)) if not alone(i)), 0)
        raise ValueError(
            f"message {place + 1} ({roles[place]}) cannot be split faithfully: the tokenizer's "
            "chat template changes its text or writes it depending on it; give --prefix-template, "
            "--suffix-template and --role-tags instead of the tokenizer's own template"
        )
    ends, begins, faults = _turns(chat, notes)
    _note_left_out(chat, faults, notes)
    return _spans(chat, ends, begins, faults)


def _places(
    labels: Sequence[Label],
    found: Mapping[int, list[tuple[int, int]]],
    text: str,
    special: Pattern,
) -> list[Place]:
    """The places of the marked texts in `text`, in order."""
    places, end, home = [], 0, -1
    for start, stop, k in sorted((*span, k) for k, spans in found.items() for span in spans):
        label = labels[k]
        before = [piece[::-1] for piece in reversed(special.split(label.before))]
        left = start - _matched_length(text[end:start][::-1], before)
        right = stop + _matched_length(
            text[stop : stop + len(label.after)], special.split(label.after)
        )
        once = len(found[k]) == 1
        home = max(home, label.message) if once else home
        places.append(Place(start, stop, k, label, once, home, left, right))
        end = right
    return places


def _matched_length(text: str, pieces: Sequence[str]) -> int:
    """How much of `text` the pieces are that it begins with; white space may be stripped."""
    at = 0
    for piece in pieces:
        if not text.startswith(piece, at):
            stays = piece if piece.isspace() else ""
            while not text.startswith(stays, at):
                stays = stays[:-1]
            return at + len(stays)
        at += len(piece)
    return at


def _note_left_out(chat: Marked, faults: list[str], notes: list[str]) -> None:
    """Put into `faults` which answers cannot be learned, because the template leaves out a call.

    A note says where reasoning is left out, or a remark beside calls. ValueError for a message
    whose content is left out, or written twice.
    """
    once = {place.number: place.once for place in chat.places}
    # of each text, whether its marks stand there once (True), more often (False), nowhere (None)
    texts: dict[tuple[int, str, int], set[bool | None]] = {}
    for number, label in enumerate(chat.labels):
        if label.message >= 0:
            texts.setdefault(label[:3], set()).add(once.get(number))
    speak = {place.label.message for place in chat.places}
    for (i, field, call), found in texts.items():
        who, role = f"message {i + 1} ({chat.roles[i]})", chat.roles[i]
        absent = found == {None}
        if field == "content" and False in found:
            raise ValueError(f"the chat template writes {who} twice")
        if None not in found:
            continue
        if field == "calls" and absent:
            faults[i] = f"it leaves out tool call {call + 1}"
            notes.append("a tool call of an answer that is not learned is left out by the template")
        elif field == "content" and absent:
            if role != SYSTEM and (role != ANSWER or i not in speak):
                raise ValueError(f"the chat template writes {who} not at all, or not in its place")
            notes.append(
                "the system message is left out by the chat template"
                if role == SYSTEM
                else "the content of an answer with calls is left out by the template"
            )
        elif field in ("content", "reasoning"):
            notes.append(_note_of_reasoning(chat, i))


def _note_of_reasoning(chat: Marked, i: int) -> str:
    """What to say of an answer whose reasoning is left out."""
    key = next((k for k in REASONING if k in chat.messages[i]), "reasoning in the content")
    if ANSWER in chat.roles[i + 1 :]:
        return (
            f"{key} of an earlier answer is left out, as the chat template does when more "
            "follows (--split-turns trains each answer as it is generated)"
        )
    return f"{key} of the last answer is not written by the chat template"


def _turns(chat: Marked, notes: list[str]) -> tuple[list[int], list[int], list[str]]:
    """Where each message ends, where each begins, and why it cannot be learned, or "".

    An answer begins where the generation prompt ends, another message at its text.
    """
    count, size = len(chat.roles), len(chat.text)
    own = [place for place in chat.places if place.once and place.label.message >= 0]
    homes = [place.home for place in own]
    ends, begins, faults = [], [], []
    for i in range(count + chat.opened):
        at = bisect_left(homes, i)
        anchor = own[at - 1] if at else None
        start, stop = anchor.stop if anchor else 0, own[at].start if at < len(own) else size
        border = _border(chat, i, anchor, chat.text[start:stop])
        notes += [border.note] * bool(border.note)
        if i:
            ends.append(start + border.end)
            faults[-1] = faults[-1] or border.end_fault
        begin = start + border.open
        if i < count and chat.roles[i] != ANSWER:
            begin = own[at].left if i in homes[at : at + 1] else size
        begins.append(begin)
        faults.append(border.open_fault)
    ends = list(accumulate(ends if chat.opened else [*ends, size], max))
    both = zip(begins, [0, *ends], ends, strict=False)
    begins = [min(max(begin, before), end) for begin, before, end in both]
    for i in _out_of_place(chat, own, ends, begins):
        faults[i] = faults[i] or "its text and another message's stand in each other"
    return ends, begins, faults[:count]


def _out_of_place(
    chat: Marked, own: list[Place], ends: list[int], begins: list[int]
) -> Iterator[int]:
    """The messages with a text in another one, and these others."""
    begun = {place.home for place in own if place.home == place.label.message}
    # the role of the message in which a text stands, "" in an answer that is opened
    roles = [*chat.roles, ""]
    for place in own:
        i, there = place.label.message, bisect_right(ends, place.start)
        answer = roles[i] == ANSWER
        if i == there:
            fits = not answer or place.start >= begins[i]
        else:
            # what an answer says beside its calls may stand behind what they gave
            fits = answer and i in begun and roles[there] not in (ANSWER, "")
        if there != place.home or not fits:
            yield from (i, there)


def _border(chat: Marked, i: int, anchor: Place | None, gap: str) -> Border:
    """Where messages i - 1 and i meet in `gap`, the text from the mark before i to the next one."""
    first = anchor.label.message if anchor else 0
    fields = tuple(
        tuple(name for name, value in message.items() if value)
        for message in chat.messages[first : i + 1]
    )
    borders = chat.template.borders
    key = (chat.roles[first : i + 1], i - first, fields, gap, chat.key)
    if key not in borders:
        if len(borders) >= MEMORY:
            borders.clear()
        # what the last question and the last answer show, the whole beginning mostly shows too
        asked, answered = (
            max((k for k in range(i) if chat.roles[k] == role), default=0)
            for role in ("user", ANSWER)
        )
        head = [0] if asked and chat.roles[0] == SYSTEM else []
        short = [*head, asked, *range(max(asked + 1, answered), i)][:i]
        borders[key] = _border_of(chat, i, anchor, gap, short)
        if len(short) < i and any(borders[key][2:]):
            borders[key] = _border_of(chat, i, anchor, gap, range(i))
    return borders[key]


def _border_of(chat: Marked, i: int, anchor: Place | None, gap: str, kept: Sequence[int]) -> Border:
    """The border as the template writes it of the messages `kept` of those before message i."""

    @lru_cache(maxsize=2)
    def tail(opened: bool) -> str | None:
        """What the template writes behind the anchor; None where it does not write the anchor."""
        messages = [chat.messages[k] for k in kept]
        written = read_marks(chat.template.render(messages, opened, chat.arguments))
        if anchor is None:
            return written.text
        spots = written.places.get(anchor.number, ())
        return written.text[spots[0][1] :] if len(spots) == 1 else None

    special, opening = chat.template.special, chat.template.opening(chat.key)
    end, end_fault = 0, ""
    if i:
        try:
            # a message without a text of its own stands between others' texts
            own = anchor is not None and anchor.home == i - 1
            end, end_fault = _turn_end(tail, gap, special, opening, own)
        except ValueError as error:
            end_fault = str(error)
    if i < len(chat.roles) and chat.roles[i] != ANSWER:
        return Border(end, end, end_fault)
    try:
        whole = tail(True)
    except ValueError as error:
        return Border(end, end, end_fault, str(error))
    if whole is not None and gap.startswith(whole):
        return Border(min(end, len(whole)), len(whole), end_fault)
    start = _common_parts(whole or "", gap, special)
    if opening and start <= end and (at := gap.rfind(opening, end)) >= 0:
        note = (
            "the generation prompt is written otherwise behind some message than before an answer"
        )
        return Border(end, at + len(opening), end_fault, note=note)
    if whole is None or start < end or start == end < len(gap):
        fault = f"the generation prompt ends in {whole!r}, but before the answer stands {gap!r}"
        return Border(end, end, end_fault, fault)
    note = (
        f"the generation prompt opens {whole[start:]!r}, which the chat template does not write "
        "before an answer"
    )
    return Border(end, start, end_fault, note=note)


def _turn_end(
    tail: Callable[[bool], str | None],
    gap: str,
    special: Pattern,
    opening: str,
    own: bool,
) -> tuple[int, str]:
    """Where in `gap` the message before it ends, and why that is a guess, or ""."""
    alone = tail(False)
    if alone is not None and gap.startswith(alone):
        return len(alone), ""
    opened = tail(True) or ""
    if opening and opened.endswith(opening):
        followed = opened.removesuffix(opening)
        if gap.startswith(followed):
            return len(followed), ""
    end = _common_parts(alone or "", gap, special)
    if end and own:
        return end, ""
    return 0, f"{alone!r} ends it alone, {gap!r} when more follows"


def _common_parts(alone: str, within: str, special: Pattern) -> int:
    """How much of `within` is a beginning of `alone`, in whole parts with a token among them."""
    end, seen = 0, False
    for mine, other in zip(special.split(alone), special.split(within), strict=False):
        if mine != other:
            # the last text before a mark or before a token that the other lacks
            short = min(mine, other, key=len)
            end += len(short) if mine.startswith(other) or other.startswith(mine) else 0
            break
        end, seen = end + len(mine), seen or bool(special.fullmatch(mine))
    return end if seen else 0


def _spans(chat: Marked, ends: list[int], begins: list[int], faults: list[str]) -> list[Span]:
    text = chat.text
    # of the whole text: where each stretch of one writer starts, and the writer
    starts, writers = [0], ["template"]
    # where a text behind a later message starts, its answer, and how far that answer has the text
    owned: list[tuple[int, int, int]] = [(0, 0, 0)]
    for place in chat.places:
        i, at = place.label.message, place.left
        if place.once and -1 < i < place.home:
            owned.append((at, i, ends[place.home]))
        by: Writer = "answer" if i >= 0 and chat.roles[i] == ANSWER else "other"
        for part in content_parts(text[at : place.right], chat.media.get(i), by):
            starts.append(at)
            writers.append(part.by)
            at += len(part.text)
        starts.append(at)
        writers.append("template")
    begins = [*begins, len(text)]
    prefixes, bodies = ([[] for _ in begins] for _ in range(2))
    for start, stop in pairwise(sorted({*starts, *begins, *ends, len(text)})):
        i = bisect_right(ends, start)
        _, owner, until = owned[bisect_right(owned, start, key=itemgetter(0)) - 1]
        by = writers[bisect_right(starts, start) - 1]
        part = Part(text[start:stop], by, owner if start < until else None)
        (prefixes if start < begins[i] else bodies)[i].append(part)
    spans = []
    for prefix, body, fault in zip(prefixes, bodies, [*faults, ""], strict=True):
        last = body[-1] if body else Part("", "other")
        suffix = last.text if last.by == "template" and last.owner is None else ""
        body = body[: len(body) - bool(suffix)]
        spans.append(Span(tuple(prefix), tuple(body), suffix, fault))
    return spans if chat.opened else spans[:-1]
