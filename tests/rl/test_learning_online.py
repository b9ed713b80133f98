"""What recipes/grpo.py teaches: without a flag held-out exact match rises, with a reward that says nothing it does not.

In brackets what was seen on processors with AVX-512, with AVX2 and with neither.
"""

import json
import os

import pytest

pytestmark = pytest.mark.slow
SEED = ("--seed", os.environ.get("TA_TEST_SEED", "0"))


def accuracies(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [row["val_accuracy"] for row in rows if "val_accuracy" in row]


def test_without_a_flag_held_out_exact_match_rises_and_at_random_it_does_not(forked, tmp_path):
    """Of 256 held-out questions; by at least 20 points (49.2 -> 78.9 %)."""
    forked("grpo", "--out", tmp_path / "run", "--sample-show", 0, *SEED)
    first, *_, last = accuracies(tmp_path / "run")
    assert 0.35 < first < 0.65 and last >= first + 0.2
    curve = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    rewards = [row["reward"] for row in curve if "reward" in row]
    assert sum(rewards[-20:]) / 20 > sum(rewards[:20]) / 20 + 0.15
    page = (tmp_path / "run/report.html").read_text()
    assert "best rollout" in page and "worst rollout" in page

    (tmp_path / "coin.py").write_text(
        "import random\n\ndef toss(messages, answer, record):\n    return random.random() < 0.5\n"
    )
    rewards = ("--rewards", f"{tmp_path}/coin.py:toss", "--steps", 60)
    forked("grpo", "--out", tmp_path / "control", "--sample-show", 0, *rewards, *SEED)
    first, *_, last = accuracies(tmp_path / "control")
    assert last <= first + 0.03
