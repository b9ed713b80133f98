"""Says of token ids and loss weights whether they are what a chat template means.

The judges are plain transformers: `apply_chat_template` for ids, the template's rendering of the
first messages for where an answer begins and ends, generation marks where a template has them. None
of the code under test is used.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cells import Cell, answer, with_text
from jinja2 import TemplateError
from templates import CONTROL

REASONING = ("reasoning_content", "reasoning", "thinking")
# templates that write reasoning of a key other than the first
REASONING_KEY = {"gptoss": "thinking", "lfm2_2_5": "thinking", "lfm2_2_5_vl": "thinking"}
FOLLOWING = answer("White instead, mostly.")
# templates whose generation marks hold more than a model writes, and what
KNOWN_MARKS = {
    "qwen2_5": "the header's newline",
    "deepseekv3": "the token that the answer follows",
    "deepseek_r1_distill": "the token that the answer follows",
    "gptoss": "the whole header",
    "muse_glimmer": "the whole header",
    **dict.fromkeys(
        (
            "nemotron_3_nano",
            "nemotron_3_super",
            "nemotron_3_ultra",
            "nemotron_3_5_lightning",
            "qwen3_5_nothink",
            "qwen3_5_think",
            "qwen3_6",
            "qwen3_8",
        ),
        "the <think> that the generation prompt opens",
    ),
}


# what follows the generation prompt and yet is not marked: the token that ends a call, and a header
# that the prompt behind a tool's output does not open
UNMARKED = {"diffusion_gemma": ("<|tool_response>", "<|turn>", "model")}


class Outcome(NamedTuple):
    """What a data step made of a record."""

    # (ids, weights) each; of a prompt (its ids, nothing) and the chat with FOLLOWING
    sequences: Sequence[tuple[list[int], list[float]]] = ()
    # what was said about the record beside its ids
    said: str = ""
    # why there are none
    error: str = ""
    # whether the weights are a template's own marks, which may hold headers (KNOWN_MARKS)
    marks: bool = False


class Verdict(NamedTuple):
    """`right`, `refused` (rightly), `needless` (refused, though the template can) or `wrong`."""

    status: str
    why: str = ""


class Rendering(NamedTuple):
    """A record as plain transformers writes it."""

    messages: list[dict]
    text: str
    # whether the messages are those of the record, with nothing converted
    given: bool


def judge(fast, name: str, cell: Cell, outcome: Outcome, training: str | None = None) -> Verdict:
    """The verdict over one cell of the template that stands in `fast.chat_template`."""
    if cell.forged:
        return _judge_forged(fast, name, cell, outcome)
    record = record_of(fast, name, cell)
    if cell.kind != "pair":
        messages = record["messages"] + [FOLLOWING] * (cell.kind == "prompt")
        return _judge_chat(fast, name, cell, record, messages, outcome, training)
    verdicts = []
    for side, key in enumerate(("answer_w", "answer_l")):
        messages = [*record["context"], record[key]]
        one = outcome._replace(sequences=outcome.sequences[side : side + 1])
        verdicts.append(_judge_chat(fast, name, cell, record, messages, one, None))
    statuses = [verdict.status for verdict in verdicts]
    if outcome.error:
        # one side that cannot be written is enough
        return verdicts[statuses.index("refused") if "refused" in statuses else 0]
    return verdicts[statuses.index("wrong") if "wrong" in statuses else 0]


def record_of(fast, name: str, cell: Cell) -> dict:
    """The record as given to a data step: with the template's own key of reasoning, and forged."""
    record = with_text(cell, _forged_text(fast) if cell.forged else "")
    own = REASONING_KEY.get(name, REASONING[0])
    key = next(k for k in REASONING if (k == own) != cell.another_key)
    for holder in (record.get("messages", ()), [record.get("answer_w"), record.get("answer_l")]):
        for message in holder:
            if message and REASONING[0] in message:
                message[key] = message.pop(REASONING[0])
    return record


def _arguments(record: dict) -> dict:
    kwargs = dict(record.get("chat_template_kwargs", {}))
    return kwargs | {key: record[key] for key in ("tools", "documents") if key in record}


