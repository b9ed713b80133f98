"""A checker for each kind of record: it returns the record in its canonical form, or raises.

Every checker reads `bot` as `assistant`, `disable_loss: true` as `loss: false`, and `weight`,
`train`, `trainable` and `loss_mask` as `loss`. BadRecord says what is wrong with a record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress

from ta.chat.messages import (
    ANSWER,
    REASONING,
    last_question,
    message_weight,
    parts_of,
)
from ta.command_line import MOST
from ta.data.jsonl import BadRecord, named

# limit of margins, rewards and weights, far below the greatest float32
MAX_NUMBER = 1e30
# arguments of a chat template that are ours to give
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"} | {
    "chat_template",
    "tokenize",
}
# the names under which messages say whether, or with what weight, they are learned: OpenAI's
# fine-tuning has weight, Axolotl train, others the rest
LOSS_NAMES = ("loss", "weight", "train", "trainable", "loss_mask")
REPLACED = frozenset((*LOSS_NAMES, "disable_loss", "type"))
# other names of roles
ROLES = {"bot": ANSWER, "function": "tool"}
# where the parts of a message have their text or path
PART_KEYS = ("content", "text", "image", "image_url", "audio", "path", "url")
MEDIA_TYPES = ("image", "audio")

# why a pair is of no use
EQUAL = "chosen equals rejected"

Check = Callable[[dict], dict]


def check_chat(data: dict, need_answer: bool = True, media: bool = False) -> dict:
    """{"messages": [{role, content, loss?}]}: the record with canonical messages.

    A message may also hold what chat templates read: reasoning_content, tool_calls, tool_call_id,
    name; the record tools, documents and chat_template_kwargs. Unknown keys stay; an optional key
    that is null counts as absent. With `need_answer` some
    message must be an answer or have a `loss` of its own. With `media` they may be pictures and
    sounds.
    """
    data = _with_arguments(data)
    messages = _messages(data, "messages", media)
    roles = {message["role"]: None for message in messages}
    learned = "assistant" in roles or any(message.get("loss") for message in messages)
    if need_answer and not learned:
        raise BadRecord(
            "no answer",
            f"no message of role assistant (roles: {', '.join(roles)}), so nothing can be learned; "
            "give an answer",
        )
    return {**data, "messages": messages}


def check_prompt(data: dict) -> dict:
    """A chat to be answered: {"messages": [...]}. An answer at its end is allowed."""
    return check_chat(data, need_answer=False)


def check_media(data: dict, need_answer: bool = True) -> dict:
    """A chat with pictures and sounds.

    Its messages may be {"role", "type": text | image | audio, "content": text or path}, or hold a
    list of such parts. Pictures and sounds stand in messages that are neither answers nor system
    prompts and, with `need_answer`, before some answer.
    """
    data = check_chat(data, need_answer, media=True)
    messages = [*enumerate(data["messages"])]
    last = max((i for i, message in messages if message["role"] == "assistant"), default=-1)
    for place, message in messages:
        kinds = (part["type"] for part in parts_of(message))
        media = next((kind for kind in kinds if kind != "text"), None)
        if media and message["role"] in ("assistant", "system"):
            raise BadRecord(
                f"{media} in a message of role {message['role']}",
                f"messages[{place}] of role {message['role']} is {media}; answers and system "
                "prompts are text, put it into a question",
            )
        if media and need_answer and place > last:
            raise BadRecord(
                f"{media} without an answer",
                f"no answer follows the {media} of messages[{place}]; give one or take it out",
            )
    return data


def check_pair(data: dict) -> dict:
    """{"context", "answer_w", "answer_l", precomputed_margin?}.

    Two equal answers are no error but unusable: nothing distinguishes them.
    """
    data = _with_arguments(data)
    context = _messages(data, "context")
    better, worse = _answer(data, "answer_w"), _answer(data, "answer_l")
    if better | {"loss": None} == worse | {"loss": None}:
        raise BadRecord(EQUAL, "both answers have the same content", unusable=True)
    margin = _number(data, "precomputed_margin", "precomputed_margin is not a number")
    data |= {"context": context, "answer_w": better, "answer_l": worse}
    return _without_null(data | {"precomputed_margin": margin}, "precomputed_margin")


def check_labelled(data: dict) -> dict:
    """{"context", "answer", "is_desirable": bool}."""
    data = _with_arguments(data)
    context, answer = _messages(data, "context"), _answer(data, "answer")
    if not isinstance(data.get("is_desirable"), bool):
        raise BadRecord(
            "is_desirable is not a bool",
            f"is_desirable is {_shown(data, 'is_desirable')}; give true or false",
        )
    return {**data, "context": context, "answer": answer}


def check_question(data: dict) -> dict:
    """{"messages", "gold"?}: a chat whose last learned answer is given from passages.

    The messages end in that answer: what follows it is left out. `gold` is the id, or a list of
    ids, of the passages that hold the answer.
    """
    gold = data.get("gold")
    gold = [] if gold is None else gold if isinstance(gold, list) else [gold]
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in gold):
        raise BadRecord(
            "gold is no passage id",
            f"gold is {_shown(data, 'gold')}; give the id of a passage, or a list of ids",
        )
    checked = check_chat(data)
    messages = checked["messages"]
    while messages and not (
        messages[-1]["role"] == "assistant" and message_weight(messages[-1], 0, True)
    ):
        messages.pop()
    if not messages:
        raise BadRecord(
            "no answer",
            "no answer of the chat is learned (see their loss); give one that is",
        )
    if last_question(messages) is None:
        raise BadRecord(
            "no question",
            "no message of a user comes before the answer, so there is nothing to search for; give "
            "a question",
        )
    return checked | {"gold": [str(name) for name in dict.fromkeys(gold)]}


def check_class(data: dict, labels: Sequence[str] = (), need_label: bool = True) -> dict:
    """{"messages", "label": int from 0}; one message is enough.

    A label may also be one of the names in `labels`, which becomes its place there.
    """
    data = check_chat(data, need_answer=False)
    if not need_label:
        return data
    label = data.get("label")
    name = label if isinstance(label, str) else json.dumps(label)
    if name in labels:
        return {**data, "label": labels.index(name)}
    if type(label) is not int or not 0 <= label < (len(labels) or MOST):
        way = "give a whole number from 0, or name the classes in --labels"
        if labels:
            way = f"give one of {', '.join(labels[:20])}, or its place from 0"
        raise BadRecord("label is not a class", f"label is {_shown(data, 'label')}; {way}")
    return data


def check_candidates(data: dict) -> dict:
    """{"messages", "answers": [{id, content}], rewards?: {answer id: number}}.

    Ids become text; an answer without an id gets its index.
    """
    given = data.get("answers")
    if not isinstance(given, list) or not given:
        raise BadRecord(
            "no answers", f"answers is {_shown(data, 'answers')}; give a list of {{id, content}}"
        )
    answers = []
    for place, answer in enumerate(given):
        if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
            raise BadRecord(
                "content is not text",
                f"answer {place + 1} is {named(answer)} without text content; give {{id, content}}",
            )
        if answer.get("turns"):
            raise BadRecord(
                "answer with turns",
                f"answer {place + 1} was given after calls of tools, which a list of candidates "
                "does not hold; leave it out",
            )
        name = answer.get("id", place)
        answers.append({**answer, "id": str(place if name is None else name)})
    names = [answer["id"] for answer in answers]
    if len(set(names)) < len(names):
        raise BadRecord(
            "answer id given twice",
            f"the answer ids {names} are not all different; give each its own",
        )
    rewards = data.get("rewards")
    if rewards is not None:
        if not isinstance(rewards, dict) or rewards.keys() != set(names):
            raise BadRecord(
                "rewards do not fit",
                f"rewards is {_shown(data, 'rewards')} for answers {names}; give one number for "
                "each id",
            )
        rewards = {name: _number(rewards, name, "rewards do not fit") for name in names}
        if None in rewards.values():
            raise BadRecord(
                "rewards do not fit",
                f"a reward of answers {names} is null; give one number for each id",
            )
    data = check_chat(data, need_answer=False) | {"answers": answers, "rewards": rewards}
    return _without_null(data, "rewards")


def check_passage(data: dict) -> dict:
    """{id?, title?, text}: a passage of a collection to search in."""
    if not isinstance(data.get("text"), str) or not data["text"].strip():
        raise BadRecord(
            "passage without text", f"text is {_shown(data, 'text')}; give the passage's text"
        )
    if not isinstance(data.get("title", ""), str | None):
        raise BadRecord(
            "title is not text", f"title is {_shown(data, 'title')}; give text or leave it out"
        )
    return _without_null(data, "id", "title")


def _without_null(data: dict, *keys: str) -> dict:
    """The record without those of the keys whose value is null."""
    return {key: value for key, value in data.items() if value is not None or key not in keys}


def _messages(data: dict, key: str, media: bool = False) -> list[dict]:
    given = data.get(key)
    if not isinstance(given, list) or not given:
        raise BadRecord(
            "no messages", f"{key} is {_shown(data, key)}; give a list of {{role, content}}"
        )
    return [_message(message, f"{key}[{place}]", media) for place, message in enumerate(given)]


def _message(given: object, where: str, media: bool = False) -> dict:
    if not isinstance(given, dict):
        raise BadRecord(
            "message is not an object", f"{where} is {named(given)}; give {{role, content}}"
        )
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise BadRecord(
            "role is not text",
            f"the role of {where} is {_shown(given, 'role')}; give a name such as user or "
            "assistant",
        )
    role = ROLES.get(role, role)
    types = ("text", *MEDIA_TYPES) if media else ("text",)
    message = {"role": role, "content": _content(given, where, role, types)}
    if len(given) == 2 and "content" in given:
        return message
    kind = given.get("type")
    if kind is not None and kind not in types:
        give = "recipes/multimodal.py reads it" if kind in MEDIA_TYPES else "give one of these"
        raise BadRecord(
            "message type",
            f"the type of {where} is {_shown(given, 'type')}, not {' or '.join(types)}; {give}",
        )
    # an optional key that is null counts as absent
    more = {key: x for key, x in given.items() if key not in REPLACED and x is not None}
    message = more | message
    _check_fields(message, where)
    if kind:
        message["type"] = kind
    loss = _loss(given, where)
    return message if loss is None else message | {"loss": loss}


def _content(given: dict, where: str, role: str, types: tuple[str, ...]) -> str | list | None:
    """The content of a message: text, null beside calls, or parts where not all are text."""
    content = given.get("content")
    if isinstance(content, list) and content:
        parts = [_part(part, f"{where}.content[{i}]", types) for i, part in enumerate(content)]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["content"] for part in parts)
        return parts
    calls = given.get("tool_calls") or given.get("function_call")
    if not isinstance(content, str) and (content is not None or not calls):
        raise BadRecord(
            "content is not text",
            f"the content of {where} ({role}) is {_shown(given, 'content')}; give text",
        )
    return content


def _loss(given: dict, where: str) -> bool | int | float | None:
    """Whether, or with what weight, a message is learned; None where it does not say."""
    if REPLACED.isdisjoint(given):
        return None
    off = given.get("disable_loss")
    if off is not None and not isinstance(off, bool):
        raise BadRecord(
            "disable_loss is not a bool",
            f"disable_loss of {where} is {_shown(given, 'disable_loss')}; give true or false",
        )
    said = {name: given[name] for name in LOSS_NAMES if given.get(name) is not None}
    for name, loss in said.items():
        weight = isinstance(loss, int | float) and 0 <= loss < MAX_NUMBER
        if not isinstance(loss, bool) and not weight:
            raise BadRecord(
                f"{name} is not a weight",
                f"the {name} of {where} is {_shown(given, name)}; give true, false or a weight "
                "from 0",
            )
    said |= {"disable_loss": False} if off else {}
    if len({float(loss) for loss in said.values()}) > 1:
        raise BadRecord(
            "weights disagree",
            f"{where} has {' and '.join(said)} at once, and they disagree; keep one",
        )
    return next(iter(said.values()), None)


def _check_fields(message: dict, where: str) -> None:
    """Check what a message holds beside its content, in place; null counts as absent."""
    for key in (*REASONING, "tool_calls", "function_call", "tool_call_id", "name"):
        if message.get(key) == []:
            del message[key]
    if (call := message.pop("function_call", None)) and "tool_calls" not in message:
        message["tool_calls"] = [{"type": "function", "function": call}]
    for key in (*REASONING, "tool_call_id", "name"):
        if not isinstance(message.get(key, ""), str):
            raise BadRecord(
                f"{key} is not text",
                f"{key} of {where} is {_shown(message, key)}; give text or leave it out",
            )
    calls = message.get("tool_calls", [])
    if calls and message["role"] != ANSWER:
        raise BadRecord(
            f"tool calls in a message of role {message['role']}",
            f"{where} of role {message['role']} has tool_calls; only an answer calls tools",
        )
    for place, call in enumerate(calls if isinstance(calls, list) else [calls]):
        inner = call.get("function", call) if isinstance(call, dict) else {}
        known = isinstance(inner, dict) and isinstance(inner.get("name"), str)
        if not known or not isinstance(inner.get("arguments"), dict | str | None):
            raise BadRecord(
                "tool call",
                f"{where}.tool_calls[{place}] is no call; give {{type: function, function: {{name, "
                "arguments}}, arguments an object",
            )


def _with_arguments(data: dict) -> dict:
    """The record with what the chat template is given beside messages, checked."""
    optional = ("tools", "documents", "chat_template_kwargs", "functions")
    absent = (None, [], {}, "")
    data = {key: x for key, x in data.items() if key not in optional or x not in absent}
    if "functions" in data and "tools" not in data:
        functions = data.pop("functions")
        tools = [{"type": "function", "function": function} for function in _list(functions)]
        data["tools"] = tools
    for key in ("tools", "documents"):
        if key in data:
            if isinstance(data[key], str):
                with suppress(ValueError):
                    data[key] = json.loads(data[key])
            if not _list(data[key]) or not all(isinstance(item, dict) for item in data[key]):
                raise BadRecord(
                    f"{key} is no list of objects",
                    f"{key} is {_shown(data, key)}; give a list of objects, as the chat template "
                    "reads them",
                )
    own = data.get("chat_template_kwargs", {})
    taken = ", ".join(sorted(RESERVED.intersection(own))) if isinstance(own, dict) else ""
    if taken or not isinstance(own, dict):
        raise BadRecord(
            "chat_template_kwargs",
            f"chat_template_kwargs is {_shown(data, 'chat_template_kwargs')}"
            + (f" with {taken}, which is given otherwise" if taken else "")
            + '; give an object such as {"enable_thinking": false}',
        )
    return data


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _part(given: object, where: str, types: tuple[str, ...]) -> dict:
    """A part of a message as {type, content}.

    Read as well are OpenAI's {"type": "text", "text": ...} and {"type": "image_url", "image_url":
    {"url": path}}, and {"type": "image", "image" or "path" or "url": path}.
    """
    part = given if isinstance(given, dict) else {}
    kind = "image" if part.get("type") == "image_url" else part.get("type")
    content = next((part[key] for key in PART_KEYS if part.get(key) is not None), None)
    if isinstance(content, dict):
        content = content.get("url") or content.get("path")
    if kind in MEDIA_TYPES and kind not in types and isinstance(content, str):
        raise BadRecord(
            f"{kind} where only text is read",
            f"{where} is {kind}, and this reads text; give it to recipes/multimodal.py",
        )
    if kind not in types or not isinstance(content, str):
        raise BadRecord(
            "part of a message",
            f"{where} is {named(given)}; give {{type, content}} with text or path, type one of "
            f"{', '.join(types)}",
        )
    return {"type": kind, "content": content}


def _answer(data: dict, key: str) -> dict:
    given = data.get(key)
    if given is None:
        raise BadRecord(
            "no answer", f"{key} is {_shown(data, key)}; give {{role, content}} or text"
        )
    if isinstance(given, list) and len(given) == 1:
        (given,) = given
    if isinstance(given, str):
        given = {"role": "assistant", "content": given}
    answer = _message(given, key)
    if answer["role"] != "assistant":
        raise BadRecord(
            "answer of another role",
            f"the role of {key} is {answer['role']!r}; an answer's role is assistant",
        )
    if (weight := answer.get("loss")) not in (None, 0, 1):
        raise BadRecord(
            "weight of a compared answer",
            f"{key} has the weight {weight}, and comparing answers takes each as a whole; "
            "leave the weight out",
        )
    return answer


def _number(data: dict, key: str, reason: str) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
        raise BadRecord(reason, f"{key} is {_shown(data, key)}; give a number or leave it out")
    return float(value)


def _shown(data: dict, key: str) -> str:
    if key not in data:
        return "missing"
    value = data[key]
    if isinstance(value, list | dict):
        return f"{named(value)} of {len(value)}"
    return json.dumps(value, ensure_ascii=False)[:40]
