"""Choose among the answers of every record: at random, by reward, or by rejection sampling.

    python recipes/sample.py --data scored.jsonl --method best --n 1 --out chosen.jsonl
    python recipes/sample.py --data scored.jsonl --method rejection --n 4 --beta 0.5 \
        --out chosen.jsonl

A line of data: {"messages": [...],
"answers": [{"id": "a", "content": "4"}, {"id": "b", "content": "5"}], "rewards": {"a": 1, "b": 0}}
A line of the output is the record with the chosen answers only, best first where there are
rewards; with --as-chats, one chat for each.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import ta
from ta import Range
from ta.data.records import check_candidates
from ta.files import locked, write_atomic


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ()
    """Sources of candidate records."""
    out: str = "chosen.jsonl"
    """File to write."""
    method: Literal["random", "best", "rejection"] = "best"
    """random; best by reward; rejection: RSO (Liu et al. 2023), accepted with probability
    exp((r - r_max) / beta)."""
    n: Annotated[int, Range(0)] = 1
    """Answers to keep of each record; all of them where there are fewer."""
    beta: Annotated[float, Range(0, above=True)] = 0.5
    """Of rejection: the temperature; towards 0 it is best, large it is random."""
    seed: int = 0
    """Seed of the choice; each record's depends on its place and this alone."""
    as_chats: bool = False
    """Write chats for sft.py, one a chosen answer, instead of candidate records."""
    overwrite: bool = False
    """Replace an output that exists."""


def choose(config: Config, place: int, record: dict) -> list[dict]:
    """The answers to keep of a record, best first where there are rewards.

    ValueError where a reward is needed and missing.
    """
    answers, seed = record["answers"], f"{config.seed}-{place}"
    if config.method == "random":
        return [answers[i] for i in ta.sample_random(len(answers), config.n, seed=seed)]
    by_id = record.get("rewards") or {}
    missing = [answer["id"] for answer in answers if answer["id"] not in by_id]
    if missing:
        raise ValueError(
            f"record {place + 1}: answer {missing[0]!r} has no reward, which --method "
            f"{config.method} needs; score the file first"
        )
    rewards = [by_id[answer["id"]] for answer in answers]
    chosen = (
        ta.sample_best(rewards, config.n)
        if config.method == "best"
        else ta.sample_rejection(rewards, config.n, seed=seed, beta=config.beta)
    )
    return [answers[i] for i in sorted(chosen, key=lambda i: -rewards[i])]


def lines_of(config: Config, record: dict, answers: list[dict]) -> list[dict]:
    """The record with its chosen answers, or a chat for each of them."""
    if not config.as_chats:
        return [record | {"answers": answers}]
    rest = {k: v for k, v in record.items() if k not in ("answers", "rewards", "key")}
    turns = [{"role": "assistant", "content": answer["content"]} for answer in answers]
    return [rest | {"messages": [*record["messages"], turn]} for turn in turns]


def main(config: Config) -> None:
    if not config.data:
        raise ValueError("no data to choose from: give --data FILE.jsonl with candidate answers")
    out = ta.AnswersFile(config.out, overwrite=config.overwrite)
    lines = []
    for place, record in enumerate(ta.read_records(config.data, check_candidates)):
        lines += lines_of(config, record.data, choose(config, place, record.data))
    with locked(out.path):
        ta.AnswersFile(config.out, overwrite=config.overwrite)  # none has been written meanwhile
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(out.path, text)
    print(f"{out.path}: {len(lines):,} lines", file=sys.stderr)


if __name__ == "__main__":
    ta.cli(main, Config)
