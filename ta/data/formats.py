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
MEDIA_FIELDS = ("image", "images", "audio", "audios")
BESIDE_TURNS = "system image images audio audios messages"
BESIDE_INSTRUCTION = "input output system history"
BESIDE_ANSWERS = "prompt margin"
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
    # names of the fields that each record of the format has
    fields: str
    # what takes the place of the fields; BadRecord where a record cannot be converted
    new: Callable[[dict], dict]
    # names of fields that are replaced too, where they are there
    more: str = ""
    # what else a record of the format is
    test: Callable[[dict], bool] = bool

    def holds(self, data: dict) -> bool:
        """Whether a record is of this format, by its fields."""
        return all(key in data for key in self.fields.split()) and self.test(data)

    def convert(self, data: dict) -> dict:
        """The record in the fields that the checkers know."""
        replaced = f"{self.fields} {self.more}".split()
        return {key: data[key] for key in data if key not in replaced} | self.new(data)


def from_turns(data: dict) -> dict:
    """ShareGPT and LLaVA: {"conversations": [{from, value}], system?, tools?, image?} -> messages.

    `<image>` in a turn is the place of the next picture of `image` (a path or a list of them).
    A turn may also be {role, content}. Keys of a turn beside these stay.
    """
    messages = [_turn(turn, i) for i, turn in enumerate(data["conversations"])]
    if data.get("system"):
        messages.insert(0, {"role": SYSTEM, "content": data["system"]})
    return from_pictured(data | {"messages": messages}) | _tools(data)


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
    return {"messages": messages}


def from_turn_pairs(data: dict) -> dict:
    """ShareGPT with preferences: conversations and the turns chosen and rejected."""
    asked = from_turns(data)
    answers = {
        name: _turn(data[key], key) if isinstance(data[key], dict) else data[key]
        for key, name in (("chosen", "answer_w"), ("rejected", "answer_l"))
    }
    return {"context": asked.pop("messages"), **asked, **answers}


def from_turns_labelled(data: dict) -> dict:
    """ShareGPT with a KTO tag: the last turn is the answer, `kto_tag` says whether it is good."""
    asked = from_turns(data)
    messages, labelled = asked.pop("messages"), {"is_desirable": data["kto_tag"]}
    return {"context": messages[:-1], "answer": messages[-1:], **asked, **labelled}


def from_instruction(data: dict) -> dict:
    """Alpaca: {instruction, input?, output, system?, history?: [[question, answer]]} -> messages.

    The question is the instruction and, where there is one, the input on the next line.
    """
    asked, said = _asked(data), data.get("output")
    answer = [] if said is None else [{"role": ANSWER, "content": said}]
    return {"messages": [*asked, *answer], **_tools(data)}


def from_instruction_pairs(data: dict) -> dict:
    """Alpaca with preferences: chosen and rejected in place of output."""
    return {"context": _asked(data), "answer_w": data["chosen"], "answer_l": data["rejected"]}


def from_instruction_labelled(data: dict) -> dict:
    """Alpaca with a KTO tag: `kto_tag` says whether the output is good."""
    labelled = {"answer": data.get("output"), "is_desirable": data["kto_tag"]}
    return {"context": _asked(data), **labelled}


def from_completion(data: dict) -> dict:
    """TRL's prompt and completion, both text or both messages -> messages.

    Only the completion is learned: earlier answers, in the prompt, get `"loss": false`.
    """
    for key in ("prompt", "completion"):
        if not isinstance(data[key], str | list):
            what = f"{key} is {named(data[key])}; give text or messages"
            raise BadRecord(f"{key} is not text", what)
    messages = []
    for message in _messages_of(data["prompt"], "user"):
        answer = isinstance(message, dict) and message.get("role") in (ANSWER, "bot")
        messages.append({**message, "loss": False} if answer else message)
    return {"messages": messages + _messages_of(data["completion"], ANSWER)}


def from_prompt(data: dict) -> dict:
    """A prompt alone, text or messages, to be answered -> messages."""
    return {"messages": _messages_of(data["prompt"], "user")}


