"""Killed, doubled and without room: every command that writes ends with the bytes of an undisturbed
run, and what it publishes is on the disk before it has its name.
"""

import sys

import pytest
import torch
import warm
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import storms

NAMES = ("generate", "score", "preprocess_images", "build_index", "merge", "evaluate", "sft")
TRIALS = (1, 2, 1, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("storms")
    warm.preload()
    storms.write_inputs(folder / "given")
    assert tuple(storms.commands(folder / "given")) == NAMES
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_storm_of_kills_leaves_no_trace(place, name):
    good, failures = storms.storm(storms.commands(place / "given")[name], place, TRIALS)
    assert tuple(good) == TRIALS and not failures


def test_a_log_tells_what_is_not_durable(tmp_path):
    """By hand: a file that is named unsynced, a name that is not synced, a file written in place."""
    from ta.files import sync, write_atomic

    def careless():
        (tmp_path / "out").mkdir()
        for name in ("unsynced", "changed", "named"):
            (tmp_path / name).write_text("text")
            if name != "unsynced":
                sync(tmp_path / name)
            if name == "changed":
                (tmp_path / name).write_text("later text")
            storms.os.rename(tmp_path / name, tmp_path / "out" / name)
            if name != "named":
                sync(tmp_path / "out")
        (tmp_path / "out" / "in_place").write_text("text")
        write_atomic(tmp_path / "other" / "good", "text")

    assert storms.start(careless, storms.watched(tmp_path / "log")).end() == (0, "")
    wrong = storms.not_durable(tmp_path / "log", tmp_path / "out")
    assert [text.removeprefix(f"{tmp_path}/out/") for text in wrong] == [
        "unsynced has its name before it is on the disk",
        "changed has its name before it is on the disk",
        f"the name {tmp_path}/out/named is not on the disk",
        "in_place is written in place",
    ]
    assert not storms.not_durable(tmp_path / "log", tmp_path / "other")[3:]


@pytest.mark.slow
def test_what_other_commands_publish_is_on_the_disk_before_it_has_its_name(place, monkeypatch):
    """One process runs them all; those of the storms are looked at there."""
    import judged
    from test_encoders import save_clip

    from ta import __main__ as ta_command
    from ta.builtin import fine_tuned, tasks
    from ta.builtin.pictures import write_pictures

    given, out = place / "given", place / "out"
    write_pictures(place / "pictures", 4, 2)
    save_clip(place / "clip", whole=True)
    names = {p["id"] for p in tasks.passages()[:60]}
    asked = [q for q in tasks.questions("train", 1000) if q["gold"][0] in names][:8]
    tasks.write_jsonl(place / "asked.jsonl", asked)
    tasks.write_jsonl(place / "pairs.jsonl", tasks.concise("train", 8))
    tasks.write_jsonl(place / "practice.jsonl", tasks.practice("train", 8))
    (place / "mine.py").write_text("def spread(prompt, answer, record):\n    return len(answer)\n")
    (place / "pickled").mkdir()
    torch.save({"a": torch.ones(2)}, place / "pickled" / "pytorch_model.bin")
    torch.save({"0.weight": torch.ones(2, 2)}, place / "projector.pt")

    def recipe(name, *flags):
        with pytest.raises(SystemExit) as end:
            storms.command(name, *flags)()
        assert not end.value.code, (name, flags)

    def work():
        model = ("--model-path", given / "model")
        quick = ("--steps", 2, "--batch-size", 4, "--sample-records", 1, "--save-every", 1)
        chats = ("--data", given / "chats.jsonl", "--val-data", given / "chats.jsonl")
        pictures = ("--data", place / "pictures" / "train.jsonl")
        pictures += ("--image-root", place / "pictures" / "images")
        clip = ("--image-encoder", "clip", "--image-encoder-path", place / "clip")
        scored = ("--model-path", given / "rm", "--data", given / "candidates.jsonl")
        index = ("--passages", given / "passages.jsonl", "--encoder-path", given / "encoder")
        for name in ("a", "b"):
            recipe("sft", *model, *chats, *quick, "--adapter", "lora", "--out", out / name)
        recipe("compare", "--runs", out / "a", out / "b", "--out", out / "compare.html")
        recipe("score", *scored, "--out", out / "s.jsonl")
        recipe("sample", "--data", out / "s.jsonl", "--out", out / "chosen.jsonl")
        recipe("multimodal", *model, *pictures, *clip, *quick, "--out", out / "see")
        recipe("to_llava", "--model-path", out / "see" / "final", "--out", out / "llava")
        recipe("build_index", *index, "--out", out / "index")
        asked = ("--data", place / "asked.jsonl", "--index", out / "index", "--num-passages", 2)
        recipe("rag", *model, *asked, *quick, "--out", out / "rag")
        pairs = ("--data", place / "pairs.jsonl", "--reference", "cached")
        recipe("dpo", *model, *pairs, *quick, "--out", out / "dpo")
        rewards = ("--rewards", f"{place}/mine.py:spread", "--data", place / "practice.jsonl")
        drawn = ("--num-answers", 4, "--max-new-tokens", 6)
        recipe("grpo", *model, *rewards, *quick, *drawn, "--out", out / "grpo")
        ta_command.copy("sft", str(out / "mine.py"))
        ta_command.converted(str(place / "pickled"), str(out / "converted"))
        ta_command.converted(str(place / "projector.pt"), str(out / "projectors"))
        chat = judged.recipe("chat")
        chat.obey(f"/save {out / 'saved.jsonl'}", [{"role": "user", "content": "hi"}])

        def run(name, *flags):
            (flags[-1] / "final").mkdir(parents=True)
            (flags[-1] / "final" / "config.json").write_text("{}")

        monkeypatch.setattr(fine_tuned, "_run", run)
        monkeypatch.setenv("TA_CACHE", str(out / "cache"))
        fine_tuned.fine_tune("builtin-begun")
        assert (fine_tuned.tuned_folder("builtin-begun") / "config.json").exists()

    code, said = storms.start(work, storms.watched(place / "log")).end()
    assert code == 0, said
    assert not storms.not_durable(place / "log", out)
