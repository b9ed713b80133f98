"""Score with a trained head: rewards of candidate answers, or classes of dialogues.

    python recipes/score.py --model-path runs/rm/final --data candidates.jsonl --out scored.jsonl
    python recipes/score.py --model-path runs/classify/final --kind class --data chats.jsonl \
        --out classes.jsonl
    torchrun --nproc-per-node 8 recipes/score.py ...        # each takes every 8th record
    python recipes/score.py --engine vllm ...                          (the same numbers)

A line of data: {"messages": [{"role": "user", "content": "2 + 2?"}],
"answers": [{"id": "a", "content": "4"}, {"id": "b", "content": "5"}]}
A line of the output has the record's fields and {"rewards": {"a": 1.2, "b": -0.7}}, or
{"prediction": 1, "probabilities": [0.1, 0.9], "class": "pos"}, the class where it has a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import ta
from ta import Range
from ta.chat.encode import ONE_ANSWER, Drop, refuse_idle
from ta.chat.messages import template_arguments
from ta.data.prepare import CLASSES
from ta.data.records import check_candidates, check_class
from ta.data.sources import source_names
from ta.files import hash_json

CLASS_TEXTS = partial(check_class, need_label=False)
AT_ONCE = 128  # records whose scores are written together: what a killed run loses at most


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    vllm: ta.VllmConfig = ta.VllmConfig()
    vllm_model: ta.VllmModelConfig = ta.VllmModelConfig()
    kind: Literal["candidates", "class"] = "candidates"
    """Reward every candidate answer, or classify whole dialogues."""
    data: tuple[str, ...] = ()
    """Sources of records, as in training."""
    out: str = "scored.jsonl"
    """File to write."""
    engine: Literal["hf", "vllm"] = "hf"
    """transformers' model, or vLLM where it computes the same head."""
    max_tokens_per_micro: Annotated[int, Range(1)] = 8192
    """Tokens in one forward pass of the hf engine: the memory knob."""
    resume: bool = False
    """Keep what a stopped run has scored."""
    overwrite: bool = False
    """Replace an output that exists."""


def read_data(config: Config) -> list[dict]:
    """The checked records; those of classes need no label."""
    check = check_candidates if config.kind == "candidates" else CLASS_TEXTS
    files, _ = ta.data_or_builtin(config.data, (), "candidates", config.model.hub)
    names = source_names(files)
    return [
        # where there are several sources a record says from which it is
        {**record.data, "file": names[record.source]} if len(files) > 1 else record.data
        for record in ta.read_records(files, check)
    ]


def sequences_of(config: Config, tokenizer, record: dict) -> list:
    """The token sequences of a record: one a candidate, or the whole dialogue.

    ValueError where it does not fit.
    """
    chat, about = (tokenizer, config.chat), [template_arguments(record)]
    if config.kind == "candidates":
        answers = [{"role": "assistant", "content": a["content"]} for a in record["answers"]]
        (encoded,) = ta.encode_answers([record["messages"]], [answers], *chat, about)
    else:
        dialogues = [CLASSES.dialogues(record, tokenizer)]
        (encoded,) = ta.encode_dialogues(dialogues, *chat, CLASSES.rule, about)
    if isinstance(encoded, Drop):
        raise ValueError(f"{encoded.reason}: {encoded.detail}; raise --max-tokens")
    return encoded


def load_scorer(config: Config, tokenizer, num_labels: int, device: str):
    """The model with its head: ours over transformers', or a started vLLM."""
    if config.engine == "vllm":
        settings = config.vllm, config.vllm_model
        return ta.start_vllm(config.model, tokenizer.fast, *settings, num_labels=num_labels)
    model, _ = ta.wrap(ta.load_for_inference(config.model, device, num_labels))
    return model


def result_of(config: Config, names: list[str], record: dict, rows: list[list[float]]) -> dict:
    """{"rewards": {answer id: reward}}, or the most probable class and all probabilities.

    `names` are those of the classes, [] where they have none.
    """
    if config.kind == "candidates":
        pairs = zip(record["answers"], rows, strict=True)
        return {"rewards": {str(answer["id"]): row[0] for answer, row in pairs}}
    logits = rows[0]
    shifted = [math.exp(x - max(logits)) for x in logits]
    prediction = logits.index(max(logits))
    result = {"prediction": prediction, "probabilities": [x / sum(shifted) for x in shifted]}
    return result | ({"class": names[prediction]} if names else {})


def main(config: Config) -> None:
    # each process works on its own share and waits for no other
    device = ta.parallel.pick_device()
    rule = ONE_ANSWER if config.kind == "candidates" else CLASSES.rule
    refuse_idle(config.chat, rule.idle, "records are scored and none is learned")
    if not config.data:
        raise ValueError("no data to score: give --data FILE.jsonl")
    ta.check_engine(config.engine, config.vllm, config.vllm_model)
    out = ta.AnswersFile(config.out, config.resume, config.overwrite)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    num_labels, names = ta.num_labels_of(config.model), ta.class_names_of(config.model)
    if (config.kind == "candidates") != (num_labels == 1):
        raise ValueError(
            f"--kind {config.kind} with a head of {num_labels} scores: candidates need a reward "
            "model (1), class a classifier (2 or more)"
        )
    records = read_data(config)
    # all that a score depends on
    model_key = ta.model_key(config.model, tokenizer, config.chat)
    scored_by = [model_key, config.kind, config.engine]
    keys = [hash_json([scored_by, i, record])[:16] for i, record in enumerate(records)]
    done = out.done(keys)
    mine = out.share(keys)
    blocks = [mine[start : start + AT_ONCE] for start in range(0, len(mine), AT_ONCE)]
    # what is scored beside a sequence moves the last bits of its score, so a block is scored whole
    todo = [block for block in blocks if any(keys[i] not in done for i in block)]

    sequences = {i: sequences_of(config, tokenizer, records[i]) for block in todo for i in block}
    model = load_scorer(config, tokenizer, num_labels, device)
    every = [tokens.ids for group in sequences.values() for tokens in group]
    ta.check_prompts(every, *ta.limits_of(model), room=0)
    with out.writing(len(out.share(keys, done)), "score"):
        for block in todo:
            flat = [tokens for i in block for tokens in sequences[i]]
            scores = iter(ta.score(model, flat, config.max_tokens_per_micro))
            for i in block:
                group = sequences[i]
                result = result_of(config, names, records[i], [next(scores) for _ in group])
                if keys[i] not in done:
                    tokens = sum(len(tokens.ids) for tokens in group)
                    out.append(records[i] | result | {"key": keys[i]}, tokens)
    out.publish(keys, done)


if __name__ == "__main__":
    ta.cli(main, Config)
