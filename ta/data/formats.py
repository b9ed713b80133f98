"""Formats in which people have their records: each a pure function to the canonical record.

What a record is, its fields tell (`convert`). Sources of the formats:

* ShareGPT and Alpaca, with their preference and KTO columns: LLaMA-Factory, data/README.md
* prompt-completion, preference and unpaired preference, text: TRL, docs/source/dataset_formats.md
* preference fine-tuning with preferred_output: OpenAI, guides/direct-preference-optimization
* LLaVA: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
* HH: Anthropic's hh-rlhf, README.md (chosen and rejected are whole dialogues as text)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from ta.chat.messages import ANSWER, SYSTEM
from ta.data.jsonl import BadRecord, named
from ta.data.records import (
    PART_KEYS,
    Check,
    check_candidates,
    check_chat,
    check_class,
    check_labelled,
    check_media,
    check_pair,
    check_prompt,
    check_question,
)

# who speaks in ShareGPT's turns; any other name is a role as it stands
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), ANSWER),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "function_call",
}
ALPACA_FIELDS = ("instruction", "input", "output", "system", "history")
MEDIA_FIELDS = ("image", "images", "audio", "audios")
MEDIA = re.compile(r"<(image|audio)>")
WORDS = re.compile(r".*\s", re.DOTALL)
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Format(NamedTuple):
    """A format that records may come in."""

    name: str
    # what one record is
    unit: str
    # formats of one family may stand in one file
    family: str
    # whether a record is of this format, by its fields
    holds: Callable[[dict], bool]
    # the record in the fields that the checkers know; BadRecord where it cannot be
    convert: Callable[[dict], dict]


def from_turns(data: dict) -> dict:
    """ShareGPT and LLaVA: {"conversations": [{from, value}], system?, tools?, image?} -> messages.

    `<image>` in a turn is the place of the next picture of `image` (a path or a list of them).
    A turn may also be {role, content}. Keys of a turn beside these stay.
    """
    rest = _without(data, "conversations", "system")
    messages = [_turn(turn, i) for i, turn in enumerate(data["conversations"])]
    if data.get("system"):
        messages.insert(0, {"role": SYSTEM, "content": data["system"]})
    return _with_tools(from_pictured({**rest, "messages": messages}))


def from_pictured(data: dict) -> dict:
    """TRL's and LLaVA's pictures: {"messages", "images"}, and places for them in the messages.

    A place is `<image>` in a text, or a part {"type": "image"}; files are taken in order.
    """
    media = {kind: _paths(data, kind) + _paths(data, f"{kind}s") for kind in ("image", "audio")}
    messages = data["messages"]
    if any(media.values()):
        messages = [_with_media(message, media) for message in messages]
    for kind, left in media.items():
        if left:
            raise BadRecord(
                f"{kind} without a place",
                f"{len(left)} of the record's {kind} files have no <{kind}> in a turn; give each "
                "its place",
            )
    return {**_without(data, *MEDIA_FIELDS), "messages": messages}


def from_turn_pairs(data: dict) -> dict:
    """ShareGPT with preferences: conversations and the turns chosen and rejected."""
    asked = from_turns(_without(data, "chosen", "rejected"))
    answers = {
        name: _turn(data[key], key) if isinstance(data[key], dict) else data[key]
        for key, name in (("chosen", "answer_w"), ("rejected", "answer_l"))
    }
    return {**_without(asked, "messages"), "context": asked["messages"], **answers}


def from_turns_labelled(data: dict) -> dict:
    """ShareGPT with a KTO tag: the last turn is the answer, `kto_tag` says whether it is good."""
    messages = from_turns(_without(data, "kto_tag"))
    *context, answer = messages.pop("messages")
    return {**messages, "context": context, "answer": answer, "is_desirable": data["kto_tag"]}


def from_instruction(data: dict) -> dict:
    """Alpaca: {instruction, input?, output, system?, history?: [[question, answer]]} -> messages.

    The question is the instruction and, where there is one, the input on the next line.
    """
    rest, asked = _without(data, *ALPACA_FIELDS), _asked(data)
    answer = [] if data.get("output") is None else [{"role": ANSWER, "content": data["output"]}]
    return _with_tools({**rest, "messages": [*asked, *answer]})


def from_instruction_pairs(data: dict) -> dict:
    """Alpaca with preferences: chosen and rejected in place of output."""
    rest = _without(data, *ALPACA_FIELDS, "chosen", "rejected")
    answers = {"answer_w": data["chosen"], "answer_l": data["rejected"]}
    return {**rest, "context": _asked(data), **answers}


def from_instruction_labelled(data: dict) -> dict:
    """Alpaca with a KTO tag: `kto_tag` says whether the output is good."""
    rest = _without(data, *ALPACA_FIELDS, "kto_tag")
    labelled = {"answer": data.get("output"), "is_desirable": data["kto_tag"]}
    return {**rest, "context": _asked(data), **labelled}


def from_completion(data: dict) -> dict:
    """TRL's prompt and completion, both text or both messages -> messages.

    Only the completion is learned: earlier answers, in the prompt, get `"loss": false`.
    """
    for key in ("prompt", "completion"):
        if not isinstance(data[key], str | list):
            what = f"{key} is {named(data[key])}; give text or messages"
            raise BadRecord(f"{key} is not text", what)
    prompt = [
        {**message, "loss": False} if _answers(message) else message
        for message in _messages_of(data["prompt"], "user")
    ]
    answers = _messages_of(data["completion"], ANSWER)
    return {**_without(data, "prompt", "completion"), "messages": [*prompt, *answers]}


def from_prompt(data: dict) -> dict:
    """A prompt alone, text or messages, to be answered -> messages."""
    return {**_without(data, "prompt"), "messages": _messages_of(data["prompt"], "user")}


def from_text(data: dict) -> dict:
    """Plain text, all of it learned -> one message that no template writes around."""
    text = {"role": ANSWER, "content": data["text"], "plain": True}
    return {**_without(data, "text"), "messages": [text]}


def from_text_label(data: dict) -> dict:
    """A text with its class -> a question with its class."""
    question = {"role": "user", "content": data["text"]}
    return {**_without(data, "text"), "messages": [question]}


def from_preference(data: dict) -> dict:
    """TRL's preference: {prompt?, chosen, rejected, margin?} -> context, answer_w, answer_l.

    Chosen and rejected are answers (text or messages), or whole dialogues of messages with a
    common beginning, which then is the prompt.
    """
    answers, starts = {}, []
    for key, name in (("chosen", "answer_w"), ("rejected", "answer_l")):
        given = data.get(key)
        dialogue = given if isinstance(given, list) and given else [given]
        answers[name] = dialogue[-1]
        starts.append(dialogue[:-1])
    if starts[0] != starts[1]:
        raise BadRecord(
            "dialogues differ early",
            "chosen and rejected differ before their last message; give both the same beginning",
        )
    prompt, start = data.get("prompt"), starts[0]
    context = start if prompt is None else _messages_of(prompt, "user")
    if start and (not isinstance(context, list) or start[-len(context) :] != context):
        raise BadRecord(
            "prompt not in chosen",
            "chosen starts with other messages than prompt; give the prompt once, or twice the "
            "same",
        )
    rest = _without(data, "prompt", "chosen", "rejected", "margin")
    if "margin" in data:
        rest.setdefault("precomputed_margin", data["margin"])
    return {**rest, **answers, "context": start or context}


def from_shared_text(data: dict) -> dict:
    """TRL's implicit prompt: the whole words with which both chosen and rejected begin."""
    texts = [data["chosen"].rstrip(), data["rejected"].rstrip()]
    pairs = enumerate(zip(*texts, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(map(len, texts)))
    asked = WORDS.match(texts[0], 0, same)
    if not asked or not asked[0].strip():
        raise BadRecord(
            "no prompt",
            "chosen and rejected are text, there is no prompt, and they do not begin alike; give "
            "the question as prompt, or whole dialogues as messages",
        )
    chosen, rejected = (text[asked.end() :] for text in texts)
    asked = asked[0].strip()
    return from_preference({**data, "prompt": asked, "chosen": chosen, "rejected": rejected})


def from_dialogue_texts(data: dict) -> dict:
    """HH: chosen and rejected are dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    chosen, rejected = (_turns_of(data[key], key) for key in ("chosen", "rejected"))
    return from_preference({**data, "chosen": chosen, "rejected": rejected})


def from_unpaired(data: dict) -> dict:
    """TRL's unpaired preference (KTO): {prompt, completion, label: bool} -> a labelled answer."""
    completion = data["completion"]
    answer = completion[0] if isinstance(completion, list) and len(completion) == 1 else completion
    labelled = {"answer": answer, "is_desirable": data["label"]}
    context = _messages_of(data["prompt"], "user")
    return {**_without(data, "prompt", "completion", "label"), "context": context, **labelled}


def from_preferred(data: dict) -> dict:
    """OpenAI's preference: input (messages), preferred_output and non_preferred_output."""
    given = data["input"] if isinstance(data["input"], dict) else {}
    answers = {"answer_w": data["preferred_output"], "answer_l": data["non_preferred_output"]}
    rest = _without(data, "input", "preferred_output", "non_preferred_output")
    kept = {key: given[key] for key in given if key in ("tools", "documents")}
    return {**rest, **kept, "context": given.get("messages"), **answers}


def _turn(turn: Any, place: Any) -> dict:
    """{from, value} -> a message; {role, content} as it is."""
    if not isinstance(turn, dict):
        raise BadRecord(
            "turn is not an object",
            f"conversations[{place}] is {named(turn)}; give {{from, value}}",
        )
    if "role" in turn:
        return turn
    speaker = turn.get("from")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    message = {**_without(turn, "from", "value"), "role": role, "content": turn.get("value")}
    if role != "function_call":
        return message
    try:
        calls = json.loads(turn["value"])
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, KeyError, TypeError):
        raise BadRecord(
            "function_call is no call",
            f"the function_call of conversations[{place}] is {str(turn.get('value'))[:60]!r}; give "
            'JSON text, {"name": ..., "arguments": {...}}, or a list of these',
        ) from None
    calls = [{"type": "function", "function": function} for function in functions]
    return {**message, "role": ANSWER, "content": None, "tool_calls": calls}


