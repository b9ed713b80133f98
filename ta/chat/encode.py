"""Chats to token ids and loss weights: rendered, tokenized and masked in one go, cut by whole messages."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from ta.chat.pieces import Piece, Tokens, Vocabulary, show, tokenize_chats, tokenize_with_loss_mask  # noqa: F401 - one door for chats
from ta.chat.template import (
    ANSWER,
    SYSTEM,
    ChatConfig,
    JinjaTemplate,
    Message,
    Span,
    Template,
    canonical_role,
    split_chat,
)

Chat = Sequence[Message]
EQUAL = "chosen equals rejected"
Parts = Sequence[tuple[str, bool]]  # a content cut into (text, whether it is placeholders of media)


class Drop(NamedTuple):
    """A record that cannot be used."""

    reason: str
    detail: str


def render_chat(
    messages: Chat, template: Template, loss_on: str = "answers", opened: bool = False
) -> list[list[Piece]]:
    """The pieces of each message, in order; with `opened` one more list, the answer's prefix. ValueError: unknown role, a bad weight, a
    template that cannot write the chat or, where a message is to be learned, does not tell where it begins and ends."""
    glued = isinstance(template, JinjaTemplate)
    spans = split_chat(messages, template, opened)
    weights = _weights(messages, loss_on, len(messages) - (not opened)) + [0.0] * opened
    roles = [message["role"] for message in messages] + [ANSWER] * opened
    rendered, border = [], False
    for i, (span, weight, role) in enumerate(zip(spans, weights, roles, strict=True)):
        if weight and span.fault:
            raise ValueError(
                f"message {i + 1} ({role}) is to be learned, but the chat template does not tell its borders: {span.fault}"
            )
        # an answer stands apart, learned or not, so that training ids begin with the ids of its prompt
        apart = role == ANSWER or weight != 0
        parts = messages[i].get("parts", ()) if i < len(messages) else ()
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
    """(text, weight, control) of a message's content: placeholders of media are real tokens and never learned, the rest is literal."""
    if not parts:
        return [(content, weight, False)]
    at, cut = (
        "".join(text for text, _ in parts).index(content),
        [],
    )  # a template may have stripped it
    for text, media in parts:
        cut.append((text[max(at, 0) : max(at + len(content), 0)], 0.0 if media else weight, media))
        at -= len(text)
    return cut


def _weights(messages: Chat, loss_on: str, last: int) -> list[float]:
    learned = {
        "answers": lambda i: messages[i]["role"] == ANSWER,
        "last": lambda i: i == last,
        "all": lambda i: True,
    }[loss_on]
    weights = []
    for i, message in enumerate(messages):
        loss = False if message.get("disable_loss") else message.get("loss")
        weight = learned(i) if loss is None else loss
        if not isinstance(weight, (bool, int, float)) or not (
            math.isfinite(weight) and weight >= 0
        ):
            raise ValueError(
                f"message {i + 1} has loss {loss!r}; give true, false or a finite weight >= 0"
            )
        weights.append(float(weight))
    return weights


def cut_dialogue(
    roles: Sequence[str],
    lengths: Sequence[int],
    max_tokens: int | None,
    keep_end: bool = False,
    end_in_answer: bool = True,
    fixed: int = 0,
) -> list[int]:
    """Which messages stay: whole ones, in order, of `fixed` + their lengths <= max_tokens, as many as fit.

    Leading system messages stay and are counted. The others stay from the beginning on, or with keep_end to the end; they end in an answer
    (end_in_answer), and where earlier ones went they begin with what is no answer. [] when nothing but system messages would stay."""
    first = next((i for i, role in enumerate(roles) if role != SYSTEM), len(roles))
    stop = len(roles)
    while end_in_answer and stop > first and roles[stop - 1] != ANSWER:
        stop -= 1
    room = math.inf if max_tokens is None else max_tokens - fixed - sum(lengths[:first])
    begin = first
    if keep_end:
        total, begin = 0, stop
        for i in range(stop - 1, first - 1, -1):
            total += lengths[i]
            if total > room:
                break
            if i == first or roles[i] != ANSWER:
                begin = i
    else:
        total, fits = 0, first
        for i in range(first, stop):
            total += lengths[i]
            if total > room:
                break
            if not end_in_answer or roles[i] == ANSWER:
                fits = i + 1
        stop = fits
    return [*range(first), *range(begin, stop)] if begin < stop else []