def render(fast, messages, record: dict, opened: bool = False) -> str | None:
    """The template's text; None where it refuses the messages."""
    try:
        return fast.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=opened, **_arguments(record)
        )
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError):
        return None


def renderings(fast, record: dict, messages: list[dict]) -> Iterator[Rendering]:
    """The record as given, then with conversions that change no meaning."""
    plain = [{k: m[k] for k in m if k != "loss"} for m in messages]
    tried, seen = set(), set()
    ways = itertools.product((None, *REASONING), (None, "", "absent"), (False, True), PARTS)
    for way in ways:
        converted = [_converted(message, *way) for message in plain]
        if (key := json.dumps(converted)) in tried:
            continue
        tried.add(key)
        written = render(fast, converted, record)
        if written is not None and written not in seen:
            seen.add(written)
            yield Rendering(converted, written, converted == plain)


PARTS = ("as given", "text", "parts")


def _converted(message: dict, key: str | None, null: str | None, dumped: bool, parts: str) -> dict:
    """The message with another key of reasoning, another null content, arguments as text, and its
    content as text or parts."""
    message = dict(message)
    for name in REASONING:
        if key and name in message:
            message[key] = message.pop(name)
    if null is not None and message.get("content", "") is None:
        message["content"] = ""
        if null == "absent":
            del message["content"]
    if dumped and "tool_calls" in message:
        calls = [(call, call["function"]) for call in message["tool_calls"]]
        message["tool_calls"] = [
            {**call, "function": {**called, "arguments": json.dumps(called["arguments"])}}
            for call, called in calls
        ]
    content = message.get("content")
    if parts == "text" and isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    if parts == "parts" and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    return message


def words(text: object) -> list[str]:
    """The words of a message by which its text is known."""
    text = "".join(part["text"] for part in text) if isinstance(text, list) else text
    return re.findall(r"[^\W\d_]{4,}", text) if isinstance(text, str) else []


def written_words(message: dict) -> dict[str, list[str]]:
    """Of what a message says, part by part, its words."""
    content = message.get("content")
    inside, behind = (
        content.rsplit("</think>", 1) if "</think>" in (content or "") else ("", content)
    )
    parts = {"content": words(behind)}
    reasoning = (inside.replace("<think>", ""), *(message.get(key) for key in REASONING))
    parts["reasoning"] = [word for text in reasoning for word in words(text)]
    parts["calls"] = [
        word
        for call in message.get("tool_calls", ())
        for value in _values(call["function"]["arguments"])
        for word in words(value)
    ]
    return parts


def _values(arguments: dict | str) -> list:
    return list((json.loads(arguments) if isinstance(arguments, str) else arguments).values())


def all_words(message: dict) -> list[str]:
    return [word for part in written_words(message).values() for word in part]


