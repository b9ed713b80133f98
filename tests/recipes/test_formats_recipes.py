"""Files of other formats through the recipes: each trains as its canonical twin does."""

import csv
import json

import pytest

from ta.builtin.model_folders import pictures_folder, tiny_folder
from ta.files import dataset_snapshot
from tests.data.test_formats import TWINS

RECIPES = {
    "chat": "sft",
    "pair": "dpo",
    "labelled": "kto",
    "class": "classify",
    "media": "multimodal",
}
TRAINED = [twin for twin in TWINS if twin[1] in RECIPES]


def losses(door, tmp_path, kind, name, rows, *more):
    """The losses of two steps on a file of the rows, and what the run printed."""
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        "--data",
        path,
        "--steps",
        "2",
        "--log-every",
        "1",
        "--batch-size",
        "2",
        "--sample-records",
        "0",
        *more,
    )
    code, text = door(RECIPES[kind], *flags, "--out", tmp_path / name)
    assert code == 0, text
    records = map(json.loads, open(tmp_path / name / "metrics.jsonl"))
    return [record["loss"] for record in records if "loss" in record], text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind, given, twin", TRAINED, ids=[f"{i}-{t[0]}" for i, t in enumerate(TRAINED)]
)
def test_a_file_of_a_format_trains_as_its_twin(
    door, few_records, tmp_path, name, kind, given, twin
):
    more = ("--model-path", tiny_folder()) if kind in ("pair", "labelled") else ()
    if kind == "media":
        folder = pictures_folder()
        first = json.loads(open(folder / "train.jsonl").readline())["messages"]
        picture = next(m["content"] for m in first if m.get("type") == "image")
        given, twin = (json.loads(json.dumps(x).replace("cat.png", picture)) for x in (given, twin))
        more = ("--image-root", folder / "images", "--image-encoder", "builtin")
    ours, text = losses(door, tmp_path, kind, "given", [given, given], *more)
    twins, _ = losses(door, tmp_path, kind, "twin", [twin, twin], *more)
    assert ours == twins and len(ours) == 2 and f"given.jsonl: {name}, 2" in text


def test_a_csv_file_and_two_held_out_sources(door, tmp_path):
    """Chats from CSV beside a JSON list; the figures of each, in the order given."""
    rows = [("cup red cup?", "cup red"), ("hat blue hat?", "hat blue")]
    with open(tmp_path / "train.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    chats = [{"instruction": q, "output": a} for q, a in rows]
    (tmp_path / "held.json").write_text(json.dumps(chats))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "cup red"}))
    held_out = ("--val-data", tmp_path / "held.json", tmp_path / "text.jsonl")
    code, text = door(
        "sft",
        "--data",
        tmp_path / "train.csv",
        *held_out,
        "--steps",
        "1",
        "--out",
        tmp_path / "run",
    )
    assert code == 0 and "prompt and completion, 2 completions" in text, text
    last = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")][-1]
    assert {"val_loss", "val_loss/held", "val_loss/text"} <= last.keys()
    low, high = sorted((last["val_loss/held"], last["val_loss/text"]))
    assert low < last["val_loss"] < high
    code, text = door(
        "generate",
        "--data",
        tmp_path / "held.json",
        tmp_path / "train.csv",
        "--max-new-tokens",
        "1",
        "--out",
        tmp_path / "a.jsonl",
    )
    assert code == 0 and "read as Alpaca: 2 instructions" in text, text
    answers = [json.loads(line) for line in open(tmp_path / "a.jsonl")]
    assert [row["file"] for row in answers] == ["held", "held", "train", "train"]
    assert [row["reference"] for row in answers] == ["cup red", "hat blue"] * 2


def test_hub_names_need_the_flag_or_the_cache(door, tmp_path, monkeypatch):
    from huggingface_hub import constants

    dataset_snapshot.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for more, message in (
        ((), "only a recipe with --hub fetches it"),
        (("--hub",), "the hub does not give it"),
    ):
        code, text = door("sft", "--data", "hf:me/none@5", *more, "--out", tmp_path / "run")
        assert code == 2 and f"hf:me/none: not in the hub's cache, and {message}" in text, text
    snapshot = tmp_path / "hub" / "datasets--me--chats" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("d" * 40)
    (snapshot / "train.jsonl").write_text(json.dumps({"instruction": "q", "output": "a"}) + "\n")
    for more in ((), ("--hub",)):
        out = tmp_path / f"run{len(more)}"
        code, text = door(
            "sft",
            "--data",
            "hf:me/chats",
            *more,
            "--steps",
            "1",
            "--sample-records",
            "0",
            "--out",
            out,
        )
        assert code == 0 and "1 of 1 from hf:me/chats: Alpaca, 1 instructions" in text, text
