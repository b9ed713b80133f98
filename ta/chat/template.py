"""The two kinds of chat template, and how each cuts a dialogue into template text and content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from ta.chat.messages import ANSWER, SYSTEM, Message, canonical_role

Tags = Mapping[str, str]  # role -> the template's name for it
Render = Callable[
    [list[Message], bool], str
]  # (messages, add_generation_prompt) -> text; ValueError where the template refuses

DEFAULT_TAGS = {role: role for role in (SYSTEM, "developer", "user", ANSWER, "tool")}
REMEDY = (
    "give --prefix-template, --suffix-template and --role-tags instead of the tokenizer's own "
    "template"
)


@dataclass(frozen=True)
class ChatConfig:
    prefix_template: str | None = None
    """Text before each message, with {role} for the role's tag; \\n and \\t are read as newline and
    tab. With none of prefix and suffix given, the tokenizer's own chat template is used."""
    suffix_template: str | None = None
    """Text after each message: what the model learns to end an answer with; \\n and \\t as above.
    """
    role_tags: tuple[str, ...] = ()
    """role=tag pairs, e.g. user=Human assistant=AI: the roles that records may have, and how the
    template writes them."""
    loss_on: Literal["answers", "last", "all"] = "answers"
    """Which messages are learned: every answer, the last answer, or every message. A message's own
    "loss" wins."""
    max_tokens: int | None = None
    """Longest sequence in tokens, everything counted; whole messages go until it fits. None: no
    limit."""
    keep_end: bool = False
    """Cut dialogues keep their latest messages, not their earliest. Prompts and answers that are
    compared always keep the latest."""
    system_prompt: str | None = None
    """System prompt put in place of the record's own; never learned."""
    ignore_system_prompt: bool = False
    """Remove the records' system prompts."""


def check_chat_config(config: ChatConfig) -> None:
    """ValueError for settings that cannot work, whatever the data."""
    if config.system_prompt is not None and config.ignore_system_prompt:
        raise ValueError(
            "--system-prompt gives a system prompt and --ignore-system-prompt removes it; give one "
            "of the two"
        )
    if config.max_tokens is not None and config.max_tokens < 1:
        raise ValueError(
            f"--max-tokens is {config.max_tokens}, so no message would fit; give at least 1, or "
            "none for no limit"
        )


class Span(NamedTuple):
    """One message as the template writes it: prefix + opening + content + suffix."""

    prefix: str  # never learned; for an answer it ends where generation starts
    # what the template writes between the generation prompt and an answer's content, such as an
    # empty think block: learned
    opening: str
    content: str
    suffix: str
    fault: str = ""  # why this message cannot be learned: its borders are not known


class ExplicitTemplate(NamedTuple):
    """Each message is prefix.format(role=tag) + content + suffix, each part tokenized by itself.

    Bos ("" for none) comes first.
    """

    prefix: str
    suffix: str
    role_tags: Tags
    bos: str


class JinjaTemplate(NamedTuple):
    """A tokenizer's own chat template.

    Skeleton(roles) tells its text around the contents, and is remembered by roles.
    """

    render: Render
    skeleton: Callable[[tuple[str, ...]], Skeleton]
    role_tags: Tags
    source: str


class Skeleton(NamedTuple):
    """The text of a template around n contents."""

    texts: tuple[str, ...]  # n + 1: before each content, and after the last
    opens: tuple[int, ...]  # n: where in texts[i] an answer's generation starts; else len(texts[i])
    ends: tuple[int, ...]  # n: where in texts[i + 1] the suffix of message i ends
    faults: tuple[str, ...]  # n: why a message's borders are not known, or ""


Template = ExplicitTemplate | JinjaTemplate


def explicit_template(
    prefix: str | None, suffix: str | None, role_tags: Tags | None = None, bos: str | None = None
) -> ExplicitTemplate:
    """A template from its parts, any of which may be empty or None.

    Without tags system, developer, user, assistant and tool stand for themselves. `bos` is the text
    of the tokenizer's BOS token. ValueError: tags without the answer's role, a prefix that does not
    format.
    """
    tags = {canonical_role(role): tag for role, tag in (role_tags or DEFAULT_TAGS).items()}
    prefix, suffix, bos = prefix or "", suffix or "", bos or ""
    if ANSWER not in tags:
        raise ValueError(
            f"role tags {', '.join(tags)} name no {ANSWER}, so no answer could be written; add a "
            f"tag for {ANSWER} (or bot)"
        )
    if "{role}" in suffix:
        raise ValueError(
            f"suffix template {suffix!r} has {{role}}, but only the prefix is filled in; move it "
            "to the prefix"
        )
    try:
        first = prefix.format(role=tags[ANSWER])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"prefix template {prefix!r} cannot be filled in ({error!r}): write braces twice, "
            f"except in {{role}}"
        ) from None
    return ExplicitTemplate(prefix, suffix, tags, "" if bos and first.startswith(bos) else bos)