def learned_places(cell: Cell, messages: Sequence[dict]) -> list[int]:
    """The places of the messages that are learned."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if cell.kind == "pair" or cell.loss_on == "last":
        return answers[-1:]
    return [i for i in answers if messages[i].get("loss") is not False]


def _judge_chat(
    fast, name: str, cell: Cell, record, messages, outcome: Outcome, training
) -> Verdict:
    while cell.kind == "chat" and messages[-1]["role"] != "assistant":
        # an end that is no answer is cut off before anything is learned
        messages = messages[:-1]
    learned = learned_places(cell, messages)
    possible = list(renderings(fast, record, messages))
    whole = [r for r in possible if not _lost(r, messages, learned)]
    if outcome.error:
        if any(r.given for r in whole):
            return Verdict("needless", outcome.error)
        return Verdict("refused", outcome.error)
    if not possible:
        return Verdict("wrong", "the template refuses this chat, the data step does not")
    ids, weights = outcome.sequences[-1]
    texts = {r.text: r for r in possible}
    for found in texts.values():
        offsets = matching_offsets(fast, record, found, ids)
        if offsets:
            break
    else:
        best = (whole or possible)[0]
        return Verdict("wrong", "ids: " + _difference(fast, ids, best.text))
    lost = _lost(found, messages, learned)
    if lost and (not outcome.said or any(part == "all" for _, part in lost)):
        return Verdict("wrong", f"{lost} not written, and " + (outcome.said or "nothing said"))
    if lost and whole:
        return Verdict("wrong", f"{lost} not written, though the template can")
    if (ignored := _ignored(fast, record, found)) and not outcome.said:
        return Verdict("wrong", f"{ignored} of the record not written, and nothing said")
    if cell.kind == "prompt":
        return _judge_prompt(fast, record, found, outcome)
    marks = None
    if training and learned == [i for i, m in enumerate(messages) if m["role"] == "assistant"]:
        marks = _marks(fast, record, found, training, weights)
    if marks and name not in KNOWN_MARKS and marks == [*map(bool, weights)]:
        return Verdict("right", outcome.said)
    headers = outcome.marks and name in KNOWN_MARKS
    why = _judge_mask(fast, record, found, learned, weights, offsets, headers)
    if not why and marks:
        why = _judge_marks(fast, name, record, found, marks, weights, offsets)
    return Verdict("wrong", why) if why else Verdict("right", outcome.said)


def _lost(rendering: Rendering, messages, learned: Sequence[int]) -> list[tuple[int, str]]:
    """(place, part) of learned messages that the text lacks; part "all" where nothing is left."""
    lost = []
    for i in learned:
        parts = {name: own for name, own in written_words(messages[i]).items() if own}
        gone = [name for name, own in parts.items() if not all(w in rendering.text for w in own)]
        if parts and len(gone) == len(parts):
            gone = ["all"]
        lost += [(i, name) for name in gone]
    if re.search(r"\bNone\b|['\"]type['\"]: ['\"]text['\"]", rendering.text):
        lost.append((0, "all"))  # a content that is no text, written as Python shows it
    return lost


def _ignored(fast, record, found: Rendering) -> str:
    for key in ("tools", "documents"):
        if key in record:
            without = {k: record[k] for k in record if k != key}
            if render(fast, found.messages, without) == found.text:
                return key
    return ""


def _common(one: Sequence, other: Sequence) -> int:
    """How many items the two have in common at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))


def _difference(fast, ids, text: str) -> str:
    theirs = fast(text, add_special_tokens=False)["input_ids"]
    at = _common(ids, theirs)
    mine, other = (fast.convert_ids_to_tokens(side[at : at + 4]) for side in (ids, theirs))
    return f"token {at}: {mine}, apply_chat_template gives {other}"


def _judge_prompt(fast, record, found: Rendering, outcome: Outcome) -> Verdict:
    ids = outcome.sequences[0][0]
    text = render(fast, found.messages[:-1], record, opened=True)
    if text is None:
        return Verdict("wrong", "the template opens no answer here, the data step does")
    theirs = fast(text, add_special_tokens=False)["input_ids"]
    begins = outcome.sequences[1][0][: len(ids)] == ids and fast.decode(ids) == fast.decode(theirs)
    if ids != theirs and not begins:
        return Verdict("wrong", "prompt ids: " + _difference(fast, ids, text))
    chat = fast(found.text, add_special_tokens=False)["input_ids"]
    if chat[: len(theirs)] == theirs and outcome.sequences[1][0][: len(ids)] != ids:
        return Verdict("wrong", "the prompt is no beginning of its chat")
    return Verdict("right", outcome.said)


class Bounds(NamedTuple):
    """Characters of an answer: those that must be learned, and those that may."""

    must: tuple[int, int]
    may: tuple[int, int]


