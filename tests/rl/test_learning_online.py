"""What recipes/grpo.py teaches: held-out answers do what is rewarded, and with a reward that says nothing they do not.

In brackets what was seen with seeds 0, 1 and 2 on processors with AVX-512, with AVX2 and with neither.
"""

import json
import os

import pytest

from ta.builtin.model_folders import tiny_folder
from ta.builtin.tasks import practice, write_jsonl
from ta.training.report import meaning

pytestmark = pytest.mark.slow
SEED = ("--seed", os.environ.get("TA_TEST_SEED", "0"))
REWARDS = """
import random

def letters(messages, answer, record):
    return answer.count("x") / max(1, len(answer))

def coin(messages, answer, record):
    return random.random() < 0.5
"""


def test_right_answers_become_more_where_they_are_rewarded_and_fewer_by_a_coin(forked, tmp_path):
    """The run without flags, shorter and with a coin's reward shorter still: exact match of 256 held-out answers.

    0.49 to 0.56 at first, [+0.047 to +0.109] in 60 steps, by a coin [-0.12 to -0.25] in 16.
    """
    (tmp_path / "mine.py").write_text(REWARDS)
    flags = ("--batch-size", 24, "--max-new-tokens", 12, "--eval-every", 0, *SEED)
    coin = ("--steps", 16, "--rewards", f"{tmp_path}/mine.py:coin")
    shares = {}
    for name, more in (("exact", ("--steps", 60)), ("coin", coin)):
        forked("grpo", *flags, *more, "--sample-show", 0, "--out", tmp_path / name)
        steps = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
        shares[name] = [row["val_accuracy"] for row in steps if "val_accuracy" in row]
    before, after = shares["exact"]
    assert after > before + 0.02
    assert shares["coin"][0] == before > shares["coin"][1]


def test_held_out_answers_do_what_is_rewarded_and_not_what_is_not(forked, tmp_path):
    """The share of one letter, from a random model: 0.004 -> [0.25 to 1.0], by a coin [0.0]."""
    write_jsonl(tmp_path / "train.jsonl", practice("train", 192))
    write_jsonl(tmp_path / "held_out.jsonl", practice("held_out", 32))
    (tmp_path / "mine.py").write_text(REWARDS)
    flags = ("--model-path", tiny_folder(), "--lr", 5e-3, "--steps", 24, "--batch-size", 8, *SEED)
    flags += ("--data", tmp_path / "train.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    flags += ("--max-new-tokens", 8, "--eval-every", 0, "--sample-show", 0)
    shares = {}
    for name in ("letters", "coin"):
        out = ("--rewards", f"{tmp_path}/mine.py:{name}", "--out", tmp_path / name)
        forked("grpo", *flags, *out)
        rows = [json.loads(line) for line in open(tmp_path / name / "samples.jsonl")]
        for step in (0, 24):
            answers = [row["answer"] for row in rows if row["step"] == step and "row" in row]
            found = [answer.count("x") / max(1, len(answer)) for answer in answers]
            shares[name, step] = sum(found) / len(found)
    assert shares["letters", 0] == shares["coin", 0] < 0.02
    assert shares["letters", 24] > 0.15 and shares["coin", 24] < 0.08
    steps = [json.loads(line) for line in open(tmp_path / "letters/metrics.jsonl")]
    held_out = [row["val_reward"] for row in steps if "val_reward" in row]
    assert held_out == pytest.approx([shares["letters", 0], shares["letters", 24]])
    sizes = {"step", "tokens", "learned_tokens", "seconds", "update_seconds"}
    names = {name.removeprefix("val_") for row in steps for name in row} - sizes
    assert [name for name in names if not meaning(name)] == []
    page = (tmp_path / "letters/report.html").read_text()
    assert "best rollout" in page and "worst rollout" in page