def from_text(data: dict) -> dict:
    """Plain text, all of it learned -> one message that no template writes around."""
    return {"messages": [{"role": ANSWER, "content": data["text"], "plain": True}]}


def from_text_label(data: dict) -> dict:
    """A text with its class -> a question with its class."""
    return {"messages": _messages_of(data["text"], "user")}


def from_preference(data: dict) -> dict:
    """TRL's preference: {prompt?, chosen, rejected, margin?} -> context, answer_w, answer_l.

    Chosen and rejected are answers (text or messages), or whole dialogues of messages with a
    common beginning, which then is the prompt.
    """
    (*start, better), (*other, worse) = (
        given if isinstance(given, list) and given else [given]
        for given in (data.get("chosen"), data.get("rejected"))
    )
    if start != other:
        raise BadRecord(
            "dialogues differ early",
            "chosen and rejected differ before their last message; give both the same beginning",
        )
    prompt = data.get("prompt")
    context = start if prompt is None else _messages_of(prompt, "user")
    if start and (not isinstance(context, list) or start[-len(context) :] != context):
        raise BadRecord(
            "prompt not in chosen",
            "chosen starts with other messages than prompt; give the prompt once, or twice the "
            "same",
        )
    margin = data.get("precomputed_margin", data.get("margin"))
    answers = {"answer_w": better, "answer_l": worse}
    return {"precomputed_margin": margin, **answers, "context": start or context}


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
    """TRL's unpaired preference (KTO): {prompt, completion, label} -> a labelled answer.

    A label is true or false, or as a table may hold them, 1 or 0.
    """
    labelled = {"answer": data["completion"], "is_desirable": bool(data["label"])}
    return {"context": _messages_of(data["prompt"], "user"), **labelled}


def from_preferred(data: dict) -> dict:
    """OpenAI's preference: input (messages), preferred_output and non_preferred_output."""
    given = data["input"] if isinstance(data["input"], dict) else {}
    answers = {"answer_w": data["preferred_output"], "answer_l": data["non_preferred_output"]}
    kept = {key: given[key] for key in given if key in ("tools", "documents")}
    return {**kept, "context": given.get("messages"), **answers}


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
    rest = {key: turn[key] for key in turn if key not in ("from", "value")}
    message = rest | {"role": role, "content": turn.get("value")}
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


def _tools(data: dict) -> dict:
    """The record's `tools` as a list, where they are JSON text."""
    tools = data.get("tools")
    if not isinstance(tools, str):
        return {}
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
    return {"tools": whole}


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
    history = data.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
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


def _turns(data: dict) -> bool:
    return isinstance(data["conversations"], list)


def _places_apart(data: dict) -> bool:
    """Whether messages have places for pictures that stand in a field of the record."""
    messages, apart = data["messages"], any(map(data.get, MEDIA_FIELDS))
    return isinstance(messages, list) and apart and any(map(_has_places, messages))


def _texts(data: dict, begin: str = "") -> bool:
    both = [data["chosen"], data["rejected"]]
    return all(isinstance(text, str) and text.startswith(begin) for text in both)