def matching_offsets(fast, record, found: Rendering, ids) -> list[tuple[int, int]] | None:
    """The characters of each token where `ids` are those of the text, else None.

    They are those of the whole text, or those of its stretches: the answers, each cut where it
    begins to be generated, and what stands between them. (A tokenizer may merge the header's last
    white space with that of an answer, which no generation can.)
    """
    whole = fast(found.text, add_special_tokens=False, return_offsets_mapping=True)
    if whole["input_ids"] == ids:
        return whole["offset_mapping"]
    bounds = answer_bounds(fast, record, found, whole["offset_mapping"]).values()
    cuts = sorted({0, len(found.text), *(b.must[0] for b in bounds), *(b.may[1] for b in bounds)})
    both, offsets = [], []
    for start, end in itertools.pairwise(cuts):
        part = fast(found.text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        both += part["input_ids"]
        offsets += [(start + a, start + b) for a, b in part["offset_mapping"]]
    return offsets if both == ids else None


def _judge_mask(fast, record, found: Rendering, learned, weights, offsets, headers) -> str:
    """What is wrong with the loss weights, or ""."""
    bounds = answer_bounds(fast, record, found, offsets)
    bounds = [bounds[i] for i in learned]
    for (start, end), weight in zip(offsets, weights, strict=True):
        piece = found.text[start:end]
        answer = headers or any(start < b.may[1] and end > b.may[0] for b in bounds)
        if weight and not answer and piece:
            return f"learned, but no answer: {piece!r} at {start}, {_near(found.text, start)}"
        if not weight and any(b.must[0] <= start and end <= b.must[1] for b in bounds) and piece:
            return f"not learned: {piece!r} at {start}, {_near(found.text, start)}"
    text = "\0".join(
        found.text[start:end] if weight else ""
        for (start, end), weight in zip(offsets, weights, strict=True)
    )
    return judge_words(re.sub("\0(?=[^\0])", "", text), found, learned)


def _near(text: str, at: int) -> str:
    return f"in {text[max(at - 30, 0) : at + 30]!r}"


def judge_words(text: str, found: Rendering, learned) -> str:
    """Whose words stand in the learned text: all of the learned messages, none of the others."""
    mine = {w for i in learned for w in all_words(found.messages[i])}
    others = {w for i, m in enumerate(found.messages) if i not in learned for w in all_words(m)}
    for word in sorted(mine - others):
        if text.count(word) != found.text.count(word):
            return f"learned {text.count(word)} times, written {found.text.count(word)}: {word!r}"
    for word in sorted(others - mine):
        if word in text:
            return f"learned, but of another message: {word!r}"
    return ""


def answer_bounds(fast, record, found: Rendering, offsets) -> dict[int, Bounds]:
    """The bounds of every answer in the text."""
    text, bounds, behind = found.text, {}, 0
    for i, message in enumerate(found.messages):
        if message["role"] != "assistant":
            continue
        before = render(fast, found.messages[:i], record, opened=True) if i else None
        alone = render(fast, found.messages[: i + 1], record)
        start = _common(before or "", text)
        previous = _last(text, found.messages[i - 1], behind) if i else 0
        known = before is not None and start >= previous
        places = _places(text, message, start if known else max(behind, previous))
        first, last = (places[0], places[1]) if places else (start, start)
        must_start = may_start = start
        if not known:
            must_start, may_start = first, previous
        elif inside := [s for s, e in offsets if s < start < e]:
            may_start = inside[0]
            if start < len(before):
                must_start = may_start
        if known and start < len(before):
            # what is opened is not what is written: learned from the first token that differs
            both = (fast(t, add_special_tokens=False)["input_ids"] for t in (before, text))
            if offsets and (same := _common(*both)) < len(offsets):
                may_start = min(may_start, offsets[same][0])
        end = _common(alone or "", text)
        if end >= last and alone:
            whole = end == len(alone)
            must_end, may_end = (len(alone.rstrip()) if whole else last), end
        else:
            following = found.messages[i + 1] if i + 1 < len(found.messages) else {}
            places = _places(text, following, last)
            must_end, may_end = last, places[0] if places else len(text)
        if inside := [(s, e) for s, e in offsets if s < may_end < e]:
            may_end = inside[0][alone is not None and end == len(alone)]
        ended = end < last or end == len(alone or "") or CONTROL.search(text, last, may_end)
        if not ended and (stop := CONTROL.match(text, may_end)):
            # the token that ends this answer, though another ends it where nothing follows
            may_end = stop.end()
        must_end = max(must_end, must_start)
        others = {word for m in found.messages if m is not message for word in all_words(m)}
        others -= set(all_words(message))
        if any(must_start <= text.find(word, must_start) < must_end for word in others):
            # written around what others say: judged by its words alone
            must_end = must_start
        bounds[i] = Bounds((must_start, must_end), (may_start, may_end))
        behind = max(last, behind)
    return bounds


def _places(text: str, message: dict, begin: int) -> tuple[int, int] | None:
    """Where the message's words stand behind `begin`: the first's start and the last's end."""
    found = [(at, at + len(w)) for w in all_words(message) if (at := text.find(w, begin)) >= 0]
    return (min(found)[0], max(end for _, end in found)) if found else None


def _last(text: str, message: dict, begin: int) -> int:
    places = _places(text, message, begin)
    return places[1] if places else begin


def _marks(fast, record, found: Rendering, training, weights) -> list[bool] | None:
    """The template's own generation marks of each token; None where it writes other tokens."""
    try:
        marked = fast.apply_chat_template(
            found.messages,
            chat_template=training,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **_arguments(record),
        )
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError):
        return None
    ids = fast(found.text, add_special_tokens=False)["input_ids"]
    # the marked template may write otherwise, or the weights be those of stretches
    same = marked["input_ids"] == ids and len(ids) == len(weights)
    return [*map(bool, marked["assistant_masks"])] if same else None


