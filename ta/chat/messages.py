"""Messages of a chat, and the plain rules about them that every method shares."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

# {"role": str, "content": str | None, "loss"?: bool | float, and what the template may read:
# "reasoning_content", "tool_calls", "tool_call_id", "name"}; "bot" and "assistant" are one role
Message = dict[str, Any]
Chat = Sequence[Message]

ANSWER = "assistant"
SYSTEM = "system"
INSTRUCTIONS = (SYSTEM, "developer")
# the names under which a message holds what the model thought before it answered
REASONING = ("reasoning_content", "reasoning", "thinking")


def check_messages(messages: Any) -> None:
    """ValueError for what is no list of messages, each with its role and its content."""
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise ValueError(
            f"{messages!r:.60} is no chat; give a list of messages, each {{role, content}}"
        )
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        beside_calls = content is None and message.get("tool_calls")
        if not isinstance(role, str) or not (isinstance(content, str | list) or beside_calls):
            wrong, given = ("content", content) if isinstance(role, str) else ("role", role)
            raise ValueError(
                f"message {i + 1} has {wrong} {given!r}, which is no text; give a string"
            )


def canonical_role(role: str | None) -> str | None:
    """The role's one name: "assistant" for "bot"."""
    return ANSWER if role == "bot" else role


def message_weight(message: Message, place: int, default: bool) -> float:
    """What each token of a message weighs in the loss: its own `loss`, else 1 or 0 by `default`.

    ValueError where its own `loss` is neither a bool nor a finite number from 0.
    """
    loss = False if message.get("disable_loss") else message.get("loss")
    if loss is None:
        return float(default)
    if not isinstance(loss, bool | int | float) or not (math.isfinite(loss) and loss >= 0):
        raise ValueError(
            f"message {place + 1} has loss {loss!r}; give true, false or a finite weight >= 0"
        )
    return float(loss)


def parts_of(message: Message) -> Sequence[dict[str, Any]]:
    """The texts, pictures and sounds of a message in order, each {type, content}."""
    content = message["content"]
    whole = [{"type": message.get("type", "text"), "content": content}]
    return content if isinstance(content, list) else whole


def last_question(messages: Chat) -> int | None:
    """The place of the last message that asks, or None.

    System prompts, answers and what tools write ask nothing.
    """
    silent = (ANSWER, *INSTRUCTIONS, "tool")
    asking = (i for i, m in enumerate(messages) if canonical_role(m["role"]) not in silent)
    return max(asking, default=None)


def strip_trailing_answers(messages: Chat) -> list[Message]:
    """The messages up to the last one that is no answer: what a model is asked."""
    check_messages(messages)
    end = len(messages)
    while end and canonical_role(messages[end - 1].get("role")) == ANSWER:
        end -= 1
    return list(messages[:end])


def with_system(messages: Chat, prompt: str | None, ignore: bool = False) -> list[Message]:
    """The messages with `prompt` in place of their own leading system messages.

    With `ignore` they are removed and none comes in their place. ValueError for both at once.
    """
    if prompt is not None and ignore:
        raise ValueError(
            "a system prompt is given and system prompts are to be ignored; give one of the two"
        )
    if prompt is None and not ignore:
        return list(messages)
    new = [] if prompt is None else [{"role": SYSTEM, "content": prompt, "loss": False}]
    return [*new, *messages[leading_systems(messages) :]]


def leading_systems(messages: Chat) -> int:
    """The number of system messages at the beginning."""
    return next((i for i, m in enumerate(messages) if m["role"] != SYSTEM), len(messages))


def is_question(message: Message) -> bool:
    """Whether an answer can follow from it: neither an answer nor a system prompt."""
    return canonical_role(message.get("role")) not in (ANSWER, SYSTEM)


def random_cut(messages: Chat, generator: random.Random) -> list[Message]:
    """The messages before a random answer to a question; ValueError where there is none."""
    first = next((i for i, message in enumerate(messages) if is_question(message)), len(messages))
    places = [
        i for i in range(first, len(messages)) if canonical_role(messages[i]["role"]) == ANSWER
    ]
    if not places:
        raise ValueError(
            "the chat has no answer to a question before which it could be cut; give a chat with "
            "one"
        )
    return list(messages[: generator.choice(places)])


def template_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record gives the chat template beside messages: tools, documents, its own names."""
    given = {key: record[key] for key in ("tools", "documents") if record.get(key)}
    return given | (record.get("chat_template_kwargs") or {})