_is_text = lambda data: isinstance(data["text"], str)
PICTURED = Format(
    "messages with pictures apart",
    "conversations",
    "",
    "messages",
    from_pictured,
    "image images audio audios",
    _places_apart,
)
PROMPT = Format("prompts", "prompts", "prompt", "prompt", from_prompt)
TEXT = Format("plain text", "texts", "text", "text", from_text, "", _is_text)
TEXT_LABEL = Format("text and label", "texts", "text", "text", from_text_label, "", _is_text)
CHAT_FORMATS = (
    Format(
        "LLaVA",
        "conversations",
        "turns",
        "conversations",
        from_turns,
        BESIDE_TURNS,
        lambda data: _turns(data) and any(map(data.get, MEDIA_FIELDS)),
    ),
    Format(
        "ShareGPT",
        "conversations",
        "turns",
        "conversations",
        from_turns,
        BESIDE_TURNS,
        _turns,
    ),
    Format("Alpaca", "instructions", "Alpaca", "instruction", from_instruction, BESIDE_INSTRUCTION),
    Format(
        "prompt and completion",
        "completions",
        "completion",
        "prompt completion",
        from_completion,
    ),
)
PAIR_FORMATS = (
    Format(
        "ShareGPT with preferences",
        "pairs",
        "turns",
        "conversations chosen rejected",
        from_turn_pairs,
        BESIDE_TURNS,
        _turns,
    ),
    Format(
        "Alpaca with preferences",
        "pairs",
        "Alpaca",
        "instruction chosen rejected",
        from_instruction_pairs,
        BESIDE_INSTRUCTION,
    ),
    Format(
        "HH dialogues as text",
        "pairs",
        "HH",
        "chosen rejected",
        from_dialogue_texts,
        BESIDE_ANSWERS,
        lambda data: _texts(data, "\n\nHuman:"),
    ),
    Format(
        "pairs of texts that begin with their prompt",
        "pairs",
        "preference",
        "chosen rejected",
        from_shared_text,
        BESIDE_ANSWERS,
        lambda data: data.get("prompt") is None and _texts(data),
    ),
    Format(
        "TRL preference",
        "pairs",
        "preference",
        "",
        from_preference,
        "chosen rejected prompt margin",
        lambda data: "chosen" in data or "rejected" in data,
    ),
    Format(
        "OpenAI preference",
        "pairs",
        "OpenAI",
        "input preferred_output non_preferred_output",
        from_preferred,
    ),
)
LABELLED_FORMATS = (
    Format(
        "ShareGPT with a KTO tag",
        "answers",
        "turns",
        "conversations kto_tag",
        from_turns_labelled,
        BESIDE_TURNS,
        _turns,
    ),
    Format(
        "Alpaca with a KTO tag",
        "answers",
        "Alpaca",
        "instruction kto_tag",
        from_instruction_labelled,
        BESIDE_INSTRUCTION,
    ),
    Format(
        "TRL unpaired preference",
        "answers",
        "unpaired",
        "prompt completion label",
        from_unpaired,
        "",
        lambda data: data["label"] in (False, True),
    ),
)
# of each checker: the formats that are converted for it
FORMATS: dict[Check, tuple[Format, ...]] = {
    check_chat: (*CHAT_FORMATS, TEXT),
    check_media: (PICTURED, *CHAT_FORMATS, PROMPT),
    check_class: (*CHAT_FORMATS, TEXT_LABEL, PROMPT),
    **dict.fromkeys((check_prompt, check_question, check_candidates), (*CHAT_FORMATS, PROMPT)),
    check_pair: PAIR_FORMATS,
    check_labelled: LABELLED_FORMATS,
}
# who reads the formats that others refuse: their canonical records have a context, not messages
READERS = {PAIR_FORMATS: "recipes/rm.py and recipes/dpo.py", LABELLED_FORMATS: "recipes/kto.py"}
# a field of the canonical records that each of these reads
FIELDS = {PAIR_FORMATS: "answer_w", LABELLED_FORMATS: "is_desirable"}


def format_of(data: dict, check: Check) -> Format | None:
    """The format from which a record is converted for a checker; None where it stays as it is.

    BadRecord for a record that another method reads, such as pairs where chats are wanted.
    """
    while isinstance(check, partial):
        check = check.func
    formats = FORMATS.get(check, ())
    own = "context" if formats in READERS else "messages"
    if not formats or (own in data and not (PICTURED in formats and PICTURED.holds(data))):
        return None
    for others, recipes in READERS.items():
        found = next((form.name for form in others if form.holds(data)), None)
        if FIELDS[others] in data:
            found = f"one with {FIELDS[others]}"
        if found and others is not formats:
            raise BadRecord(
                "record of another method",
                f"the record is {found}, and {own} is missing; give it to {recipes}",
            )
    found = next((form for form in formats if form.holds(data)), None)
    if found is None:
        fields = ", ".join(list(data)[:8]) or "none"
        known = ", ".join(form.name for form in formats)
        raise BadRecord(
            f"no {own}", f"{own} is missing (fields: {fields}); give it, or a record of {known}"
        )
    return found
