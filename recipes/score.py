"""Score with a trained head: the reward of every candidate answer, or the class of every dialogue with its probabilities.

    python recipes/score.py --model-path runs/rm/final --data candidates.jsonl --out scored.jsonl
    python recipes/score.py --model-path runs/classify/final --kind class --data chats.jsonl --out classes.jsonl
    torchrun --nproc-per-node 8 recipes/score.py ...                   (each process takes every 8th record)
    python recipes/score.py --engine vllm ...                          (the same numbers)

A line of data: {"messages": [{"role": "user", "content": "2 + 2?"}], "answers": [{"id": "a", "content": "4"}, {"id": "b", "content": "5"}]}
A line of the output has the record's fields and {"rewards": {"a": 1.2, "b": -0.7}}, or {"prediction": 1, "probabilities": [0.1, 0.9]}.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ta import parallel
from ta.chat.encode import Drop, encode_answers, encode_dialogues
from ta.chat.messages import ANSWER
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.command_line import cli
from ta.data.prepare import CLASSES
from ta.data.records import check_candidates, check_chat
from ta.data.sources import read_records
from ta.files import hash_json
from ta.folders import ModelConfig, fingerprint, resolve
from ta.generation import answers_file
from ta.generation.settings import check_prompts
from ta.generation.vllm_engine import VllmConfig
from ta.model.inference import (
    labels_in,
    open_scorer,
    vllm_settings,
)


@dataclass(frozen=True)
class Score:
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    chat: ChatConfig = ChatConfig()
    vllm: VllmConfig = VllmConfig()
    kind: Literal["candidates", "class"] = "candidates"
    """Reward every candidate answer, or classify whole dialogues."""
    data: tuple[str, ...] = ()
    """Sources of records, as in training."""
    out: str = "scored.jsonl"
    """File to write."""
    engine: Literal["hf", "vllm"] = "hf"
    """transformers' model, or vLLM where it computes the same head."""
    max_tokens_per_micro: int = 8192
    """Tokens in one forward pass of the hf engine: the memory knob."""
    resume: bool = False
    """Keep what a stopped run has scored."""
    overwrite: bool = False
    """Replace an output that exists."""


def sequences_of(config: Score, tokenizer, data: dict) -> list:
    """The token sequences of one record: one a candidate, or the whole dialogue. ValueError where it does not fit."""
    if config.kind == "candidates":
        answers = [{"role": ANSWER, "content": answer["content"]} for answer in data["answers"]]
        found = encode_answers([data["messages"]], [answers], tokenizer, config.chat)[0]
    else:
        dialogues = [CLASSES.dialogues(data, tokenizer)]
        found = encode_dialogues(dialogues, tokenizer, config.chat, CLASSES.rule)[0]
    if isinstance(found, Drop):
        raise ValueError(f"{found.reason}: {found.detail}; raise --max-tokens")
    return found


def main(config: Score) -> None:
    # each process works on its own share and waits for no other
    rank, world, device = parallel.rank(), parallel.world(), parallel.pick_device()
    if not config.data:
        raise ValueError("no data to score: give --data FILE.jsonl")
    vllm = vllm_settings(config.engine, config.vllm, world)
    out = Path(config.out)
    answers_file.check(out, config.resume, config.overwrite, rank, world)
    model, sources = config.model, resolve(config.model)
    tokenizer = load_chat_tokenizer(model, config.tokenizer, config.chat)
    num_labels = labels_in(model)
    if (config.kind == "candidates") != (num_labels == 1):
        raise ValueError(
            f"--kind {config.kind} with a head of {num_labels} scores: candidates need a reward model (1), class a classifier (2 or more)"
        )
    check = (
        check_candidates
        if config.kind == "candidates"
        else lambda data: check_chat(data, need_answer=False)
    )
    records = [record.data for record in read_records(config.data, check)]
    who = [
        fingerprint(sources.base, model.hub),
        sources.adapter and fingerprint(sources.adapter),
        model.dtype,
        dataclasses.asdict(config.chat),
    ]
    who += [config.kind, config.engine]
    keys = [hash_json([who, i, data])[:16] for i, data in enumerate(records)]
    there = answers_file.done(out, keys) if not config.overwrite else {}
    mine = [i for i in range(rank, len(records), world) if keys[i] not in there]
    sequences = [sequences_of(config, tokenizer, records[i]) for i in mine]
    score, vocabulary, context = open_scorer(
        model, tokenizer.fast, num_labels, device, config.max_tokens_per_micro, vllm
    )
    check_prompts(
        [tokens.ids for parts in sequences for tokens in parts], vocabulary, context, room=0
    )
    answers_file.begin(out, config.overwrite, rank, world)
    with (
        answers_file.Part(out, rank) as part,
        answers_file.progress("score", len(mine), rank == 0) as advance,
    ):
        for start in range(0, len(mine), 128):
            chunk = sequences[start : start + 128]
            scores = iter(score([tokens for parts in chunk for tokens in parts]))
            for i, parts in zip(mine[start : start + 128], chunk, strict=True):
                part.append(
                    records[i]
                    | result_of(config.kind, records[i], [next(scores) for _ in parts])
                    | {"key": keys[i]}
                )
                advance(parts)
    if answers_file.publish(out, keys):
        print(f"{out}: {len(keys):,} records, {len(there):,} of them from before", file=sys.stderr)


def result_of(kind: str, data: dict, rows: list[list[float]]) -> dict:
    """{"rewards": {answer id: reward}}, or the most probable class and all probabilities."""
    if kind == "candidates":
        return {
            "rewards": {
                str(answer["id"]): row[0] for answer, row in zip(data["answers"], rows, strict=True)
            }
        }
    from math import exp

    shifted = [exp(x - max(rows[0])) for x in rows[0]]
    return {
        "prediction": rows[0].index(max(rows[0])),
        "probabilities": [x / sum(shifted) for x in shifted],
    }


if __name__ == "__main__":
    cli(main, Score)
