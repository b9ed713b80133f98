"""What recipes/grpo.py teaches: held-out exact match rises, with a reward that says nothing it does not.

In brackets what was seen with seeds 0, 1 and 2 on processors with AVX-512, with AVX2 and with neither.
"""

import json
import os

import pytest

from ta.builtin.models import practice, write_jsonl

pytestmark = pytest.mark.slow
SEED = ("--seed", os.environ.get("TA_TEST_SEED", "0"))


def test_held_out_exact_match_rises_and_at_random_it_does_not(forked, tmp_path):
    """Of 117 held-out questions for one of several things."""
    for name, split, n in (("data", "train", 2000), ("val", "held_out", 256)):
        chats = [record for record in practice(split, n) if record["id"].startswith("lookup")]
        write_jsonl(tmp_path / f"{name}.jsonl", chats)
    (tmp_path / "coin.py").write_text(
        "import random\n\ndef toss(messages, answer, record):\n    return random.random() < 0.5\n"
    )
    flags = ("--batch-size", 16, "--max-new-tokens", 16, *SEED)
    flags += ("--data", tmp_path / "data.jsonl", "--val-data", tmp_path / "val.jsonl")
    flags += ("--eval-every", 0, "--sample-show", 0, "--lr", 3e-4)
    runs = {"right": ("--steps", 60), "coin": ("--steps", 20)}
    runs["coin"] += ("--rewards", f"{tmp_path}/coin.py:toss")
    found = {}
    for name, more in runs.items():
        forked("grpo", *flags, *more, "--out", tmp_path / name)
        found[name] = [json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")]
    (first, last), (before, after) = (
        [row["val_accuracy"] for row in rows if "val_accuracy" in row] for rows in found.values()
    )
    print("SEEN", first, last, before, after, os.environ.get("ATEN_CPU_CAPABILITY"), SEED)
    assert 0.6 < first == before < 0.85 and last >= first + 0.1
    assert after <= before + 0.04
    rewards = [row["reward"] for row in found["right"] if "reward" in row]
    assert sum(rewards[-15:]) / 15 > sum(rewards[:15]) / 15 + 0.05
    page = (tmp_path / "right/report.html").read_text()
    assert "best rollout" in page and "worst rollout" in page
