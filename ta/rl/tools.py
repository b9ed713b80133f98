"""Tools in rollouts: answers that call functions go on behind what the functions return.

What a template writes around a result is appended as ids; nothing of an answer is encoded again,
and nothing that a tool wrote is learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from os.path import commonprefix
from typing import Any, NamedTuple

from ta.chat.messages import ANSWER, template_arguments
from ta.chat.render import render_chat, tokenize_chats
from ta.chat.tokenizer import ChatTokenizer
from ta.data.jsonl import naming
from ta.files import hash_json
from ta.generation.settings import Answer, GenerateConfig
from ta.rl.function_pool import FunctionPool
from ta.rl.settings import RewardConfig, ToolConfig
from ta.rl.worker import TOOLS

# (token ids of prompts, config=, keys=) -> the answers to each
Ask = Callable[..., list[list[Answer]]]
DECODER = json.JSONDecoder()
# a call, by which a template shows how it writes calls
NAME, ARGUMENTS = "tool_name", {"first_key": "first value", "second_key": "second value"}
TEXT = {"type": "string"}


class Call(NamedTuple):
    """A function that an answer calls."""

    name: str
    arguments: dict[str, Any]


class CallForm(NamedTuple):
    """How a template writes calls."""

    # finds where calls begin
    opening: re.Pattern
    # (text, what opened, where the next calls begin) -> the calls; what is broken raises
    read: Callable[[str, re.Match, int], list[Call]]


def json_calls(name: str, arguments: str, text: str, place: re.Match, end: int) -> list[Call]:
    """Calls written as JSON, with the keys of name and arguments; nothing follows bare JSON."""
    value, stop = DECODER.raw_decode(text, place.end())
    if not place[0].strip() and text[stop:].strip():
        raise ValueError("a text begins with JSON")
    calls = value if isinstance(value, list) else [value]
    return [Call(call[name], dict(call[arguments])) for call in calls]


def tagged_calls(parameter: re.Pattern, text: str, place: re.Match, end: int) -> list[Call]:
    """A call written as a name and texts between tags: <function=NAME><parameter=KEY>TEXT."""
    # the last tag of a name may open a parameter
    return [Call(place[1], dict(parameter.findall(text[place.end() - 1 : end])))]


@dataclass
class Talk:
    """An answer to the prompt of a record, with the results of the calls that it made."""

    record: dict
    prompt: list[int]
    # its sampling is seeded with these
    key: tuple[int, int]
    # the last turn
    last: Answer
    # the messages before it: answers with calls, and results
    turns: list[dict] = field(default_factory=list)
    # calls that raised, took too long, or named no tool
    failed: int = 0
    # values of reward functions, and their weighted sum
    parts: dict[str, float | None] = field(default_factory=dict)
    reward: float | None = None

    def __post_init__(self):
        # behind the prompt, results included
        self.ids = list(self.last.ids)
        # of each id; None where a tool or the template wrote it
        self.logprobs: list[float | None] = list(self.last.logprobs)


def open_tools(config: ToolConfig, tokenizer: ChatTokenizer, limits: RewardConfig) -> Tools | None:
    """The tools of a file, which have the limits of rewards; None where there is none."""
    return None if config.tools is None else Tools(config, tokenizer, limits)


class Tools:
    """The functions of a file, which answers may call.

    ValueError for a file that does not load, and for a template whose calls cannot be read.
    """

    def __init__(self, config: ToolConfig, tokenizer: ChatTokenizer, limits: RewardConfig):
        self.tokenizer, self.max_turns = tokenizer, config.max_turns
        names = [TOOLS + config.tools]
        self.functions = FunctionPool(names, limits.reward_processes, limits.reward_seconds)
        ((_, schemas, fault),) = self.functions.run([(0, ["", {}])])
        if fault or not schemas:
            raise ValueError(f"--tools {config.tools}: {fault or 'it has no function'}")
        # what chat templates are told of them
        self.schemas: list[dict] = schemas
        about = [schema["function"] for schema in schemas]
        self.parameters = {tool["name"]: tool["parameters"]["properties"] for tool in about}
        with naming(f"--tools {config.tools}"):
            self.form = call_form(tokenizer, schemas)

    def calls_in(self, text: str) -> tuple[str, list[Call]]:
        """(the text before the first call, the calls) of an answer; one that is broken is none."""
        places = list(self.form.opening.finditer(text))
        ends = [*(place.start() for place in places[1:]), len(text)]
        try:
            read = [self.form.read(text, *pair) for pair in zip(places, ends, strict=False)]
            calls = [self._typed(call) for some in read for call in some]
        except (ValueError, KeyError, TypeError):
            return text, []
        return (text[: places[0].start()], calls) if calls else (text, [])

    def _typed(self, call: Call) -> Call:
        """The call with JSON in place of texts, where its tool takes no text."""
        known, typed = self.parameters.get(call.name, {}), dict(call.arguments)
        for key, value in typed.items():
            if isinstance(value, str) and known.get(key, TEXT) != TEXT:
                typed[key] = json.loads(value)
        return Call(call.name, typed)

    def converse(self, talks: Sequence[Talk], ask: Ask, settings: GenerateConfig) -> None:
        """Go on with the answers until none calls a tool.

        Also until `max_turns`, and until the most tokens of the settings, those of results
        included: a result for which there is no room ends an answer. `ask` answers the prompts of
        further turns, whose sampling depends on the key of the talk and the turn.
        """
        longest, live = settings.max_new_tokens, talks
        for turn in range(1, self.max_turns):
            ended = [talk for talk in live if talk.last.finish == "stop"]
            said = [self.calls_in(self._text(talk.last.ids[:-1])) for talk in ended]
            results = self._results([call for _, calls in said for call in calls])
            live = []
            for talk, (before, calls) in zip(ended, said, strict=True):
                if not calls:
                    continue
                given = list(islice(results, len(calls)))
                talk.failed += sum(bool(fault) for _, fault in given)
                talk.turns += messages_of(before, calls, [text for text, _ in given], turn)
                messages = [*talk.record["messages"], *talk.turns]
                about = template_arguments(talk.record)
                more = ids_behind(self.tokenizer, messages, len(calls), about)
                if len(talk.ids) + len(more) >= longest:
                    talk.last = talk.last._replace(finish="length")
                    continue
                talk.ids += more
                talk.logprobs += [None] * len(more)
                live.append(talk)
            if not live:
                return
            room = max(longest - len(talk.ids) for talk in live)
            one = replace(settings, num_answers=1, max_new_tokens=room)
            prompts = [[*talk.prompt, *talk.ids] for talk in live]
            keys = [int(hash_json([*talk.key, turn])[:15], 16) for talk in live]
            for talk, (answer,) in zip(live, ask(prompts, config=one, keys=keys), strict=True):
                talk.last = self._cut(answer, longest - len(talk.ids))
                talk.ids += talk.last.ids
                talk.logprobs += talk.last.logprobs

    def _results(self, calls: Sequence[Call]) -> Iterator[tuple[str, str]]:
        """(what the model is told, fault) of each call."""
        told = {}
        for place, text, fault in self.functions.run([(0, list(call)) for call in calls]):
            told[place] = (f"error: {fault}" if fault else text), fault
        return (told[place] for place in range(len(calls)))

    def _cut(self, answer: Answer, room: int) -> Answer:
        if len(answer.ids) <= room:
            return answer
        text = self._text(answer.ids[:room], skip_special_tokens=True)
        return Answer(answer.ids[:room], text, "length", answer.logprobs[:room])

    def _text(self, ids: list[int], **more: bool) -> str:
        return self.tokenizer.fast.decode(ids, clean_up_tokenization_spaces=False, **more)


def messages_of(
    said: str, calls: Sequence[Call], results: Sequence[str], turn: int = 1
) -> list[dict]:
    """An answer with calls and their results, as messages of a chat."""
    asked, told = [], []
    for n, (call, text) in enumerate(zip(calls, results, strict=True)):
        # some templates ask for ids of nine letters or digits
        name = f"{1000 * turn + n:09}"
        asked.append({"id": name, "type": "function", "function": call._asdict()})
        told.append({"role": "tool", "name": call.name, "tool_call_id": name, "content": text})
    return [{"role": ANSWER, "content": said.strip(), "tool_calls": asked}, *told]


def ids_behind(
    tokenizer: ChatTokenizer, messages: Sequence[dict], results: int, arguments: dict
) -> list[int]:
    """The ids between the end token of the answer that called and the next answer.

    `messages` end with that answer and so many `results`. ValueError where no token ends it.
    """
    weights = [0.0] * len(messages)
    rendered = render_chat(messages, tokenizer.template, weights, True, arguments)
    (found,) = tokenize_chats([rendered], tokenizer.vocabulary)
    ids, last = found.tokens.ids, len(messages) - results
    start, end = sum(found.lengths[: last - 1]), sum(found.lengths[:last])
    for place in range(end - 1, start - 1, -1):
        if ids[place] in tokenizer.stop_ids:
            return ids[place + 1 :]
    raise ValueError("the chat template ends no answer by a token that stops it")


def call_form(tokenizer: ChatTokenizer, schemas: Sequence[dict]) -> CallForm:
    """How the template writes calls; ValueError where it is in neither way."""
    call, asked = Call(NAME, ARGUMENTS), {"role": "user", "content": "x"}
    messages = [asked, *messages_of("", [call], ["x"])]
    arguments = {"tools": list(schemas)}
    ids_behind(tokenizer, messages, 1, arguments)
    *_, answer, _, opened = render_chat(messages, tokenizer.template, [0.0] * 3, True, arguments)
    text, header = ("".join(piece.text for piece in pieces) for pieces in (answer, opened))
    text = text.removeprefix(header)
    for start in (place for place, letter in enumerate(text) if letter in "[{"):
        try:
            value, _ = DECODER.raw_decode(text, start)
        except ValueError:
            continue
        one = value[0] if isinstance(value, list) and value else value
        keys = {str(x): key for key, x in one.items()} if isinstance(one, dict) else {}
        if keys.keys() >= {NAME, str(ARGUMENTS)}:
            before = re.escape(text[:start].strip()) or r"\A"
            read = partial(json_calls, keys[NAME], keys[str(ARGUMENTS)])
            return CallForm(re.compile(before + r"\s*"), read)
    marks = (NAME, *(part for item in ARGUMENTS.items() for part in item))
    between_marks = "(.*?)".join(["", *map(re.escape, marks), ""])
    if found := re.fullmatch(between_marks, text, re.DOTALL):
        before, to_key, to_value, between, again, end = found.groups()
        # what closes a value, and what then opens a key
        close = commonprefix([between, end])  # noqa: RUF071 (of texts, not of paths)
        key = between.removeprefix(close)
        tag = before.rstrip().rpartition("\n")[2]
        if tag and key and close and to_value == again and to_key.endswith(key):
            parts = (tag, to_key.removesuffix(key), key, to_value, close)
            tag, after, key, to_value, close = map(re.escape, parts)
            parameter = re.compile(f"{key}(.+?){to_value}(.*?){close}", re.DOTALL)
            name = re.compile(f"{tag}(.+?){after}", re.DOTALL)
            return CallForm(name, partial(tagged_calls, parameter))
    raise ValueError(f"the chat template writes calls in a way that is not read: {text[:80]!r}")
