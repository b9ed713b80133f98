"""Measure answers: named figures with their intervals, in all and for each record.

    python recipes/evaluate.py --answers answers.jsonl --metrics accuracy rouge_l
    python recipes/evaluate.py --answers a.jsonl --against b.jsonl --reward-model runs/rm/final
    python recipes/evaluate.py --model-path runs/sft/final --data held_out.jsonl    # answers first
    python recipes/evaluate.py --model-path MODEL --data chats.jsonl --perplexity   # of its answers

A line of answers is what recipes/generate.py and score.py write, or any object with an answer (or
prediction, output, response) and a reference (or label, target, gold answer) as text:

    {"id": 1, "answer": "4", "reference": "4"}

The output holds each figure with the interval in which it lies with 95 % by the bootstrap over
records, and the figures of each record. With --against, a line says of each metric by how much the
second file is better than the first, and in which share of the records.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ta
from ta import Range
from ta.files import locked_file, read_json_lines, write_atomic
from ta.generation import evaluation


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    generation: ta.GenerateConfig = ta.GenerateConfig()
    answers: str = ""
    """File of answers to measure. Default: the model answers --data."""
    against: str = ""
    """A second file of answers to the same records, to be compared with the first."""
    data: tuple[str, ...] = ()
    """Sources of chats that the model answers. Default: built-in held-out chats."""
    perplexity: bool = False
    """Measure how probable the model finds the answers that stand in --data; nothing is
    generated."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Metrics of ta/generation/metrics.py, such as accuracy, contains, rouge_l, meteor, bleu,
    length, self_bleu_of_prompt, perplexity."""
    reward_model: str = ""
    """Folder of a reward model: the figure reward is the mean reward of the answers."""
    max_tokens_per_micro: Annotated[int, Range(1)] = 8192
    """Tokens in one forward pass of --perplexity: the memory knob."""
    out: str = "evaluation.json"
    """File to write: figures in all and for each record."""
    overwrite: bool = False
    """Replace an output that exists."""


# names of fields in files of answers
ANSWER = ("answer", "prediction", "output", "response", "completion")
REFERENCE = ("reference", "label", "target", "gold_answer", "expected")


def read_answers(path: str) -> list[dict]:
    """The objects of a file; ValueError where there is none or one has no answer."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; give a file of answers")
    records = list(read_json_lines(Path(path)))
    if not records:
        raise ValueError(f"{path} holds no records")
    for line, record in enumerate(records, 1):
        if not texts_of(record):
            raise ValueError(
                f"{path}:{line} has no answers: give answers as generate.py writes them, or a text "
                f"as one of {', '.join(ANSWER)}"
            )
    return records


def texts_of(record: dict) -> list[dict]:
    """The answers of a record as [{"content", "logprobs"?, "id"?}]."""
    if record.get("answers"):
        return record["answers"]
    given = next((record[name] for name in ANSWER if record.get(name) is not None), None)
    if isinstance(given, dict):
        given = given.get("content")
    return [] if given is None else [{"content": str(given)}]


def inputs_of(record: dict) -> dict:
    """What the metrics are made of, as far as a record has it."""
    answers = texts_of(record)
    texts = [answer["content"] for answer in answers]
    inputs = {"answers": texts, "groups": [texts]}
    reference = next((record[name] for name in REFERENCE if record.get(name) is not None), None)
    if reference is not None:
        right = [str(reference)] * len(texts)
        inputs |= {"references": right, "predictions": texts, "labels": right}
    if all("logprobs" in answer for answer in answers):
        inputs["logprobs"] = [answer["logprobs"] for answer in answers]
    rewards = record.get("rewards") or {}
    if rewards and all(str(answer.get("id")) in rewards for answer in answers):
        inputs["rewards"] = [rewards[str(answer["id"])] for answer in answers]
    return inputs


def answer_data(config: Config) -> list[dict]:
    """Records with the answers of the model to --data."""
    device = ta.parallel.pick_device()
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    files = config.data or ta.data_or_builtin((), (), "chats")[1]
    prompts = ta.read_prompts(files, tokenizer, config.chat, ta.Drops())
    model = ta.load_for_inference(config.model, device)
    ids = [tokens for _, tokens in prompts]
    settings = ta.with_stop_strings(config.generation, tokenizer.stop_strings)
    answers = ta.generate(model, tokenizer.fast, ids, settings, tokenizer.stop_ids)
    return [
        record | {"answers": ta.answers_to_json(group, "tokens")}
        for (record, _), group in zip(prompts, answers, strict=True)
    ]


def probabilities(config: Config) -> list[dict]:
    """For each record of --data the log-probabilities of its answers' tokens under the model."""
    device = ta.parallel.pick_device()
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    files = config.data or ta.data_or_builtin((), (), "chats")[1]
    data = ta.prepare_chats(files, tokenizer, config.chat, ta.DataConfig())
    model, _ = ta.wrap(ta.load_for_inference(config.model, device))
    logprobs = ta.answer_logprobs(model, data, config.max_tokens_per_micro)
    return [{"logprobs": [one]} for one in logprobs]


