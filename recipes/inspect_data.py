"""See what training will see: which tokens are learned, how long records are, what is dropped and why.

    python recipes/inspect_data.py --model-path MODEL --data chats.jsonl
    python recipes/inspect_data.py --model-path MODEL --data chats.jsonl --json > ids.jsonl

With --json, one line a record: {"line", "ids", "labels", "weights"}, labels unshifted and -100 where nothing is learned, or {"line", "dropped"}.
A line of data: {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ta.builtin import data_files
from ta.chat.render import Tokens, show
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.command_line import cli
from ta.data.prepare import (
    KINDS,
    DataConfig,
    Prepared,
    lengths,
    prepare,
    read_drops,
    report,
    sequence,
)
from ta.folders import ModelConfig
from ta.media.dialogue import MEDIA_CHATS
from ta.media.settings import MediaConfig, open_media

BAR = 50  # characters


@dataclass(frozen=True)
class InspectData:
    chat: ChatConfig = ChatConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    model_path: str = "builtin"
    """Folder whose tokenizer is used; its weights are not read."""
    adapter_path: str | None = None
    """Adapter whose tokenizer is used, if it has one of its own."""
    hub: bool = False
    """Allow the model's name to be looked up on the Hugging Face hub."""
    kind: Literal["chat", "pair", "labelled", "class", "media", "question"] = "chat"
    """What the records are: chats (sft), pairs (rm, dpo), labelled answers (kto), classified dialogues (classify), pictures and sounds
    (multimodal) or questions (rag, without their passages)."""
    media: MediaConfig = MediaConfig()
    examples: int = 3
    """Records shown with colours."""
    seed: int = 0
    """Chooses the records of sources with a share or a count, as in training."""
    json: bool = False
    """One JSON line a record instead of a page for a person."""


def main(config: InspectData) -> None:
    model = ModelConfig(
        model_path=config.model_path, adapter_path=config.adapter_path, hub=config.hub
    )
    placeholders = (
        open_media(config.media, config.data.data, "cpu").placeholders
        if config.kind == "media"
        else {}
    )
    tokenizer = load_chat_tokenizer(model, config.tokenizer, config.chat, placeholders)
    training, _ = data_files.data_or_builtin(config.data.data, (), data_files.NAMES[config.kind])
    for sources in (training, config.data.val_data):
        if not sources:
            continue
        kind = MEDIA_CHATS if config.kind == "media" else KINDS[config.kind]
        prepared = prepare(sources, tokenizer, config.chat, config.data, config.seed, kind=kind)
        for line in (
            json_lines(prepared)
            if config.json
            else page(prepared, config.examples, tokenizer.fast.decode)
        ):
            print(line)


def json_lines(prepared: Prepared) -> Iterator[str]:
    """One line a record in the order of the sources; with several sources each names its file."""
    drops = sorted(
        (entry["source"], entry["line"], entry["reason"]) for entry in read_drops(prepared)
    )
    records = [(*origin, i) for i, origin in enumerate(prepared.origin.tolist())]
    for source, line, found in sorted([*records, *drops], key=lambda entry: entry[:2]):
        head = (
            {"file": prepared.info["sources"][source]["path"]}
            if len(prepared.info["sources"]) > 1
            else {}
        )
        body = {"dropped": found} if isinstance(found, str) else record_of(prepared, found)
        yield json.dumps(head | {"line": line} | body, ensure_ascii=False)


def record_of(prepared: Prepared, i: int) -> dict:
    """ids, labels and weights of record i; where a record has several sequences they stand in a list."""
    parts = []
    for j in range(prepared.k):
        ids, weights = (array.tolist() for array in sequence(prepared, i * prepared.k + j))
        labels = [token if weight else -100 for token, weight in zip(ids, weights, strict=True)]
        parts.append({"ids": ids, "labels": labels, "weights": weights})
    extras = {
        name: None if math.isnan(values[i]) else float(values[i])
        for name, values in prepared.extras.items()
    }
    return (parts[0] if prepared.k == 1 else {"sequences": parts}) | extras


def page(prepared: Prepared, examples: int, decode) -> Iterator[str]:
    """Counts and drops, a histogram of lengths, and the first records with their learned tokens in colour."""
    yield from report(prepared.info)
    yield from histogram(lengths(prepared).tolist())
    for i in range(min(examples, len(prepared.origin))):
        source, line = prepared.origin[i]
        extras = "".join(f" {name}={values[i]:g}" for name, values in prepared.extras.items())
        yield f"\n{prepared.info['sources'][source]['path']}:{line}{extras}  (green: learned, yellow: with a weight of its own, dim: not learned)"
        for j in range(prepared.k):
            ids, weights = (array.tolist() for array in sequence(prepared, i * prepared.k + j))
            yield show(Tokens(ids, weights), decode)


def histogram(sizes: list[int], bins: int = 12) -> Iterator[str]:
    """Lines of `from-to |#### count` over equal widths, and the middle, 95 % and longest."""
    ranked = sorted(sizes)
    middle, high = ranked[len(ranked) // 2], ranked[min(len(ranked) * 95 // 100, len(ranked) - 1)]
    yield f"\ntokens a record: median {middle:,}, 95 % up to {high:,}, longest {ranked[-1]:,}"
    width = -(-(ranked[-1] - ranked[0] + 1) // bins)
    counts = [0] * ((ranked[-1] - ranked[0]) // width + 1)
    for size in sizes:
        counts[(size - ranked[0]) // width] += 1
    for i, count in enumerate(counts):
        start = ranked[0] + i * width
        yield f"{start:>8,}-{start + width - 1:<8,}|{'#' * -(-count * BAR // max(counts))} {count:,}"


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the run quietly
    cli(main, InspectData)