def _with_tools(data: dict) -> dict:
    """The record with `tools` as a list, where they are JSON text."""
    tools = data.get("tools")
    if not isinstance(tools, str):
        return data
    try:
        tools = json.loads(tools) if tools.strip() else []
    except ValueError as error:
        raise BadRecord(
            "tools are no JSON", f"tools is text that is no JSON ({error}); give a list"
        ) from None
    listed = tools if isinstance(tools, list) else [tools]
    whole = [
        tool
        if not isinstance(tool, dict) or "function" in tool
        else {"type": "function", "function": tool}
        for tool in listed
    ]
    return {**_without(data, "tools"), **({"tools": whole} if whole else {})}


def _paths(data: dict, key: str) -> list:
    given = data.get(key)
    return [] if given in (None, "") else given if isinstance(given, list) else [given]


def _with_media(message: dict, media: dict[str, list]) -> dict:
    """The message with a file for each of its places, whose files are taken in order."""
    if not _has_places(message):
        return message
    given, parts = message["content"], []
    if isinstance(given, str):
        texts = enumerate(MEDIA.split(given))
        # the line end beside a picture belongs to the mark
        given = [
            {"type": text} if i % 2 else {"type": "text", "content": text.strip("\n")}
            for i, text in texts
            if i % 2 or text.strip("\n")
        ]
    for part in given:
        if _is_place(part):
            kind = part["type"]
            if not media[kind]:
                raise BadRecord(
                    f"{kind} without a file",
                    f"a turn has more <{kind}> than the record has {kind} files; give a file for "
                    "each",
                )
            part = {"type": kind, "content": media[kind].pop(0)}
        parts.append(part)
    return {**message, "content": parts}