def _fit(
    jobs: Sequence[list[list[Message]]],
    template: Template,
    vocabulary: Vocabulary,
    config: ChatConfig,
    loss_on: str,
    kind: str,
) -> list[list[Tokens] | Drop]:
    """Encodes jobs, each one or more dialogues that differ in their last message only and share one cut.

    kind: "chat", "answers" (the last message stays), "prompt" (the last message stays, an opened answer follows)."""
    check_chat_config(config)
    opened, keep_end = kind == "prompt", kind != "chat" or config.keep_end
    end_in_answer = kind == "answers" or (kind == "chat" and loss_on != "all")
    results: list[list[Tokens] | Drop] = [
        Drop("no answer", "the chat has no message that could be learned")
    ] * len(jobs)
    kept: dict[int, list[int]] = {}
    for j, job in enumerate(jobs):
        if not job:
            continue
        roles = [message["role"] for message in job[0]]
        indexes = (
            list(range(len(roles)))
            if opened
            else cut_dialogue(roles, [0] * len(roles), None, keep_end, end_in_answer)
        )
        if indexes or opened or (loss_on == "all" and roles):
            kept[j] = indexes or list(range(len(roles)))
    while kept:
        rendered = (
            render_chat([chat[i] for i in kept[j]], template, loss_on, opened)
            for j in kept
            for chat in jobs[j]
        )
        encoded = iter(tokenize_chats(rendered, vocabulary))
        again: dict[int, list[int]] = {}
        for j, indexes in kept.items():
            forms = [next(encoded) for _ in jobs[j]]
            longest = max(len(form.tokens.ids) for form in forms)
            if config.max_tokens is None or longest <= config.max_tokens:
                results[j] = [form.tokens for form in forms]
                continue
            chosen = [jobs[j][0][i] for i in indexes]
            roles = [message["role"] for message in chosen]
            if keep_end:  # a question right behind its picture begins what is kept as little as an answer does
                behind = [False, *("parts" in message for message in chosen)]
                roles = [
                    ANSWER if behind[i] and role == roles[i - 1] else role
                    for i, role in enumerate(roles)
                ]
            lengths = next(list(form.lengths) for form in forms if len(form.tokens.ids) == longest)
            fixed = lengths.pop() if opened else 0
            # what a template writes once (BOS) counts with the first message; should that go, the next round counts again
            stay = cut_dialogue(roles, lengths, config.max_tokens, keep_end, end_in_answer, fixed)
            if stay:
                again[j] = [indexes[i] for i in stay]
            else:
                what = "prompt" if opened else "answer" if end_in_answer else "message"
                results[j] = Drop(
                    f"no {what} fits in max_tokens",
                    f"{longest} tokens, and no whole {what} within {config.max_tokens}",
                )
        kept = again
    return [_checked(result, opened) for result in results]


def _checked(result: list[Tokens] | Drop, opened: bool) -> list[Tokens] | Drop:
    if isinstance(result, Drop) or opened or all(any(tokens.weights) for tokens in result):
        return result
    return Drop(
        "nothing to learn",
        "no token of the chat has a weight: see loss_on and the messages' own loss",
    )


def encode_chats(
    chats: Sequence[Chat], template: Template, vocabulary: Vocabulary, config: ChatConfig
) -> list[Tokens | Drop]:
    """Training sequences, one a chat, in order. ValueError for a chat that is wrong (encode it alone to know which)."""
    results = _fit(
        [[_ready(chat, config)] for chat in chats],
        template,
        vocabulary,
        config,
        config.loss_on,
        "chat",
    )
    return [result if isinstance(result, Drop) else result[0] for result in results]


def encode_chat(
    messages: Chat, template: Template, vocabulary: Vocabulary, config: ChatConfig
) -> Tokens | Drop:
    return encode_chats([messages], template, vocabulary, config)[0]


