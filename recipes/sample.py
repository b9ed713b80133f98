"""Choose among the answers of every record: at random, by reward, or by rejection sampling.

    python recipes/sample.py --data scored.jsonl --method best --n 1 --out chosen.jsonl
    python recipes/sample.py --data scored.jsonl --method rejection --n 4 --beta 0.5 \
        --out chosen.jsonl
    python recipes/sample.py --data scored.jsonl --as-pairs --out pairs.jsonl     # for dpo.py

A line of data: {"messages": [...],
"answers": [{"id": "a", "content": "4"}, {"id": "b", "content": "5"}], "rewards": {"a": 1, "b": 0}}
A line of the output is the record with the chosen answers only, best first where there are
rewards; with --as-chats, one chat for each; with --as-pairs, a pair of the best and the worst.
Where one record gives several lines, their ids are its own with a number from 0 behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import ta
from ta import Range
from ta.command_line import SEED
from ta.data.jsonl import naming
from ta.data.records import check_candidates
from ta.files import locked_file, write_jsonl


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
    """Only for rejection: the temperature; towards 0 it is best, large it is random."""
    seed: Annotated[int, SEED] = 0
    """Seed of the choice; each record's depends on its place and this alone."""
    as_chats: bool = False
    """Write chats for sft.py, one a chosen answer, instead of candidate records."""
    as_pairs: bool = False
    """Write pairs for dpo.py: of each record the best against the worst answer by reward, then with
    --n 2 and more the second best against the second worst, and so on."""
    keep_duplicates: bool = False
    """Keep answers that repeat another one of their record, which would be trained twice."""
    overwrite: bool = False
    """Replace an output that exists."""


def distinct(answers: list[dict], rewards: dict) -> list[dict]:
    """The answers without those that repeat the text of another one; the best rewarded stays."""
    kept: dict[str, dict] = {}
    for answer in answers:
        other = kept.setdefault(answer["content"], answer)
        if rewards.get(answer["id"], 0) > rewards.get(other["id"], 0):
            kept[answer["content"]] = answer
    return list(kept.values())


def choose(config: Config, place: int, answers: list[dict], rewards: dict) -> list[dict]:
    """The answers to keep of a record, best first where there are rewards.

    ValueError where a reward is needed and missing.
    """
    seed = f"{config.seed}-{place}"
    if config.method == "random":
        return [answers[i] for i in ta.choose_random(len(answers), config.n, seed=seed)]
    values = rewards_of(config, answers, rewards)
    chosen = (
        ta.choose_best(values, config.n)
        if config.method == "best"
        else ta.choose_rejection(values, config.n, seed=seed, beta=config.beta)
    )
    return [answers[i] for i in sorted(chosen, key=lambda i: -values[i])]


def rewards_of(config: Config, answers: list[dict], rewards: dict) -> list[float]:
    """The reward of each answer; ValueError where one is missing."""
    if missing := [answer["id"] for answer in answers if answer["id"] not in rewards]:
        needs = "--as-pairs" if config.as_pairs else f"--method {config.method}"
        raise ValueError(
            f"answer {missing[0]!r} has no reward, which {needs} needs; score the file first"
        )
    return [rewards[answer["id"]] for answer in answers]


def pairs_of(config: Config, answers: list[dict], rewards: dict) -> list[dict]:
    """The best against the worst answer, then the second best against the second worst, and so on.

    There are at most --n of them, and none of equal rewards.
    """
    values = rewards_of(config, answers, rewards)
    order = ta.choose_best(values, len(values))
    turns = [{"role": "assistant", "content": answers[i]["content"]} for i in order]
    pairs = []
    for k in range(min(config.n, len(order) // 2)):
        best, worst = values[order[k]], values[order[-k - 1]]
        if best > worst:
            own = {"answer_w": turns[k], "answer_l": turns[-k - 1]}
            pairs.append(own | {"reward_w": best, "reward_l": worst})
    return pairs


def lines_of(config: Config, place: int, record: dict, answers: list[dict]) -> list[dict]:
    """What is written of a record: itself with its chosen answers, or a chat or pair a line."""
    rewards = record.get("rewards") or {}
    rest = {k: v for k, v in record.items() if k not in ("answers", "rewards", "key")}
    if config.as_pairs:
        del rest["messages"]
        pairs = pairs_of(config, answers, rewards)
        return [rest | {"context": record["messages"]} | pair for pair in pairs]
    chosen = choose(config, place, answers, rewards)
    if config.as_chats:
        turns = [{"role": "assistant", "content": answer["content"]} for answer in chosen]
        return [rest | {"messages": [*record["messages"], turn]} for turn in turns]
    kept = {answer["id"]: rewards[answer["id"]] for answer in chosen if answer["id"] in rewards}
    return [rest | {"answers": chosen} | ({"rewards": kept} if rewards else {})]


def main(config: Config) -> None:
    if not config.data:
        raise ValueError("no data to choose from: give --data FILE.jsonl with candidate answers")
    if config.as_pairs and (config.as_chats or config.method != "best"):
        other = "--as-chats" if config.as_chats else f"--method {config.method}"
        raise ValueError(
            f"--as-pairs takes the best and the worst answer by reward: leave {other} out"
        )
    lines, repeated, without = [], 0, 0
    with locked_file(config.out, config.overwrite):
        ta.AnswersFile(config.out, overwrite=True)  # ValueError where it is none of ours
        for place, record in enumerate(ta.read_records(config.data, check_candidates)):
            answers = record.data["answers"]
            if not config.keep_duplicates:
                answers = distinct(answers, record.data.get("rewards") or {})
                repeated += len(record.data["answers"]) - len(answers)
            with naming(f"{record.path}:{record.line}"):
                made = lines_of(config, place, record.data, answers)
            without += not made
            if "id" in record.data and len(made) > 1:
                made = [line | {"id": f"{line['id']}-{n}"} for n, line in enumerate(made)]
            lines += made
        write_jsonl(config.out, lines)
    ta.parallel.tell(f"{config.out}: {len(lines):,} lines")
    if repeated:
        ta.parallel.tell(
            f"note: {repeated:,} answers that repeat another one of their record were left out "
            "(--keep-duplicates keeps them)"
        )
    if config.as_pairs and without:
        ta.parallel.tell(f"note: {without:,} records have no two answers of different reward")


if __name__ == "__main__":
    ta.cli(main, Config)