def jinja_template(
    render: Render, special: Iterable[str] = (), source: str = "", role_tags: Tags | None = None
) -> JinjaTemplate:
    """A tokenizer's chat template.

    `special` are its control tokens. role_tags (default: the usual five) are the roles known, each
    with the name that the template is given for it.
    """
    tags = {canonical_role(role): tag for role, tag in (role_tags or DEFAULT_TAGS).items()}
    names = sorted(special, key=len, reverse=True)
    border = (
        re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)")
    )

    @lru_cache(maxsize=4096)
    def texts(roles: tuple[str, ...], opened: bool) -> tuple[str, ...] | str:
        """The template's text around the contents, or why there is none."""
        marks, parts = [f"q7Zk{i}x9Wv" for i in range(len(roles))], []
        try:
            text = render(
                [
                    {"role": tags[role], "content": mark}
                    for role, mark in zip(roles, marks, strict=True)
                ],
                opened,
            )
        except ValueError as error:
            return str(error)
        for i, mark in enumerate(marks):
            before, found, text = text.partition(mark)
            if not found or mark in text:
                how = "twice" if found else "not at all, or not in its place"
                return f"the chat template writes message {i + 1} ({roles[i]}) {how}"
            parts.append(before)
        return (*parts, text)

    return JinjaTemplate(
        render, lru_cache(maxsize=4096)(lambda roles: _skeleton(roles, texts, border)), tags, source
    )


def _skeleton(
    roles: tuple[str, ...],
    texts: Callable[[tuple[str, ...], bool], tuple[str, ...] | str],
    border: re.Pattern[str],
) -> Skeleton:
    whole = texts(roles, False)
    if isinstance(whole, str):
        raise ValueError(
            f"the tokenizer's chat template cannot write this dialogue ({' '.join(roles)}): {whole}"
        )
    opens, ends, faults = [], [], []
    for i, role in enumerate(roles):
        alone = texts(roles[: i + 1], False)
        end = None if isinstance(alone, str) else _common_end(alone[-1], whole[i + 1], border)
        fault = (
            ""
            if end is not None
            else alone
            if isinstance(alone, str)
            else f"{alone[-1]!r} ends it alone, {whole[i + 1]!r} when more follows"
        )
        opened = texts(roles[:i], True) if role == ANSWER else whole[: i + 1]
        if isinstance(opened, str):
            fault = opened
        elif not whole[i].startswith(opened[-1]):
            fault = (
                f"the generation prompt ends in {opened[-1]!r}, but before the answer stands "
                f"{whole[i]!r}"
            )
        elif i == len(roles) - 1 and opened[:-1] != whole[:i]:
            fault = (
                "the template writes the messages before the answer otherwise when the answer is "
                "there"
            )
        opens.append(len(opened[-1]) if not fault else len(whole[i]))
        ends.append(end or 0)
        faults.append(fault)
    for i in range(1, len(roles)):
        ends[i - 1] = min(ends[i - 1], opens[i])
    return Skeleton(whole, tuple(opens), tuple(ends), tuple(faults))


def _common_end(alone: str, within: str, border: re.Pattern[str]) -> int | None:
    """How much of `within` is the suffix that a message has when nothing follows.

    That is all of it, or whole parts up to a special token; None where it cannot be told.
    """
    if within.startswith(alone):
        return len(alone)
    end, seen = 0, False
    for mine, other in zip(border.split(alone), border.split(within), strict=False):
        if mine != other:
            break
        end, seen = end + len(mine), seen or bool(border.fullmatch(mine))
    return end if seen else None


