"""Choose among the candidate answers of every record: some at random, the best by reward, or those that rejection sampling accepts.

    python recipes/sample.py --data scored.jsonl --method best --n 1 --out chosen.jsonl
    python recipes/sample.py --data scored.jsonl --method rejection --n 4 --beta 0.5 --out chosen.jsonl

A line of data: {"messages": [...], "answers": [{"id": "a", "content": "4"}, {"id": "b", "content": "5"}], "rewards": {"a": 1.2, "b": -0.7}}
A line of the output is the record with the chosen answers only, best first where there are rewards; with --as-chats, one chat for each.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ta.command_line import cli
from ta.data.records import check_candidates
from ta.data.sources import read_records
from ta.files import locked, write_atomic
from ta.generation import answers_file
from ta.generation.sampling import SAMPLERS


@dataclass(frozen=True)
class Sample:
    data: tuple[str, ...] = ()
    """Sources of candidate records."""
    out: str = "chosen.jsonl"
    """File to write."""
    method: Literal["random", "best", "rejection"] = "best"
    """random; best by reward; rejection: RSO (Liu et al. 2023), accepted with probability exp((r - r_max) / beta)."""
    n: int = 1
    """Answers to keep of each record; all of them where there are fewer."""
    beta: float = 0.5
    """Of rejection: the temperature; towards 0 it is best, large it is random."""
    seed: int = 0
    """Seed of the choice; each record's depends on its place and this alone."""
    as_chats: bool = False
    """Write chats for sft.py, one a chosen answer, instead of candidate records."""
    overwrite: bool = False
    """Replace an output that exists."""


def chosen(config: Sample, place: int, data: dict) -> list[dict]:
    """The answers to keep of a record. ValueError where a reward is needed and missing."""
    answers, rewards, seed = data["answers"], data.get("rewards") or {}, f"{config.seed}-{place}"
    if config.method == "random":
        return [answers[i] for i in SAMPLERS["random"](len(answers), config.n, seed=seed)]
    missing = [answer["id"] for answer in answers if answer["id"] not in rewards]
    if missing:
        raise ValueError(
            f"record {place + 1}: answer {missing[0]!r} has no reward, which --method {config.method} needs; score the file first"
        )
    extra = {"seed": seed, "beta": config.beta} if config.method == "rejection" else {}
    kept = partial(SAMPLERS[config.method], **extra)(
        [rewards[answer["id"]] for answer in answers], config.n
    )
    return [answers[i] for i in sorted(kept, key=lambda i: -rewards[answers[i]["id"]])]


def main(config: Sample) -> None:
    if not config.data:
        raise ValueError("no data to choose from: give --data FILE.jsonl with candidate answers")
    out = Path(config.out)
    answers_file.check(out, False, config.overwrite)
    lines = []
    for place, record in enumerate(read_records(config.data, check_candidates)):
        answers = chosen(config, place, record.data)
        rest = {
            key: value
            for key, value in record.data.items()
            if key not in ("answers", "rewards", "key")
        }
        if config.as_chats:
            for answer in answers:
                message = {"role": "assistant", "content": answer["content"]}
                lines.append(rest | {"messages": [*record.data["messages"], message]})
        else:
            lines.append({**record.data, "answers": answers})
    with locked(out):
        write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{out}: {len(lines):,} lines", file=sys.stderr)


if __name__ == "__main__":
    cli(main, Sample)