def encode_answers(
    contexts: Sequence[Chat],
    answers: Sequence[Sequence[Message]],
    template: Template,
    vocabulary: Vocabulary,
    config: ChatConfig,
) -> list[list[Tokens] | Drop]:
    """For each context its answers (KTO: one; a pair: two; candidates: many), each in a sequence with the same cut context; only the answer
    is learned. The latest messages stay, whatever keep_end says: the answer is what the record is about."""
    jobs = []
    for context, group in zip(contexts, answers, strict=True):
        before = [{**message, "loss": False} for message in _ready(context, config)]
        jobs.append(
            [[*before, _canonical({"role": ANSWER, **answer}, len(before))] for answer in group]
        )
    return _fit(jobs, template, vocabulary, config, "last", "answers")


def encode_pairs(
    contexts: Sequence[Chat],
    pairs: Sequence[tuple[Message, Message]],
    template: Template,
    vocabulary: Vocabulary,
    config: ChatConfig,
) -> list[tuple[Tokens, Tokens] | Drop]:
    """(chosen, rejected) of each record, which share one cut context; only the answers are learned."""
    results = encode_answers(contexts, pairs, template, vocabulary, config)
    same = Drop(EQUAL, "the two answers have the same tokens")
    return [
        r if isinstance(r, Drop) else same if r[0].ids == r[1].ids else (r[0], r[1])
        for r in results
    ]


def encode_prompts(
    chats: Sequence[Chat], template: Template, vocabulary: Vocabulary, config: ChatConfig
) -> list[list[int] | Drop]:
    """Prompts for generation: trailing answers off, the answer's prefix opened. Equal to the first ids of encode_chat(chat + [answer]).
    Over max_tokens the earliest messages go, whatever keep_end says: the last question is what is asked."""
    jobs = []
    for chat in chats:
        messages = _ready(chat, config)
        while messages and messages[-1]["role"] == ANSWER:
            messages.pop()
        jobs.append([messages])
    results = _fit(jobs, template, vocabulary, config, config.loss_on, "prompt")
    return [result if isinstance(result, Drop) else result[0].ids for result in results]


def encode_prompt(
    messages: Chat, template: Template, vocabulary: Vocabulary, config: ChatConfig
) -> list[int]:
    """encode_prompts for one; ValueError where the question does not fit in max_tokens."""
    result = encode_prompts([messages], template, vocabulary, config)[0]
    if isinstance(result, Drop):
        raise ValueError(f"{result.reason}: {result.detail}; raise --max-tokens")
    return result


def _ready(chat: Chat, config: ChatConfig) -> list[Message]:
    messages = [_canonical(message, i) for i, message in enumerate(chat)]
    return with_system(messages, config.system_prompt, config.ignore_system_prompt)


def _canonical(message: Message, index: int) -> Message:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        wrong, given = ("role", role) if not isinstance(role, str) else ("content", content)
        raise ValueError(
            f"message {index + 1} has {wrong} {given!r}, which is no text; give a string"
        )
    return {**message, "role": ANSWER} if role == "bot" else message


def check_chat_config(config: ChatConfig) -> None:
    """ValueError for settings that cannot work, whatever the data."""
    if config.system_prompt is not None and config.ignore_system_prompt:
        raise ValueError(
            "--system-prompt gives a system prompt and --ignore-system-prompt removes it; give one of the two"
        )
    if config.max_tokens is not None and config.max_tokens < 1:
        raise ValueError(
            f"--max-tokens is {config.max_tokens}, so no message would fit; give at least 1, or none for no limit"
        )


def with_system(messages: Chat, prompt: str | None, ignore: bool = False) -> list[Message]:
    """The messages with `prompt` in place of their own leading system messages, or with `ignore` without any; both: ValueError."""
    if prompt is not None and ignore:
        raise ValueError(
            "a system prompt is given and system prompts are to be ignored; give one of the two"
        )
    if prompt is None and not ignore:
        return list(messages)
    first = next(
        (i for i, message in enumerate(messages) if message["role"] != SYSTEM), len(messages)
    )
    return [
        *([] if prompt is None else [{"role": SYSTEM, "content": prompt, "loss": False}]),
        *messages[first:],
    ]


def random_cut(messages: Chat, generator: random.Random) -> list[Message]:
    """The messages before a random answer (cherry-picks); ValueError where there is none."""
    places = [i for i, message in enumerate(messages) if canonical_role(message["role"]) == ANSWER]
    if not places:
        raise ValueError(
            "the chat has no answer before which it could be cut; give a chat with one"
        )
    return list(messages[: generator.choice(places)])