def split_chat(messages: Sequence[Message], template: Template, opened: bool = False) -> list[Span]:
    """One Span a message, and one more for the opened answer if `opened`.

    ValueError: unknown role, or a template that cannot be split.
    """
    for i, message in enumerate(messages):
        if message["role"] not in template.role_tags:
            known = ", ".join(template.role_tags)
            raise ValueError(
                f"message {i + 1} has role {message['role']!r}; the roles known are {known}: "
                "correct it, or give it a tag in --role-tags"
            )
    if isinstance(template, JinjaTemplate):
        return _split_jinja(messages, template, opened)
    spans = [
        Span(
            template.prefix.format(role=template.role_tags[m["role"]]),
            "",
            m["content"],
            template.suffix,
        )
        for m in messages
    ]
    if opened:
        spans.append(Span(template.prefix.format(role=template.role_tags[ANSWER]), "", "", ""))
    if spans and template.bos:
        spans[0] = spans[0]._replace(prefix=template.bos + spans[0].prefix)
    return spans


def _split_jinja(messages: Sequence[Message], template: JinjaTemplate, opened: bool) -> list[Span]:
    tags = template.role_tags
    given = [
        m if len(m) == 2 and tags[m["role"]] == m["role"] else _given(m, tags) for m in messages
    ]
    roles = tuple(message["role"] for message in messages)
    skeleton = template.skeleton(roles + (ANSWER,) * opened)
    count, texts = len(messages), skeleton.texts
    if opened:
        if skeleton.faults[-1]:
            raise ValueError(
                f"the answer to this dialogue ({' '.join(roles)}) cannot be opened: "
                f"{skeleton.faults[-1]}; {REMEDY}"
            )
        texts = (*texts[:count], texts[count][: skeleton.opens[count]])
    contents = _contents(template.render(given, opened), texts, given)
    starts, spans = (0, *skeleton.ends), []
    for i, content in enumerate(contents):
        begin, split = starts[i], skeleton.opens[i]
        spans.append(
            Span(
                texts[i][begin:split],
                texts[i][split:],
                content,
                texts[i + 1][: skeleton.ends[i]],
                skeleton.faults[i],
            )
        )
    if opened:
        spans.append(Span(texts[count][starts[count] :], "", "", ""))
    return spans


def _given(message: Message, tags: Tags) -> Message:
    """The message as the template gets it: without what is ours, with its own name of the role."""
    return {
        k: v for k, v in message.items() if k not in ("loss", "disable_loss", "type", "parts")
    } | {"role": tags[message["role"]]}


def _contents(text: str, texts: tuple[str, ...], messages: Sequence[Message]) -> list[str]:
    """The contents as the template wrote them, as they are or stripped.

    ValueError where the text is not texts and contents in turn.
    """
    contents = [message["content"] for message in messages]
    if (
        text
        == "".join([part for pair in zip(texts, contents, strict=False) for part in pair])
        + texts[-1]
    ):
        return contents
    at, found = len(texts[0]), []
    for i, content in enumerate(contents if text.startswith(texts[0]) else []):
        rest = texts[i + 1]
        for form in (content, content.strip(), content.lstrip(), content.rstrip()):
            follows = at + len(form)
            if (
                text.startswith(form, at)
                and text.startswith(rest, follows)
                and (i + 1 < len(contents) or follows + len(rest) == len(text))
            ):
                break
        else:
            break
        found.append(form)
        at = follows + len(rest)
    if len(found) < len(contents) or at != len(text):
        i = min(len(found), len(contents) - 1)
        who = f"message {i + 1} ({messages[i]['role']})" if messages else "this dialogue"
        raise ValueError(
            f"{who} cannot be split faithfully: the tokenizer's chat template changes its content "
            f"or writes it depending on it; {REMEDY}"
        )
    return found


def export_template(template: Template) -> str:
    """Jinja source for tokenizer.chat_template that writes what was trained.

    A dialogue with an unknown role raises.
    """
    if isinstance(template, JinjaTemplate):
        return template.source
    prefixes = {
        role: template.prefix.format(role=tag)
        for role, tag in (*template.role_tags.items(), ("bot", template.role_tags[ANSWER]))
    }
    quote = lambda text: json.dumps(text, ensure_ascii=False)
    return (
        f"{{%- set prefixes = {quote(prefixes)} -%}}{{{{- {quote(template.bos)} -}}}}"
        "{%- for message in messages -%}{%- if message['role'] not in prefixes -%}"
        "{{- raise_exception('unknown role ' + message['role'] + '; known: ' + prefixes | join(', "
        "')) -}}{%- endif -%}"
        f"{{{{- prefixes[message['role']] + message['content'] + {quote(template.suffix)} -}}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- prefixes[{quote(ANSWER)}] -}}}}{{%- endif -%}}"
    )
