"""A flag that chooses what is learned of chats is refused where that is fixed, and acts elsewhere."""

import json

import pytest
from judged import recipe

from ta import ChatConfig, DataConfig, ModelConfig
from ta.builtin import models

U, A = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
RECORDS = {
    "chat": {"messages": [U, A, U, A]},
    "pair": {"context": [U], "answer_w": A, "answer_l": {**A, "content": "3"}},
    "labelled": {"context": [U], "answer": A, "is_desirable": True},
    "class": {"messages": [U, A], "label": 1},
    "question": {"messages": [U, A], "gold": "p"},
}
IDLE = [("--loss-on", "all"), ("--loss-on", "last"), ("--split-turns",)]
CUT = ("--cut-answer", "--max-tokens", 50)


@pytest.fixture
def files(tmp_path):
    models.write_tiny(tmp_path / "model")
    for kind, record in RECORDS.items():
        (tmp_path / f"{kind}.jsonl").write_text((json.dumps(record) + "\n") * 4)
    return tmp_path


def refused(door, flag, page, *flags):
    """The line that answers the flag, which the recipe has no use for."""
    code, text = door(page, *flags, *flag)
    lines = [line for line in text.splitlines() if line]
    assert code == 2 and len(lines) <= 2, text
    words = " ".join(map(str, flag[:2] if flag[0] == "--loss-on" else flag[:1]))
    assert f"{words} has no effect, as " in text and "leave it out" in text, text


@pytest.mark.parametrize("flag", IDLE)
@pytest.mark.parametrize(
    ("page", "kind"),
    [("dpo", "pair"), ("rm", "pair"), ("kto", "labelled"), ("classify", "class")],
)
def test_training_on_records_of_which_what_is_learned_is_fixed(door, files, page, kind, flag):
    asked = ("--model-path", files / "model", "--data", files / f"{kind}.jsonl")
    refused(door, flag, page, *asked, "--out", files / "run")
    assert not (files / "run").exists()


@pytest.mark.parametrize("kind", ["pair", "labelled", "class", "question"])
def test_a_look_at_such_records(door, files, kind):
    asked = ("--model-path", files / "model", "--kind", kind, "--data", files / f"{kind}.jsonl")
    for flag in [*IDLE, CUT] if kind == "class" else IDLE:
        refused(door, flag, "inspect_data", *asked)


@pytest.mark.parametrize("flag", [*IDLE, CUT])
def test_where_answers_are_generated_or_scored(door, files, flag):
    model, data = ("--model-path", files / "model"), ("--data", files / "chat.jsonl")
    for page, more in (
        ("generate", (*data, "--out", files / "a.jsonl")),
        ("chat", ()),
        ("evaluate", (*data, "--out", files / "e.json")),
        ("evaluate", (*data, "--perplexity", "--index", "i", "--out", files / "e.json")),
        ("score", (*data, "--kind", "class", "--out", files / "s.jsonl")),
        ("grpo", (*data, "--out", files / "run")),
        ("distill", (*data, "--teacher-path", files / "model", "--out", files / "run")),
    ):
        refused(door, flag, page, *model, *more)
    assert not [path for path in files.iterdir() if path.name in ("a.jsonl", "e.json", "run")]


def test_they_act_on_chats(capsys, files):
    page = recipe("inspect_data")
    model = ModelConfig(str(files / "model"))
    data = DataConfig((str(files / "chat.jsonl"),))
    shown = []
    for given in ({}, {"loss_on": "all"}, {"loss_on": "last"}, {"split_turns": True}):
        page.main(page.Config(model=model, data=data, chat=ChatConfig(**given), json=True))
        shown.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    usual, everything, last, turn = (sum(map(bool, one["weights"])) for one, *_ in shown)
    assert everything > usual == 2 * last == 2 * turn and len(shown[3]) == 8
