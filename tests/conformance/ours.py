"""The data step of this project on one cell."""

import json
from pathlib import Path

from cells import Cell
from judge import FOLLOWING, Outcome, record_of

import ta
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import ChatTokenizer
from ta.data.prepare import sequence
from ta.data.sources import Drops
from ta.generation.prompts import read_prompts


def outcome(fast, name: str, cell: Cell, tokenizer: ChatTokenizer, folder: Path) -> Outcome:
    """What the project makes of the cell's record; ValueError is its refusal."""
    record = record_of(fast, name, cell)
    if cell.kind == "prompt":
        return _prompt(record, tokenizer, folder)
    return _one(record, tokenizer, cell.kind, cell.loss_on, folder)


def _written(record: dict, folder: Path) -> str:
    file = folder / "record.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    return str(file)


def _one(record, tokenizer, kind: str, loss_on, folder: Path) -> Outcome:
    data = ta.DataConfig(cache_dir=str(folder / "cache"))
    prepare = ta.prepare_pairs if kind == "pair" else ta.prepare_chats
    file = _written(record, folder)
    try:
        prepared = prepare((file,), tokenizer, ChatConfig(loss_on=loss_on), data, 0)
    except ValueError as error:
        return Outcome(error=str(error).removeprefix(f"{file}:"))
    found = [sequence(prepared, i) for i in range(prepared.k)]
    sequences = [(ids.tolist(), weights.tolist()) for ids, weights in found]
    return Outcome(sequences, "; ".join(prepared.info["notes"]))


def _prompt(record, tokenizer, folder: Path) -> Outcome:
    file = _written(record, folder)
    try:
        with open(folder / "drops.jsonl", "w") as dropped:
            drops = Drops("error", 0.0, 1, dropped)
            ((_, ids),) = read_prompts([file], tokenizer, ChatConfig(), drops)
    except ValueError as error:
        return Outcome(error=str(error).removeprefix(f"{file}:"))
    followed = record | {"messages": [*record["messages"], FOLLOWING]}
    chat = _one(followed, tokenizer, "chat", "answers", folder)
    return chat._replace(sequences=[(ids, []), *chat.sequences])