def _is_place(part: Any) -> bool:
    """Whether a part of a message is the place of a picture or a sound, which stands elsewhere."""
    known = isinstance(part, dict) and part.get("type") in ("image", "audio")
    return known and not any(part.get(key) for key in PART_KEYS)


def _has_places(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return MEDIA.search(content) is not None
    return isinstance(content, list) and any(map(_is_place, content))


def _asked(data: dict) -> list[dict]:
    """The messages before Alpaca's output."""
    for key in ("instruction", "input"):
        if not isinstance(data.get(key, ""), str | None):
            raise BadRecord(f"{key} is not text", f"{key} is {named(data[key])}; give text")
    system = [{"role": SYSTEM, "content": data["system"]}] if data.get("system") else []
    earlier = []
    for pair in data.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(
                "history is no pairs",
                f"a part of history is {named(pair)}; give [question, answer] pairs",
            )
        earlier += [{"role": "user", "content": pair[0]}, {"role": ANSWER, "content": pair[1]}]
    texts = [data[key] for key in ("instruction", "input") if data.get(key)]
    return [*system, *earlier, {"role": "user", "content": "\n".join(texts)}]


def _turns_of(text: str, key: str) -> list[dict]:
    """The messages of a dialogue as HH writes it."""
    before, *parts = HH_TURN.split(text)
    if before.strip() or not parts:
        raise BadRecord(
            "no dialogue as text",
            f"{key} begins with {text[:20]!r}; give '\\n\\nHuman: ...\\n\\nAssistant: ...'",
        )
    roles = {"Human": "user", "Assistant": ANSWER}
    spoken = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in spoken]


