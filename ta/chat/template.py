"""The two kinds of chat template, and how each cuts a dialogue into template text and content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from ta.chat.jinja import (
    DEFAULT_TAGS,
    NO_ARGUMENTS,
    Arguments,
    JinjaTemplate,
    Part,
    Span,
    Tags,
    content_parts,
    split_jinja,
)
from ta.chat.messages import ANSWER, REASONING, Chat, canonical_role
from ta.command_line import Range, check_config


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
    max_tokens: Annotated[int | None, Range(1)] = None
    """Longest sequence in tokens, everything counted; whole messages go until it fits.
    Default: no limit."""
    keep_end: bool = False
    """Cut dialogues keep their latest messages, not their earliest. Prompts and answers that are
    compared always keep the latest."""
    cut_answer: bool = False
    """Cut the last answer at --max-tokens where it does not fit whole; it then teaches no end."""
    split_turns: bool = False
    """Learn each answer of a chat in a sequence of its own, written as it is generated: for
    templates that write an answer otherwise when more follows."""
    system_prompt: str | None = None
    """System prompt put in place of the record's own; never learned."""
    ignore_system_prompt: bool = False
    """Remove the records' system prompts."""


def check_chat_config(config: ChatConfig) -> None:
    """ValueError for settings that cannot work, whatever the data."""
    check_config(config)
    if config.system_prompt is not None and config.ignore_system_prompt:
        raise ValueError(
            "--system-prompt gives a system prompt and --ignore-system-prompt removes it; give one "
            "of the two"
        )
    if config.cut_answer and config.max_tokens is None:
        raise ValueError(
            "--cut-answer cuts at --max-tokens, which is not given; give it, or leave the flag out"
        )
    if config.cut_answer and config.loss_on == "all":
        raise ValueError(
            "--cut-answer cuts at the last answer, and with --loss-on all no dialogue has to end "
            "in one; give one of the two"
        )
    if config.split_turns and config.loss_on != "answers":
        raise ValueError(
            f"--split-turns learns each answer by itself, --loss-on {config.loss_on} other "
            "messages; give one of the two"
        )


class ExplicitTemplate(NamedTuple):
    """Each message is prefix.format(role=tag) + content + suffix, each part tokenized by itself.

    Bos ("" for none) comes first.
    """

    prefix: str
    suffix: str
    role_tags: Tags
    bos: str


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


def split_chat(
    messages: Chat,
    template: Template,
    opened: bool = False,
    arguments: Arguments = NO_ARGUMENTS,
    notes: list[str] | None = None,
) -> list[Span]:
    """One Span a message, and one more for the opened answer if `opened`.

    `arguments` are what the template is given beside the messages: tools, documents, arguments of
    its own. `notes` gets a line for each thing that the template leaves out. ValueError: unknown
    role, or a template that cannot write the chat or leaves out what it says.
    """
    for i, message in enumerate(messages):
        if message["role"] not in template.role_tags:
            known = ", ".join(template.role_tags)
            raise ValueError(
                f"message {i + 1} has role {message['role']!r}; the roles known are {known}: "
                "correct it, or give it a tag in --role-tags"
            )
    notes = [] if notes is None else notes
    if isinstance(template, JinjaTemplate):
        return split_jinja(messages, template, opened, arguments, notes)
    return _split_explicit(messages, template, opened, arguments, notes)


def _split_explicit(
    messages: Chat,
    template: ExplicitTemplate,
    opened: bool,
    arguments: Arguments,
    notes: list[str],
) -> list[Span]:
    notes += [f"{name} of the record is not written by --prefix-template" for name in arguments]
    spans = []

    def prefix(role: str) -> tuple[Part]:
        bos = "" if spans else template.bos
        return (Part(bos + template.prefix.format(role=template.role_tags[role]), "template"),)

    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message.get("tool_calls") or not isinstance(content, str):
            what = "tool calls" if message.get("tool_calls") else "a list of parts"
            raise ValueError(
                f"message {i + 1} ({message['role']}) has {what}, which --prefix-template and "
                "--suffix-template do not write; use the tokenizer's own template"
            )
        notes += [
            f"{key} is not written by --prefix-template" for key in REASONING if key in message
        ]
        by = "answer" if message["role"] == ANSWER else "other"
        body = content_parts(content, message.get("parts"), by)
        spans.append(Span(prefix(message["role"]), body, template.suffix))
    if opened:
        spans.append(Span(prefix(ANSWER), (), ""))
    return spans


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
