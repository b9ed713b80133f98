"""Generated records of every kind with right answers, seeded: each recipe's no-flag run and what the tests use learn from them.

The tasks are small but honest. A record belongs to the training or to the held-out split by a hash of the facts it states, in any order, so no
held-out question can be answered from memory: the words and the addition table are known from training, their combination is new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from ta.files import writing

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 0.2  # of all possible facts

NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Gina",
    "Hugo",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Nora",
    "Otto",
    "Paul",
]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "gray", "gold", "silver"]
THINGS = ["key", "cup", "hat", "bag", "book", "lamp", "ball", "coat", "ring", "pen", "box", "chair"]
TOPICS = (
    ["cat", "dog", "cow", "pig", "fox", "owl", "wolf", "lion", "bear", "goat", "duck", "fish"],
    ["bread", "rice", "soup", "cake", "milk", "salt", "corn", "plum", "pear", "nut", "bean", "tea"],
    ["rain", "snow", "wind", "sun", "fog", "ice", "hail", "storm", "cloud", "frost", "mist", "sky"],
)
WORDS = TOPICS[0] + TOPICS[1]
PLACES = [*TOPICS[2], *COLOURS, "dawn", "dusk"]
CHATTY = "{}, of course!"  # a right answer in more words, which preferences like less
CHATTY_SHARE = 0.75  # of the answers in `wordy`
SYSTEM_PROMPTS = ("Answer in few words.", "You are a careful helper.")


class Turn(NamedTuple):
    """A question, its right answer, and wrong answers of the same form."""

    question: str
    answer: str
    wrong: tuple[str, ...]


class Dialogue(NamedTuple):
    """A text, the facts it states (they decide the split, in any order), and the turns that ask about them."""

    task: str
    text: str
    facts: tuple[str, ...]
    turns: tuple[Turn, ...]


def _lookup(rng: random.Random) -> Dialogue:
    """Which colour a thing has, of three."""
    things, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, 3)
    facts = tuple(f"{thing} {colour}" for thing, colour in zip(things, colours, strict=True))
    turns = [
        Turn(f"{thing}?", fact, tuple(f"{thing} {c}" for c in colours if f"{thing} {c}" != fact))
        for thing, fact in zip(things, facts, strict=True)
    ]
    return Dialogue("lookup", "\n".join(facts), facts, tuple(rng.sample(turns, 3)))


def _repeat(rng: random.Random) -> Dialogue:
    """A short list of words, said again."""
    words = rng.sample(WORDS, rng.choice((2, 3)))
    whole = " ".join(words)
    return Dialogue(
        "repeat",
        whole,
        tuple(words),
        (Turn("repeat?", whole, (" ".join(reversed(words)), " ".join(words[1:]))),),
    )


def _add(rng: random.Random) -> Dialogue:
    """The sum of two numbers of one digit."""
    names, numbers = rng.sample(NAMES, 2), [rng.randint(1, 9), rng.randint(1, 9)]
    total = sum(numbers)
    facts = tuple(f"{name} {number}" for name, number in zip(names, numbers, strict=True))
    return Dialogue(
        "add",
        "\n".join(facts),
        facts,
        (Turn("sum?", str(total), (str(total + 1), str(total - 1), str(total + 2))),),
    )


def _split_of(facts: Iterable[str]) -> Split:
    """The split in which these facts may be stated, in whatever order."""
    digest = hashlib.sha256("\n".join(sorted(facts)).encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


TASKS = (_lookup, _repeat, _add)
SHARES = (5, 3, 2)


def _dialogues(
    kind: str, split: Split, n: int, seed: int
) -> Iterator[tuple[str, random.Random, Dialogue]]:
    """n seeded (id, generator, dialogue) of a split; each kind of record has dialogues of its own."""
    rng = _generator(kind, split, seed)
    found = 0
    while found < n:
        dialogue = rng.choices(TASKS, SHARES)[0](rng)
        if _split_of(dialogue.facts) == split:
            yield f"{kind}-{split}-{seed}-{found}", rng, dialogue
            found += 1


def _generator(kind: str, split: Split, seed: int) -> random.Random:
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is not known; give 'train' or 'held_out'")
    return random.Random(f"{kind} {split} {seed}")


def _messages(dialogue: Dialogue, rng: random.Random) -> list[dict[str, str]]:
    """The dialogue as messages, the facts before the first question; one in five has a system prompt."""
    messages = (
        [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < 0.2 else []
    )
    for place, turn in enumerate(dialogue.turns):
        question = turn.question if place else f"{dialogue.text}\n{turn.question}"
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": turn.answer},
        ]
    return messages


def chats(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n chats {"id", "task", "messages", "answer"}; "answer" is the right last answer, which also ends the messages."""
    records = []
    for name, rng, dialogue in _dialogues("chat", split, n, seed):
        messages = _messages(dialogue, rng)
        records.append(
            {
                "id": name,
                "task": dialogue.task,
                "messages": messages,
                "answer": messages[-1]["content"],
            }
        )
    return records