def _judge_marks(fast, name, record, found: Rendering, marks, weights, offsets) -> str:
    """How the weights differ from the template's own generation marks, or ""."""
    bounds = answer_bounds(fast, record, found, offsets).values()
    for (start, stop), mark, weight in zip(offsets, marks, weights, strict=True):
        piece = found.text[start:stop]
        unmarked = piece.strip() in ("", *UNMARKED.get(name, ()))
        if mark == bool(weight) or (weight and unmarked):
            continue
        header = not any(start < b.must[1] and stop > b.must[0] for b in bounds)
        if not (mark and header and name in KNOWN_MARKS):
            side = "marked by the template, not learned" if mark else "learned, not marked"
            return f"{side}: {piece!r} at {start}, {_near(found.text, start)}"
    return ""


def _forged_text(fast) -> str:
    """The control tokens that the template writes around a plain chat."""
    chat = [{"role": "user", "content": "Question"}, answer("Reply")]
    written = next(renderings(fast, {}, chat)).text
    known = fast.get_added_vocab()
    ids = fast(written, add_special_tokens=False)["input_ids"]
    by_id = {id: token for token, id in known.items()}
    return " ".join(dict.fromkeys(by_id[id] for id in ids if id in by_id and by_id[id].strip()))


def _judge_forged(fast, name: str, cell: Cell, outcome: Outcome) -> Verdict:
    """No control token of a user's or a tool's text is one; all else is as without it."""
    record, clean = record_of(fast, name, cell), with_text(cell, "")
    possible = list(renderings(fast, record, record["messages"]))
    learned = learned_places(cell, record["messages"])
    whole = [r for r in possible if not _lost(r, record["messages"], learned)]
    if outcome.error:
        if any(r.given for r in whole):
            return Verdict("needless", outcome.error)
        return Verdict("refused", outcome.error)
    if not whole:
        return Verdict("wrong", "the template refuses or loses parts, the data step does not")
    ids, weights = outcome.sequences[-1]
    added = {id for token, id in fast.get_added_vocab().items() if token.strip("\u2581 \t\n")}
    plain = {
        tuple(i for i in fast(r.text, add_special_tokens=False)["input_ids"] if i in added)
        for r in renderings(fast, clean, clean["messages"])
    }
    if tuple(i for i in ids if i in added) not in plain:
        return Verdict("wrong", "a control token of a user's text is one, or one is missing")
    squeeze = lambda text: re.sub(r"[\s\u2581]+", "", text)
    text = fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found = next((r for r in whole if squeeze(r.text) == squeeze(text)), None)
    if found is None:
        return Verdict("wrong", f"text: {text[-200:]!r}")
    spans, last = [], False
    for token, weight in zip(ids, weights, strict=True):
        if weight and last:
            spans[-1].append(token)
        elif weight:
            spans.append([token])
        last = bool(weight)
    said = found._replace(messages=with_text(cell, "")["messages"])
    why = judge_words("\n".join(fast.decode(span) for span in spans), said, learned)
    return Verdict("wrong", why) if why else Verdict("right", outcome.said)
