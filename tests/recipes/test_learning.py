"""Recipes without a flag, or nearly: held-out figures of tasks with a right answer rise from chance to what the README promises.

Beside a bound stands, in brackets, what was seen of it on processors with AVX-512, with AVX2 and with
neither (ATEN_CPU_CAPABILITY unset, avx2 and default). TA_TEST_SEED=1 runs the tests with another seed.
"""

import json
import os
import shutil

import pytest

from ta.builtin import model_folders, tasks
from ta.training.report import meaning

pytestmark = pytest.mark.slow
SEED = ("--seed", os.environ.get("TA_TEST_SEED", "0"))


def logged(folder):
    """The lines of metrics.jsonl; each figure has a sentence in the report."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    sizes = {"step", "tokens", "learned_tokens", "seconds", "update_seconds"}
    names = {name.removeprefix("val_") for row in rows for name in row} - sizes
    assert [name for name in names if not meaning(name)] == []
    return rows


def at_the_end(folder):
    """The samples of the last evaluation."""
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    return [sample for sample in samples if sample["step"] == samples[-1]["step"]]


def beside_others(samples, said, wanted):
    """The share of samples that equal the right answer of another question."""
    pairs = zip(samples, samples[7:] + samples[:7], strict=True)
    return sum(own[said] == other[wanted] for own, other in pairs) / len(samples)


@pytest.fixture(scope="module")
def taught(forked, tmp_path_factory):
    """recipes/sft.py as a newcomer runs it; what it exports is the model that preference recipes start from."""
    out = tmp_path_factory.mktemp("sft") / "run"
    forked("sft", "--out", out, *SEED)
    model_folders.tiny_folder()
    # as warm_start would leave it: the same steps from the same seed
    shutil.copytree(out / "final", model_folders.tuned_folder())
    return out


def test_sft_learns_to_answer(taught):
    """Exact match on held-out chats from under 5 % (0) to at least 90 % (96.9 to 98.4).

    The control: beside the right answer of another question under 10 % (1.6).
    """
    figures = [row["val_accuracy"] for row in logged(taught) if "val_accuracy" in row]
    assert figures[0] < 0.05 and figures[-1] >= 0.9
    assert beside_others(at_the_end(taught), "answer", "reference") < 0.1


def test_rewards_rank_answers(taught, forked, tmp_path):
    """Held-out right answers are ranked above wrong ones (98 to 99.6 %, seeds 0 to 2).

    The control: behind another question neither is preferred (52.3 %).
    """
    said = forked("rm", "--out", tmp_path / "run", "--eval-every", 0, *SEED)
    last = logged(tmp_path / "run")[-1]
    assert last["val_ranking_accuracy"] >= 0.9 and "ranking_accuracy 0." in said
    pairs = tasks.preferences("held_out", 256)
    tasks.write_jsonl(
        tmp_path / "others.jsonl",
        [
            {"messages": other["context"], "answers": [pair["answer_w"], pair["answer_l"]]}
            for pair, other in zip(pairs, pairs[7:] + pairs[:7], strict=True)
        ],
    )
    files = ("--data", tmp_path / "others.jsonl", "--out", tmp_path / "scored.jsonl")
    forked("score", "--model-path", tmp_path / "run", *files)
    rewards = [json.loads(line)["rewards"] for line in open(tmp_path / "scored.jsonl")]
    assert 0.35 < sum(x["0"] > x["1"] for x in rewards) / 256 < 0.65


def wordy(folder, step):
    """Share of the samples of a step that say more than was asked."""
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    answers = [sample["answer"] for sample in samples if sample["step"] == step]
    return sum("of course" in answer for answer in answers) / len(answers)


@pytest.mark.parametrize(
    ("recipe", "make", "n", "figure"),
    [
        ("dpo", tasks.concise, 256, "reward_accuracy"),
        ("kto", tasks.labelled, 512, "preference"),
    ],
)
def test_few_words_are_preferred_and_the_task_stays(
    taught, forked, tmp_path, recipe, make, n, figure
):
    """Samples in more words than needed become rare, and as many as before are right.

    About 256 samples, seeds 0 to 2. In more words: 92 to 98 % -> 0; right in few words: 2 to 7 % ->
    89 to 99 %; right in any number of words: 92.6 to 100 % before, and -0.9 to +4.7 points. Held-out
    rewards: dpo 93.8 to 97.3 %, kto 91.6 to 94.4 %.
    """
    tasks.write_jsonl(tmp_path / "held_out.jsonl", make("held_out", n))
    more = ("--val-data", tmp_path / "held_out.jsonl", "--sample-records", n, "--eval-every", 0)
    said = forked(recipe, "--out", tmp_path / "run", *more, *SEED)
    first, *_, last = logged(tmp_path / "run")
    assert wordy(tmp_path / "run", 0) > 0.75 and wordy(tmp_path / "run", last["step"]) < 0.05
    assert first["val_accuracy"] < 0.25 and last["val_accuracy"] > 0.8
    assert last["val_contains"] >= first["val_contains"] - 0.02 > 0.85
    assert first[f"val_{figure}"] == 0.5 and last[f"val_{figure}"] > 0.87
    assert all(name in said for name in (figure, "accuracy", "contains"))


def test_nothing_is_preferred_where_half_of_the_pairs_are_turned_round(taught, forked, tmp_path):
    """Every second pair of either sort the wrong way round: answers in few words stay rare.

    Of 64 samples: 0 to 6 % -> 5 to 13 %, beside 97 to 100 % where all pairs are the right way round.
    """
    records = tasks.concise("train", 2400)
    more_words = [r for r in records if "of course" in r["answer_l"]["content"]]
    wrong = [r for r in records if "of course" not in r["answer_l"]["content"]]
    for record in (*more_words[::2], *wrong[::2]):
        record["answer_w"], record["answer_l"] = record["answer_l"], record["answer_w"]
    tasks.write_jsonl(tmp_path / "turned.jsonl", records)
    tasks.write_jsonl(tmp_path / "held_out.jsonl", tasks.concise("held_out", 256))
    data = ("--data", tmp_path / "turned.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    forked("dpo", "--out", tmp_path / "run", *data, "--eval-every", 0, *SEED)
    first, *_, last = logged(tmp_path / "run")
    assert first["val_accuracy"] < 0.25 and last["val_accuracy"] < 0.45


def test_labels_turned_round_teach_the_opposite(taught, forked, tmp_path):
    """KTO with every label turned round: answers in few words stay away (4 % -> 0), and right ones
    are rewarded below the others (12 % of pairs the right way round).
    """
    records = tasks.labelled("train", 2400)
    for record in records:
        record["is_desirable"] = not record["is_desirable"]
    tasks.write_jsonl(tmp_path / "turned.jsonl", records)
    tasks.write_jsonl(tmp_path / "held_out.jsonl", tasks.labelled("held_out", 128))
    data = ("--data", tmp_path / "turned.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    forked("kto", "--out", tmp_path / "run", *data, "--eval-every", 0, "--steps", 12, *SEED)
    last = logged(tmp_path / "run")[-1]
    assert last["val_accuracy"] < 0.1 and last["val_preference"] < 0.3
