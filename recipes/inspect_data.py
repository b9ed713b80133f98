"""See what training will see: which tokens are learned, how long records are, what is dropped.

    python recipes/inspect_data.py --model-path MODEL --data chats.jsonl
    python recipes/inspect_data.py --model-path MODEL --data chats.jsonl --json > ids.jsonl

With --json, one line a record: {"line", "ids", "labels", "weights"}, labels unshifted and -100
where nothing is learned, or {"line", "dropped"}. A line of data:
{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import ta
from ta import Range
from ta.chat.render import show, spans
from ta.command_line import SEED
from ta.data.prepare import Prepared, lengths, read_drops, report, tokens_of
from ta.files import json_text
from ta.printable import printable
from ta.screen import shown

BAR = 50  # characters
# of each kind how its records are prepared, and the built-in ones
KINDS = {
    "chat": (ta.prepare_chats, "chats"),
    "pair": (ta.prepare_pairs, "preferences"),
    "labelled": (ta.prepare_labelled, "labelled"),
    "class": (ta.prepare_classes, "classes"),
    "media": (ta.media.prepare_media_chats, "pictures"),
    "question": (ta.prepare_questions, "questions"),
}


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    data: ta.DataConfig = ta.DataConfig()
    media: ta.media.MediaConfig = ta.media.MediaConfig()
    kind: Literal["chat", "pair", "labelled", "class", "media", "question"] = "chat"
    """What the records are: chats (sft), pairs (rm, dpo), labelled answers (kto), classified
    dialogues (classify), pictures and sounds (multimodal) or questions (rag, without their
    passages)."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in order, where the labels of --kind class are text."""
    examples: Annotated[int, Range(0)] = 3
    """Records shown with colours."""
    seed: Annotated[int, SEED] = 0
    """Chooses the records of sources with a share or a count, as in training."""
    json: bool = False
    """One JSON line a record instead of a page for a person."""


def json_lines(prepared: Prepared) -> Iterator[str]:
    """One line a record in the order of the sources; with several sources each names its file."""
    drops = sorted(
        (entry["source"], entry["line"], entry["reason"]) for entry in read_drops(prepared)
    )
    records = [(*origin, i) for i, origin in enumerate(prepared.origin.tolist())]
    for source, line, record in sorted([*records, *drops], key=lambda entry: entry[:2]):
        sources = prepared.info["sources"]
        head = {"file": sources[source]["path"]} if len(sources) > 1 else {}
        dropped = isinstance(record, str)  # the reason, else its number
        body = {"dropped": record} if dropped else record_of(prepared, record)
        yield json_text(head | {"line": line} | body)


def record_of(prepared: Prepared, i: int) -> dict:
    """ids, labels and weights of record i.

    Where a record has several sequences they stand in a list.
    """
    parts = []
    for ids, weights in tokens_of(prepared, i):
        labels = [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
        parts.append({"ids": ids, "labels": labels, "weights": weights})
    extras = {
        name: None if math.isnan(values[i]) else float(values[i])
        for name, values in prepared.extras.items()
    }
    return (parts[0] if prepared.k == 1 else {"sequences": parts}) | extras


def page(prepared: Prepared, examples: int, decode) -> Iterator[str]:
    """Counts and drops, a histogram of lengths, and the first records.

    Their learned tokens are in colour; `decode` makes text of token ids.
    """
    yield from report(prepared.info)
    yield from histogram(lengths(prepared).tolist())
    for i in range(min(examples, len(prepared.origin))):
        source, line = prepared.origin[i]
        extras = "".join(f" {name}={values[i]:g}" for name, values in prepared.extras.items())
        place = f"{prepared.info['sources'][source]['path']}:{line}"
        kinds = (("learned", 1.0), (", ", 0.0), ("with a weight of its own", 0.5))
        yield f"\n{printable(place)}{extras}  ({show([*kinds, (', not learned', 0.0)])})"
        for tokens in tokens_of(prepared, i):
            yield show(spans(tokens, decode))


def histogram(sizes: list[int], bins: int = 12) -> Iterator[str]:
    """Lines of `from-to |#### count` over equal widths; first the middle, 95 % and the longest."""
    ranked = sorted(sizes)
    middle = ranked[len(ranked) // 2]
    high = ranked[min(len(ranked) * 95 // 100, len(ranked) - 1)]
    yield f"\ntokens a record: median {middle:,}, 95 % up to {high:,}, longest {ranked[-1]:,}"
    width = -(-(ranked[-1] - ranked[0] + 1) // bins)
    counts = [0] * ((ranked[-1] - ranked[0]) // width + 1)
    for size in sizes:
        counts[(size - ranked[0]) // width] += 1
    for i, count in enumerate(counts):
        start = ranked[0] + i * width
        bar = "#" * -(-count * BAR // max(counts))
        yield f"{start:>8,}-{start + width - 1:<8,}|{bar} {count:,}"


def main(config: Config) -> None:
    others = Config(kind=config.kind)
    for kind, of_kind in (("class", "labels"), ("media", "media")):
        if config.kind != kind and getattr(config, of_kind) != getattr(others, of_kind):
            raise ValueError(
                f"--kind {config.kind} has no {of_kind}: leave their flags out, or give "
                f"--kind {kind}"
            )
    placeholders, (prepare, builtin) = {}, KINDS[config.kind]
    if config.kind == "media":
        media = ta.media.open_media(
            config.media,
            config.data.data,
            "cpu",
            folder=ta.resolve(config.model).media,
            hub=config.model.hub,
        )
        placeholders = media.placeholders
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, placeholders)
    files, _ = ta.data_or_builtin(config.data.data, (), builtin, config.model.hub)
    for sources in (files, config.data.val_data):
        asked = (tokenizer, config.chat, config.data, config.seed)
        prepared = prepare(sources, *asked, labels=config.labels)
        if prepared is None:
            continue
        lines = json_lines(prepared)
        if not config.json:
            lines = page(prepared, config.examples, tokenizer.fast.decode)
        for line in lines:
            print(shown(line, sys.stdout))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the run quietly
    ta.cli(main, Config)
