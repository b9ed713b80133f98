"""What inspect_data prints is what training reads, record by record."""

import json
import re

import pytest

from ta.builtin import chats, tiny_tokenizer


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_is_a_line_a_record(run, tmp_path, model):
    tokenizer, records = tiny_tokenizer(), chats("held_out", 5)
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y", "loss": 0.5}]}
    data = write(tmp_path / "a.jsonl", *records[:3], long, *records[3:])
    flags = ("--model-path", model, "--data", data, "--max-tokens", 200, "--json")
    lines = [json.loads(line) for line in run("inspect_data", *flags).stdout.splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5, 6] and list(lines[3]) == ["line", "dropped"]
    for line, record in zip(lines[:3] + lines[4:], records, strict=True):
        assert list(line) == ["line", "ids", "labels", "weights"]
        assert line["ids"] == tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
        assert line["labels"] == [token if weight else -100 for token, weight in zip(line["ids"], line["weights"], strict=True)]
        learned = tokenizer.decode([label for label in line["labels"] if label != -100])
        assert learned == "".join(m["content"] + "<|im_end|>\n" for m in record["messages"] if m["role"] == "assistant")
    both = run("inspect_data", "--model-path", model, "--data", data, write(tmp_path / "b.jsonl", records[0]), "--json").stdout.splitlines()
    assert [(json.loads(line)["file"][-7:], json.loads(line)["line"]) for line in both] == [("a.jsonl", i) for i in range(1, 7)] + [
        ("b.jsonl", 1)
    ]


def test_pairs_and_classes(run, tmp_path, model):
    question, right = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    pair = write(tmp_path / "p.jsonl", {"context": [question], "answer_w": right, "answer_l": {**right, "content": "b"}})
    (line,) = map(json.loads, run("inspect_data", "--model-path", model, "--kind", "pair", "--data", pair, "--json").stdout.splitlines())
    assert len(line["sequences"]) == 2 and line["margin"] is None
    labelled = write(tmp_path / "c.jsonl", {"messages": [question], "label": 2})
    (line,) = map(
        json.loads, run("inspect_data", "--model-path", model, "--kind", "class", "--data", labelled, "--json").stdout.splitlines()
    )
    assert line["label"] == 2 and set(line["labels"]) == {-100}


def test_a_page_for_a_person(run, tmp_path, model):
    data = write(tmp_path / "a.jsonl", *chats("train", 40), {"messages": [{"role": "user", "content": "?"}]})
    page = run(
        "inspect_data", "--model-path", model, "--data", data, "--on-bad-record", "skip", "--max-bad-share", 0.1, "--examples", 2
    ).stdout
    assert page.startswith("40 records, ") and "40 of 41 from" in page and f"dropped 1: no answer ({data}:41)" in page
    assert sum(int(count) for count in re.findall(r"\|#* (\d+)", page)) == 40, "the histogram counts every record"
    assert page.count("\x1b[32m") >= 2 and f"{data}:2 " in page and f"{data}:3 " not in page
    wrong = run("inspect_data", "--model-path", model, "--data", data, code=2)
    assert (
        re.match(rf"error: {data}:41: no message of role assistant", wrong.stderr) and "Traceback" not in wrong.stderr and not wrong.stdout
    )
