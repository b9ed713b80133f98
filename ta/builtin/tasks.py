"""Generated, seeded records of every kind with right answers, for runs without flags and tests.

A record belongs to the training or the held-out split by a hash of the facts that it states, in any
order. No held-out question can therefore be answered from memory: words and the addition table are
known from training, but their combination is new.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

from ta.files import write_jsonl as write_jsonl

Split = Literal["train", "held_out"]
Record = dict[str, Any]
# share of all possible facts
HELD_OUT_SHARE = 0.2

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
# a right answer in more words, which the preferences reject
CHATTY = "{}, of course!"
# share of such answers in `wordy`
CHATTY_SHARE = 0.75
SYSTEM_PROMPTS = ("Answer in few words.", "You are a careful helper.")


class Turn(NamedTuple):
    """A question, its right answer, and wrong answers of the same form."""

    question: str
    answer: str
    wrong: list[str]


class Dialogue(NamedTuple):
    """A text, the facts that it states, and the turns that ask about them.

    The facts decide the split, in any order.
    """

    task: str
    text: str
    facts: list[str]
    turns: list[Turn]


def _lookup(rng: random.Random) -> Dialogue:
    """The colour of a thing, among three things."""
    things, colours = rng.sample(THINGS, 3), rng.sample(COLOURS, 3)
    facts, turns = [], []
    for thing, colour in zip(things, colours, strict=True):
        wrong = [f"{thing} {other}" for other in colours if other != colour]
        facts.append(f"{thing} {colour}")
        turns.append(Turn(f"{thing}?", facts[-1], wrong))
    return Dialogue("lookup", "\n".join(facts), facts, rng.sample(turns, 3))


def _repeat(rng: random.Random) -> Dialogue:
    """A short list of words, to be repeated."""
    words = rng.sample(WORDS, rng.choice((2, 3)))
    whole = " ".join(words)
    wrong = [" ".join(reversed(words)), " ".join(words[1:])]
    return Dialogue("repeat", whole, words, [Turn("repeat?", whole, wrong)])


def _add(rng: random.Random) -> Dialogue:
    """The sum of two numbers of one digit."""
    names, numbers = rng.sample(NAMES, 2), [rng.randint(1, 9), rng.randint(1, 9)]
    total = sum(numbers)
    facts = [f"{name} {number}" for name, number in zip(names, numbers, strict=True)]
    wrong = [str(total + by) for by in (1, -1, 2)]
    return Dialogue("add", "\n".join(facts), facts, [Turn("sum?", str(total), wrong)])


def _split_of(facts: Iterable[str]) -> Split:
    """The split in which these facts may be stated, in any order."""
    digest = hashlib.sha256("\n".join(sorted(facts)).encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32 else "train"


TASKS = (_lookup, _repeat, _add)
SHARES = (5, 3, 2)


def _dialogues(
    kind: str, split: Split, n: int, seed: int = 0
) -> Iterator[tuple[str, random.Random, Dialogue]]:
    """n seeded (id, generator, dialogue) of a split; each kind of record has its own dialogues."""
    rng = _generator(kind, split, seed)
    made = 0
    while made < n:
        dialogue = rng.choices(TASKS, SHARES)[0](rng)
        if _split_of(dialogue.facts) == split:
            yield f"{dialogue.task}-{kind}-{split}-{seed}-{made}", rng, dialogue
            made += 1


def _generator(kind: str, split: Split, seed: int = 0) -> random.Random:
    return random.Random(f"{kind} {split} {seed}")


def _messages(dialogue: Dialogue, rng: random.Random) -> list[Record]:
    """The dialogue as messages, with the facts before the first question.

    One dialogue in five has a system prompt.
    """
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for place, turn in enumerate(dialogue.turns):
        question = turn.question if place else f"{dialogue.text}\n{turn.question}"
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": turn.answer},
        ]
    return messages


def chats(split: Split, n: int, seed: int = 0) -> list[Record]:
    """n chats {"id", "messages", "answer"}; the messages end with the right "answer"."""
    records = []
    for name, rng, dialogue in _dialogues("chat", split, n, seed):
        messages = _messages(dialogue, rng)
        records.append({"id": name, "messages": messages, "answer": messages[-1]["content"]})
    return records


def practice(split: Split, n: int) -> list[Record]:
    """n chats of the same tasks, other than the n that are learned first."""
    return chats(split, n, seed=1)


def wordy(split: Split, n: int) -> list[Record]:
    """The same chats with three of four answers in more words.

    "answer" is the last answer in few words.
    """
    records, rng = chats(split, n), _generator("wordy", split)
    for message in itertools.chain(*(record["messages"] for record in records)):
        if message["role"] == "assistant" and rng.random() < CHATTY_SHARE:
            message["content"] = CHATTY.format(message["content"])
    return records


def _questions(
    kind: str, split: Split, n: int
) -> Iterator[tuple[Record, list[Record], random.Random, Turn]]:
    """n of ({"id"}, messages up to a question, generator, the turn of that question)."""
    for name, rng, dialogue in _dialogues(kind, split, n):
        messages = _messages(dialogue, rng)
        turn = dialogue.turns[sum(message["role"] == "assistant" for message in messages) - 1]
        yield {"id": name}, messages[:-1], rng, turn


def _pairs(
    kind: str, split: Split, n: int, worse: Callable[[random.Random, Turn], str]
) -> list[Record]:
    """n pairs {"id", "context", "answer_w", "answer_l"}: the right answer against a `worse` one."""
    records = []
    for head, context, rng, turn in _questions(kind, split, n):
        better, worst = _answer(turn.answer), _answer(worse(rng, turn))
        records.append(head | {"context": context, "answer_w": better, "answer_l": worst})
    return records


def preferences(split: Split, n: int) -> list[Record]:
    """n pairs {"id", "context", "answer_w", "answer_l"}.

    The right answer stands against a wrong one of the same form.
    """
    return _pairs("preference", split, n, _wrong)


def concise(split: Split, n: int) -> list[Record]:
    """n pairs of the same form: a right answer in few words against a worse one.

    The worse one is the same answer in more words, or half the time a wrong answer.
    """
    return _pairs("concise", split, n, _worse)


def labelled(split: Split, n: int) -> list[Record]:
    """n labelled answers {"id", "context", "answer", "is_desirable"}.

    About half are right in few words, and these are desirable; a quarter are right in more words,
    a quarter are wrong.
    """
    records = []
    for head, context, rng, turn in _questions("labelled", split, n):
        good = rng.random() < 0.5
        answer = _answer(turn.answer if good else _worse(rng, turn))
        records.append(head | {"context": context, "answer": answer, "is_desirable": good})
    return records


def _wrong(rng: random.Random, turn: Turn) -> str:
    return rng.choice(turn.wrong)


def _worse(rng: random.Random, turn: Turn) -> str:
    """The right answer in more words, or half the time a wrong one."""
    return CHATTY.format(turn.answer) if rng.random() < 0.5 else _wrong(rng, turn)


def candidates(split: Split, n: int) -> list[Record]:
    """n questions {"id", "messages", "answers": [{"id", "content"}], "answer"}.

    One of the 2 to 4 candidates is the right "answer".
    """
    records = []
    for head, messages, rng, turn in _questions("candidates", split, n):
        texts = rng.sample((turn.answer, *turn.wrong), 1 + len(turn.wrong))
        answers = [{"id": str(place), "content": text} for place, text in enumerate(texts)]
        records.append(head | {"messages": messages, "answers": answers, "answer": turn.answer})
    return records


def classes(split: Split, n: int) -> list[Record]:
    """n dialogues of one message {"id", "messages", "label"}.

    The message has three words, two of the label's topic (animals 0, food 1, weather 2) and one of
    another. The topics are equally frequent.
    """
    rng = _generator("class False", split)
    records = []
    while len(records) < n:
        label = rng.choices(range(3))[0]
        other = rng.choice([topic for topic in range(3) if topic != label])
        words = rng.sample(TOPICS[label], 2) + rng.sample(TOPICS[other], 1)
        rng.shuffle(words)
        if _split_of(words) == split:
            message = {"role": "user", "content": f"Words: {' '.join(words)}."}
            name = f"class-{split}-0-{len(records)}"
            records.append({"id": name, "messages": [message], "label": label})
    return records


MORE_NAMES = ("Rosa", "Sam", "Tina", "Uwe", "Vera", "Will", "Yara", "Zoe")
MORE_THINGS = (
    *("bike", "door", "drum", "flag", "fork", "harp"),
    *("kite", "map", "pipe", "rope", "ship", "tent"),
)
# people and things, with their names in the catalogue of passages
PEOPLE = dict(zip((*NAMES, *MORE_NAMES), WORDS, strict=True))
OBJECTS = dict(zip((*THINGS, *MORE_THINGS), PLACES, strict=True))
ASKED = (
    "{person}'s {thing}?",
    "{thing} of {person}?",
    "number of {person}'s {thing}?",
    "{person}, {thing}?",
)


def passages() -> list[Record]:
    """A catalogue of 576 things as {"id", "title", "text"}.

    It names their owners by an animal or a food and the things by a weather or a colour, and gives
    each thing a number that no other has.
    """
    codes = list(itertools.product(PEOPLE.values(), OBJECTS.values()))
    numbers = random.Random("passages").sample(range(10_000), len(codes))
    records = []
    for code, number in zip(codes, numbers, strict=True):
        text = f"{number // 100:02}-{number % 100:02}"
        records.append({"id": "-".join(code), "title": " ".join(code), "text": text})
    return records


def questions(split: Split, n: int) -> list[Record]:
    """n questions {"id", "messages", "answer", "gold"} about `passages()`.

    A question shares no word with its passage: that Anna is the cat and a key the rain can only be
    learned. No training question asks for what a held-out one asks for, but each of its words
    occurs in training.
    """
    rng = _generator("question", split)
    numbers = {passage["id"]: passage["text"] for passage in passages()}
    facts = [fact for fact in itertools.product(PEOPLE, OBJECTS) if _split_of(fact) == split]
    records = []
    while len(records) < n:
        person, thing = rng.choice(facts)
        gold = f"{PEOPLE[person]}-{OBJECTS[thing]}"
        question = rng.choice(ASKED).format(person=person, thing=thing)
        messages = [{"role": "user", "content": question}, _answer(numbers[gold])]
        name = f"question-{split}-0-{len(records)}"
        record = {"id": name, "messages": messages, "answer": numbers[gold]}
        records.append(record | {"gold": [gold]})
    return records


def readings(split: Split, n: int) -> list[Record]:
    """The same questions, each after the passage that answers it, for training a generator."""
    texts = {passage["id"]: f"{passage['title']}\n{passage['text']}\n\n" for passage in passages()}
    records = questions(split, n)
    for record in records:
        asked, answer = record["messages"]
        passage = texts[record["gold"][0]]
        record["messages"] = [{**asked, "content": passage + asked["content"]}, answer]
    return records


def _answer(text: str) -> Record:
    return {"role": "assistant", "content": text}