def _messages_of(given: Any, role: str) -> Any:
    """Text as one message of the role; messages as they are."""
    return [{"role": role, "content": given}] if isinstance(given, str) else given


def _answers(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in (ANSWER, "bot")


def _without(data: dict, *keys: str) -> dict:
    return {key: value for key, value in data.items() if key not in keys}


def _has(*keys: str) -> Callable[[dict], bool]:
    """A function of a record: whether it has all of the keys."""
    return lambda data: all(key in data for key in keys)


def _turns(data: dict) -> bool:
    return isinstance(data.get("conversations"), list)


def _pictured(data: dict) -> bool:
    return _turns(data) and any(map(data.get, MEDIA_FIELDS))


def _places_apart(data: dict) -> bool:
    """Whether messages have places for pictures that stand in a field of the record."""
    messages = data.get("messages")
    return (
        isinstance(messages, list)
        and any(map(data.get, MEDIA_FIELDS))
        and any(map(_has_places, messages))
    )


def _is_text(data: dict) -> bool:
    return isinstance(data.get("text"), str)


def _texts(data: dict, begin: str = "") -> bool:
    both = [data.get(key) for key in ("chosen", "rejected")]
    return all(isinstance(text, str) and text.startswith(begin) for text in both)


LLAVA = Format("LLaVA", "conversations", "turns", _pictured, from_turns)
PICTURED = Format("messages with pictures apart", "conversations", "", _places_apart, from_pictured)
SHAREGPT = Format("ShareGPT", "conversations", "turns", _turns, from_turns)
ALPACA = Format("Alpaca", "instructions", "Alpaca", _has("instruction"), from_instruction)
COMPLETION = Format(
    "prompt and completion",
    "completions",
    "completion",
    _has("prompt", "completion"),
    from_completion,
)
PROMPT = Format("prompts", "prompts", "prompt", _has("prompt"), from_prompt)
TEXT = Format("plain text", "texts", "text", _is_text, from_text)
TEXT_LABEL = Format("text and label", "texts", "text", _is_text, from_text_label)
TURN_PAIRS = Format(
    "ShareGPT with preferences",
    "pairs",
    "turns",
    lambda data: _turns(data) and _has("chosen", "rejected")(data),
    from_turn_pairs,
)
ALPACA_PAIRS = Format(
    "Alpaca with preferences",
    "pairs",
    "Alpaca",
    _has("instruction", "chosen", "rejected"),
    from_instruction_pairs,
)
HH = Format(
    "HH dialogues as text",
    "pairs",
    "HH",
    lambda data: _texts(data, "\n\nHuman:"),
    from_dialogue_texts,
)
SHARED_TEXT = Format(
    "pairs of texts that begin with their prompt",
    "pairs",
    "preference",
    lambda data: data.get("prompt") is None and _texts(data),
    from_shared_text,
)
PREFERENCE = Format(
    "TRL preference",
    "pairs",
    "preference",
    lambda data: "chosen" in data or "rejected" in data,
    from_preference,
)
PREFERRED = Format(
    "OpenAI preference",
    "pairs",
    "OpenAI",
    _has("input", "preferred_output", "non_preferred_output"),
    from_preferred,
)
TURNS_LABELLED = Format(
    "ShareGPT with a KTO tag",
    "answers",
    "turns",
    lambda data: _turns(data) and "kto_tag" in data,
    from_turns_labelled,
)
ALPACA_LABELLED = Format(
    "Alpaca with a KTO tag",
    "answers",
    "Alpaca",
    _has("instruction", "kto_tag"),
    from_instruction_labelled,
)
UNPAIRED = Format(
    "TRL unpaired preference",
    "answers",
    "unpaired",
    lambda data: _has("prompt", "completion")(data) and isinstance(data.get("label"), bool),
    from_unpaired,
)

PAIR_FORMATS = (TURN_PAIRS, ALPACA_PAIRS, HH, SHARED_TEXT, PREFERENCE, PREFERRED)
LABELLED_FORMATS = (TURNS_LABELLED, ALPACA_LABELLED, UNPAIRED)
CHAT_FORMATS = (LLAVA, SHAREGPT, ALPACA, COMPLETION)
# of each checker: the field of a canonical record, and the formats that are converted for it
FORMATS: dict[Check, tuple[str, tuple[Format, ...]]] = {
    check_chat: ("messages", (*CHAT_FORMATS, TEXT)),
    check_prompt: ("messages", (*CHAT_FORMATS, PROMPT)),
    check_media: ("messages", (PICTURED, *CHAT_FORMATS, PROMPT)),
    check_question: ("messages", (*CHAT_FORMATS, PROMPT)),
    check_class: ("messages", (*CHAT_FORMATS, TEXT_LABEL, PROMPT)),
    check_candidates: ("messages", (*CHAT_FORMATS, PROMPT)),
    check_pair: ("context", PAIR_FORMATS),
    check_labelled: ("context", LABELLED_FORMATS),
}
# who reads the formats that others refuse
READERS = {PAIR_FORMATS: "recipes/rm.py and recipes/dpo.py", LABELLED_FORMATS: "recipes/kto.py"}


def format_of(data: dict, check: Check) -> Format | None:
    """The format from which a record is converted for a checker; None where it stays as it is.

    BadRecord for a record that another method reads, such as pairs where chats are wanted.
    """
    while isinstance(check, partial):
        check = check.func
    own, formats = FORMATS.get(check, ("", ()))
    if not own or (own in data and not (PICTURED in formats and PICTURED.holds(data))):
        return None
    for others, recipes in READERS.items():
        found = next((form for form in others if form.holds(data)), None)
        if found and found not in formats:
            raise BadRecord(
                "record of another method",
                f"the record is {found.name}, and {own} is missing; give it to {recipes}",
            )
    found = next((form for form in formats if form.holds(data)), None)
    if found is None:
        fields = ", ".join(list(data)[:8]) or "none"
        known = ", ".join(form.name for form in formats)
        raise BadRecord(
            f"no {own}", f"{own} is missing (fields: {fields}); give it, or a record of {known}"
        )
    return found