def wordy(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same chats with three out of four answers in more words; "answer" is the bare last one."""
    records, rng = chats(split, n, seed), _generator("wordy", split, seed)
    for message in itertools.chain(*(record["messages"] for record in records)):
        if message["role"] == "assistant" and rng.random() < CHATTY_SHARE:
            message["content"] = CHATTY.format(message["content"])
    return records


def exact_match(text: str, record: dict[str, Any]) -> bool:
    """Whether a generated answer is the record's right one, up to white space around it."""
    return text.strip() == record["answer"]


def _questions(
    kind: str, split: Split, n: int, seed: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, str]], random.Random, Turn]]:
    """n of ({"id", "task"}, messages up to a question, generator, the turn it asks)."""
    for name, rng, dialogue in _dialogues(kind, split, n, seed):
        messages = _messages(dialogue, rng)
        turn = dialogue.turns[sum(message["role"] == "assistant" for message in messages) - 1]
        yield {"id": name, "task": dialogue.task}, messages[:-1], rng, turn


def preferences(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n pairs {"id", "task", "context", "answer_w", "answer_l"}: the right answer against a wrong one of the same form."""
    records = []
    for head, context, rng, turn in _questions("preference", split, n, seed):
        records.append(
            head
            | {
                "context": context,
                "answer_w": _answer(turn.answer),
                "answer_l": _answer(rng.choice(turn.wrong)),
            }
        )
    return records


def concise(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n pairs likewise: the right answer against the same one in more words, or half the time against a wrong one."""
    records = []
    for head, context, rng, turn in _questions("concise", split, n, seed):
        better, worse = _answer(turn.answer), _answer(_worse(rng, turn))
        records.append(head | {"context": context, "answer_w": better, "answer_l": worse})
    return records


def labelled(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n labelled answers {"id", "task", "context", "answer", "is_desirable"}.

    About half are right in few words, and these are desirable; a quarter are right in more words,
    a quarter are wrong.
    """
    records = []
    for head, context, rng, turn in _questions("labelled", split, n, seed):
        good = rng.random() < 0.5
        answer = _answer(turn.answer if good else _worse(rng, turn))
        records.append(head | {"context": context, "answer": answer, "is_desirable": good})
    return records


def _worse(rng: random.Random, turn: Turn) -> str:
    """The right answer in more words, or half the time a wrong one."""
    return CHATTY.format(turn.answer) if rng.random() < 0.5 else rng.choice(turn.wrong)


def candidates(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n questions {"id", "task", "messages", "answers": [{"id", "content"}], "answer"}; one of the 2 to 4 candidates is the right "answer"."""
    records = []
    for head, messages, rng, turn in _questions("candidates", split, n, seed):
        texts = rng.sample((turn.answer, *turn.wrong), 1 + len(turn.wrong))
        answers = [{"id": str(place), "content": text} for place, text in enumerate(texts)]
        records.append(head | {"messages": messages, "answers": answers, "answer": turn.answer})
    return records


def classes(split: Split, n: int, seed: int = 0, rare: bool = False) -> list[dict[str, Any]]:
    """n one-message dialogues {"id", "messages", "label"}: three words, two of the topic (animals 0, food 1, weather 2) and one of another.

    The topics are equally frequent, or with `rare` the last one has about 5 %.
    """
    rng = _generator(f"class {rare}", split, seed)
    records = []
    while len(records) < n:
        label = rng.choices(range(3), (0.475, 0.475, 0.05) if rare else (1, 1, 1))[0]
        other = rng.choice([topic for topic in range(3) if topic != label])
        words = rng.sample(TOPICS[label], 2) + rng.sample(TOPICS[other], 1)
        rng.shuffle(words)
        if _split_of(words) == split:
            message = {"role": "user", "content": f"Words: {' '.join(words)}."}
            records.append(
                {
                    "id": f"class-{split}-{seed}-{len(records)}",
                    "messages": [message],
                    "label": label,
                }
            )
    return records


PEOPLE = dict(
    zip((*NAMES, "Rosa", "Sam", "Tina", "Uwe", "Vera", "Will", "Yara", "Zoe"), WORDS, strict=True)
)  # and what the catalogue calls them
OBJECTS = dict(
    zip(
        (
            *THINGS,
            "bike",
            "door",
            "drum",
            "flag",
            "fork",
            "harp",
            "kite",
            "map",
            "pipe",
            "rope",
            "ship",
            "tent",
        ),
        PLACES,
        strict=True,
    )
)
ASKED = (
    "{person}'s {thing}?",
    "{thing} of {person}?",
    "number of {person}'s {thing}?",
    "{person}, {thing}?",
)


def passages() -> list[dict[str, str]]:
    """A catalogue of 576 things as {"id", "title", "text"}: it calls their owners by an animal or a food and the things by a weather or a colour, and
    gives each a number that no other has."""
    codes = list(itertools.product(PEOPLE.values(), OBJECTS.values()))
    numbers = random.Random("passages").sample(range(10_000), len(codes))
    return [
        {
            "id": "-".join(code),
            "title": " ".join(code),
            "text": f"{number // 100:02}-{number % 100:02}",
        }
        for code, number in zip(codes, numbers, strict=True)
    ]


def questions(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """n questions {"id", "messages", "answer", "gold"} about `passages()`, with which they share no word: that Anna is the cat and a key the rain can
    only be learned. What held-out questions ask for is asked for in none of training, while each of its words is known from there."""
    rng = _generator("question", split, seed)
    numbers = {passage["id"]: passage["text"] for passage in passages()}
    facts = [fact for fact in itertools.product(PEOPLE, OBJECTS) if _split_of(fact) == split]
    records = []
    while len(records) < n:
        person, thing = rng.choice(facts)
        gold = f"{PEOPLE[person]}-{OBJECTS[thing]}"
        messages = [
            {"role": "user", "content": rng.choice(ASKED).format(person=person, thing=thing)},
            _answer(numbers[gold]),
        ]
        records.append(
            {
                "id": f"question-{split}-{seed}-{len(records)}",
                "messages": messages,
                "answer": numbers[gold],
                "gold": [gold],
            }
        )
    return records


def readings(split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same questions with the passage that answers each in front of it: what a generator learns to read from."""
    texts = {passage["id"]: f"{passage['title']}\n{passage['text']}\n\n" for passage in passages()}
    records = questions(split, n, seed)
    for record in records:
        asked, answer = record["messages"]
        record["messages"] = [
            {**asked, "content": texts[record["gold"][0]] + asked["content"]},
            answer,
        ]
    return records


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> None:
    """Write records one a line; the file appears whole or not at all."""
    with writing(path) as aside, open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