def with_rewards(config: Config, records: list[dict]) -> list[dict]:
    """The records with rewards of the reward model, which needs their messages."""
    if any("messages" not in record for record in records):
        raise ValueError("--reward-model needs the messages before each answer: give them")
    device = ta.parallel.pick_device()
    chats = [record["messages"] for record in records]
    texts = [[answer["content"] for answer in texts_of(record)] for record in records]
    rewards = ta.reward_answers(config.reward_model, chats, texts, device)
    named = [[{**a, "id": str(i)} for i, a in enumerate(texts_of(record))] for record in records]
    return [
        record | {"answers": answers, "rewards": {str(i): r for i, r in enumerate(group)}}
        for record, answers, group in zip(records, named, rewards, strict=True)
    ]


def paired(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """The records that both files have, by id, else by messages, else by their place."""
    for name in ("id", "messages"):
        keys = [[json.dumps(r.get(name)) for r in records] for records in (first, second)]
        if all(len(set(some)) == len(some) and "null" not in some for some in keys):
            other = dict(zip(keys[1], second, strict=True))
            pairs = [(r, other[k]) for k, r in zip(keys[0], first, strict=True) if k in other]
            break
    else:
        if len(first) != len(second):
            raise ValueError(
                f"the files have {len(first)} and {len(second)} records and no ids by which they "
                "pair up: give each record an id"
            )
        pairs = list(zip(first, second, strict=True))
    if not pairs:
        raise ValueError("the two files have no record in common: give answers to the same records")
    return pairs


def shown(value: float, low: float | None = None, high: float | None = None) -> str:
    """0.512 [0.41, 0.62]"""
    return f"{value:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")


def main(config: Config) -> dict:
    """Measure; returns {metric: Figure}, or {metric: Comparison} of two files."""
    with locked_file(config.out, config.overwrite):
        return measure(config)


def measure(config: Config) -> dict:
    """Measure and write --out; returns what `main` does."""
    if config.against and not config.answers:
        raise ValueError("--against FILE is compared with --answers FILE: give both")
    if config.perplexity and config.answers:
        raise ValueError("--perplexity is of --data under the model: leave --answers out")
    names = list(config.metrics) + ["reward"] * bool(config.reward_model)
    names = ["perplexity"] if config.perplexity else list(dict.fromkeys(names))
    if config.against:
        pairs = paired(read_answers(config.answers), read_answers(config.against))
        sides = [[pair[k] for pair in pairs] for k in (0, 1)]
    elif config.answers:
        sides = [read_answers(config.answers)]
    else:
        sides = [probabilities(config) if config.perplexity else answer_data(config)]
    if config.reward_model and not config.perplexity:
        sides = [with_rewards(config, side) for side in sides]
    inputs = sides if config.perplexity else [[inputs_of(r) for r in side] for side in sides]
    texts = [text for record in inputs[0] for text in record.get("references", ())]
    if note := ta.spacing_note(names, texts):
        ta.parallel.tell(note)

    rows, figures, seed = [], {}, config.generation.seed
    if config.against:
        header = ("metric", "first", "second", "second - first", "second better in")
        for name in names:
            figures[name] = found = evaluation.compare(name, *inputs, seed)
            gap, wins = (shown(*x[:3]) for x in (found.difference, found.wins))
            rows.append((name, shown(found.first), shown(found.second), gap, wins))
        counted = found.difference.records
    else:
        header = ("metric", "value [95 %]", "records")
        for name in names:
            figures[name] = found = evaluation.figure(name, inputs[0], seed)
            rows.append((name, shown(*found[:3]), found.records))
        counted = len(inputs[0])
    print(ta.table(rows, header))
    each = {name: [evaluation.values_of(name, side) for side in inputs] for name in names}
    records = [
        {"id": record.get("id", i)}
        | {
            name: [side[i] if side[i] == side[i] else None for side in of]
            for name, of in each.items()
        }
        for i, record in enumerate(sides[0])
    ]
    whole = {name: plain(found) for name, found in figures.items()}
    text = json.dumps({"figures": whole, "records": records}, ensure_ascii=False, indent=1)
    write_atomic(Path(config.out), text + "\n")
    ta.parallel.tell(f"{config.out}: {len(names)} metrics of {counted:,} records")
    return figures


def plain(found) -> dict:
    """A Figure or Comparison as JSON values; nan is null."""
    return {
        name: plain(value) if hasattr(value, "_asdict") else None if value != value else value
        for name, value in found._asdict().items()
    }


if __name__ == "__main__":
    ta.cli(main, Config)
