"""Recipes without a flag, as in test_learning.py, that start from no fine-tuned model: classes, retrieval, pictures."""

import json
import random

import pytest
from test_learning import SEED, logged

from ta.builtin import tasks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rare", [False, True])
def test_classes_are_learned_also_where_one_is_rare(forked, tmp_path, rare):
    more = ()
    if rare:
        for split, n in (("train", 4800), ("held_out", 256)):
            many = enumerate(tasks.classes(split, 2 * n))
            few = [record for i, record in many if record["label"] < 2 or not i % 10]
            tasks.write_jsonl(tmp_path / f"{split}.jsonl", few[:n])
        more = (
            "--data",
            tmp_path / "train.jsonl",
            "--val-data",
            tmp_path / "held_out.jsonl",
            "--class-weights",
            "auto",
        )
    forked("classify", "--out", tmp_path / "run", *more, "--eval-every", 0, *SEED)
    end = logged(tmp_path / "run")[-1]
    assert end["val_accuracy"] >= 0.93 and end["val_balanced_accuracy"] >= 0.9  # (98.4, 94.9)


def test_shuffled_labels_teach_no_class(forked, tmp_path):
    """Held-out classes stay at chance, a third (33 %)."""
    records = tasks.classes("train", 2400)
    labels = [record["label"] for record in records]
    random.Random(0).shuffle(labels)
    shuffled = [record | {"label": label} for record, label in zip(records, labels, strict=True)]
    tasks.write_jsonl(tmp_path / "train.jsonl", shuffled)
    tasks.write_jsonl(tmp_path / "held_out.jsonl", tasks.classes("held_out", 256))
    data = ("--data", tmp_path / "train.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    forked("classify", "--out", tmp_path / "run", *data, "--eval-every", 0, "--steps", 40, *SEED)
    assert logged(tmp_path / "run")[-1]["val_accuracy"] < 0.5


def test_retriever_and_generator_learn_together_and_a_generator_alone_finds_no_more(
    forked, tmp_path
):
    """No flag: recall@1 of held-out questions from chance (1 of 576) to 80 %, and the answers with it; with the encoder left as it is, it stays."""
    said = forked("rag", "--out", tmp_path / "run", "--eval-every", 0, *SEED)
    first, *_, last = (row for row in logged(tmp_path / "run") if "val_recall_at_1" in row)
    assert (
        first["val_recall_at_1"] < 0.03 and first["val_accuracy"] < 0.03 and "recall_at_1" in said
    )
    assert last["val_recall_at_1"] >= 0.8 and last["val_accuracy"] >= 0.75
    still = ("--encoder-lr", 0, "--steps", 10, "--eval-every", 0)
    forked("rag", "--out", tmp_path / "control", *still, *SEED)
    start, *_, end = (row for row in logged(tmp_path / "control") if "val_recall_at_1" in row)
    assert (
        end["val_recall_at_1"] == start["val_recall_at_1"] == first["val_recall_at_1"]
        and end["val_accuracy"] < 0.1
    )


def test_pictures_are_looked_at(forked, tmp_path):
    """Held-out questions about colour, shape and place: at least 90 % right, and at chance where every question gets another one's picture."""
    from ta.builtin.model_folders import pictures_folder

    def shares(answered):
        right: dict[str, list[bool]] = {}
        for kind, said, wanted in answered:
            right.setdefault(kind, []).append(said.strip() == wanted)
        return {kind: sum(found) / len(found) for kind, found in right.items()}

    run = tmp_path / "run"
    short = ("--sample-records", 400, "--sample-max-new-tokens", 6, "--eval-every", 0)
    said = forked("multimodal", "--out", run, *short, *SEED)
    assert "What colour is the shape?" in said
    samples = [json.loads(line) for line in open(run / "samples.jsonl")]
    last = shares(
        (s["id"].split("#")[1], s["answer"], s["reference"])
        for s in samples
        if s["step"] == samples[-1]["step"]
    )
    assert min(last[kind] for kind in ("colour", "shape", "place")) >= 0.9, last

    records = [json.loads(line) for line in open(pictures_folder() / "held_out.jsonl")]
    for kind in last:
        alike = [record for record in records if record["kind"] == kind]
        names = [record["messages"][0]["content"] for record in alike]
        for record, name in zip(alike, names[7:] + names[:7], strict=True):
            record["messages"][0]["content"] = name
    tasks.write_jsonl(tmp_path / "shuffled.jsonl", records)
    ask = (
        "--data",
        tmp_path / "shuffled.jsonl",
        "--image-root",
        pictures_folder() / "images",
        "--max-new-tokens",
        6,
    )
    forked("generate", "--model-path", run / "final", *ask, "--out", tmp_path / "answers.jsonl")
    answers = [json.loads(line) for line in open(tmp_path / "answers.jsonl")]
    chance = shares(
        (row["kind"], row["answers"][0]["content"], row["reference"]) for row in answers
    )
    assert chance["colour"] < 0.4 and chance["shape"] < 0.5 and chance["place"] < 0.5, chance
