"""Recipes without a flag, or nearly: held-out figures of tasks with a right answer rise from chance to what the README promises.

The figures seen, in brackets, are the least and the greatest of three seeds on each of three kinds of processor
(ATEN_CPU_CAPABILITY=default, avx2 and unset on one with AVX-512). TA_TEST_SEED=1 runs the tests with another seed.
"""

import json
import os
import random
import shutil

import pytest

from ta.builtin import data_files, models

pytestmark = pytest.mark.slow
SEED = ("--seed", os.environ.get("TA_TEST_SEED", "0"))


def logged(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """recipes/sft.py as a newcomer runs it; what it exports is the model that preference recipes start from."""
    import subprocess
    import sys

    from conftest import ROOT

    out = tmp_path_factory.mktemp("sft") / "run"
    subprocess.run(
        [sys.executable, str(ROOT / "recipes/sft.py"), "--out", str(out), *SEED],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    data_files.tiny_folder()
    # as warm_start would leave it: the same steps from the same seed
    shutil.copytree(out / "final", data_files.tuned_folder())
    return out


def test_sft_learns_to_answer(taught):
    """Exact match on held-out chats from under 5 % (0) to at least 90 % (98.4 to 98.4)."""
    figures = [row["val_accuracy"] for row in logged(taught) if "val_accuracy" in row]
    assert figures[0] < 0.05 and figures[-1] >= 0.9


def test_rewards_rank_answers(taught, forked, tmp_path):
    """Held-out right answers are ranked above wrong ones."""
    said = forked("rm", "--out", tmp_path / "run", *SEED)
    last = logged(tmp_path / "run")[-1]
    assert last["val_ranking_accuracy"] >= 0.95 and "ranking_accuracy" in said


def wordy(folder, step):
    """Share of the samples of a step that say more than was asked."""
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    answers = [sample["answer"] for sample in samples if sample["step"] == step]
    return sum("of course" in answer for answer in answers) / len(answers)


@pytest.mark.parametrize(
    ("recipe", "make", "n", "figure"),
    [
        ("dpo", models.concise, 256, "reward_accuracy"),
        ("kto", models.labelled, 512, "preference"),
    ],
)
def test_few_words_are_preferred_and_the_task_stays(
    taught, forked, tmp_path, recipe, make, n, figure
):
    """Samples in more words than needed become rare; as many as before are right.

    About 256 samples: wordy ones SEEN_WORDY
    """
    models.write_jsonl(tmp_path / "held_out.jsonl", make("held_out", n))
    more = ("--val-data", tmp_path / "held_out.jsonl", "--cherry-records", n)
    said = forked(recipe, "--out", tmp_path / "run", *more, *SEED)
    first, *_, last = logged(tmp_path / "run")
    assert wordy(tmp_path / "run", 0) > 0.75 and wordy(tmp_path / "run", last["step"]) < 0.05
    assert first["val_accuracy"] < 0.25 and last["val_accuracy"] > 0.93
    assert last["val_contains"] >= first["val_contains"] - 0.01 > 0.93
    assert first[f"val_{figure}"] == 0.5 and last[f"val_{figure}"] > 0.87
    assert all(name in said for name in (figure, "accuracy", "contains"))


def test_nothing_is_preferred_where_a_coin_chose(taught, forked, tmp_path):
    """The same pairs, each turned round by the toss of a coin: samples stay as wordy as they were."""
    records = models.concise("train", 2400)
    coin = random.Random(0)
    for record in records:
        if coin.random() < 0.5:
            record["answer_w"], record["answer_l"] = record["answer_l"], record["answer_w"]
    models.write_jsonl(tmp_path / "turned.jsonl", records)
    models.write_jsonl(tmp_path / "held_out.jsonl", models.concise("held_out", 256))
    data = ("--data", tmp_path / "turned.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    forked("dpo", "--out", tmp_path / "run", *data, *SEED)
    last = logged(tmp_path / "run")[-1]
    assert wordy(tmp_path / "run", 0) > 0.75 and wordy(tmp_path / "run", last["step"]) > 0.6
