"""What inspect_data prints is what training reads, record by record."""

import json
import re

import pytest

from recipes.inspect_data import Config, histogram, main
from ta.builtin.models import tiny_tokenizer
from ta.builtin.pictures import write_pictures
from ta.builtin.tasks import chats
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.prepare import DataConfig
from ta.folders import ModelConfig
from ta.media import MediaConfig, MediaFiles, open_media


@pytest.fixture
def model(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def json_of(capsys, model, *data, max_tokens=None, kind="chat"):
    sources = tuple(str(path) for path in data)
    main(
        Config(
            model=ModelConfig(str(model)),
            chat=ChatConfig(max_tokens=max_tokens),
            data=DataConfig(sources),
            kind=kind,
            json=True,
        )
    )
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_page_shows_what_is_learned_of_reasoning_and_calls(
    capsys, tmp_path, model, monkeypatch
):
    monkeypatch.setattr("ta.screen.has_colours", lambda stream: True)
    from test_turns import CHAT, HERMES, OWN, WEATHER

    made = tiny_tokenizer()
    made.add_tokens(OWN)
    made.chat_template = HERMES
    made.save_pretrained(model)
    thought = {"role": "assistant", "content": "b", "reasoning_content": "c"}
    reasoned = {"messages": [{"role": "user", "content": "a"}, thought]}
    chats = [{"messages": CHAT, "tools": [WEATHER]}, reasoned]
    data = DataConfig((str(write(tmp_path / "a.jsonl", *chats)),))
    main(Config(model=ModelConfig(str(model)), data=data))
    page = capsys.readouterr().out
    green = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", page, re.DOTALL)
    assert [text for text in green if text != "learned"] == [
        '<think>\nlook it up\n</think>\n<call>weather {"city": "Rome"}</call><|im_end|>\n',
        "Sunny.<|im_end|>\n",
        "<think>\nc\n</think>\nb<|im_end|>\n",
    ]
    assert '"description": "now"' in page and "<result>sun" in page
    main(Config(model=ModelConfig(str(model)), data=data, chat=ChatConfig(split_turns=True)))
    assert "3 records" in capsys.readouterr().out


def test_json_is_a_line_a_record(capsys, tmp_path, model):
    tokenizer, records = tiny_tokenizer(), chats("held_out", 5)
    long = {
        "messages": [
            {"role": "user", "content": "x" * 300},
            {"role": "assistant", "content": "y", "loss": 0.5},
        ]
    }
    data = write(tmp_path / "a.jsonl", *records[:3], long, *records[3:])
    lines = json_of(capsys, model, data, max_tokens=200)
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5, 6] and list(lines[3]) == [
        "line",
        "dropped",
    ]
    for line, record in zip(lines[:3] + lines[4:], records, strict=True):
        assert list(line) == ["line", "ids", "labels", "weights"]
        assert line["ids"] == tokenizer.apply_chat_template(
            record["messages"], tokenize=True, return_dict=False
        )
        assert line["labels"] == [
            token if weight else -100
            for token, weight in zip(line["ids"], line["weights"], strict=True)
        ]
        learned = tokenizer.decode([label for label in line["labels"] if label != -100])
        assert learned == "".join(
            m["content"] + "<|im_end|>\n" for m in record["messages"] if m["role"] == "assistant"
        )
    both = json_of(capsys, model, write(tmp_path / "b.jsonl", records[0]), data)
    assert [(line["file"][-7:], line["line"]) for line in both] == [
        ("b.jsonl", 1),
        *(("a.jsonl", i) for i in range(1, 7)),
    ]


def test_pairs_and_classes(capsys, tmp_path, model):
    question, right = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    pair = write(
        tmp_path / "p.jsonl",
        {"context": [question], "answer_w": right, "answer_l": {**right, "content": "b"}},
    )
    (line,) = json_of(capsys, model, pair, kind="pair")
    assert len(line["sequences"]) == 2 and line["margin"] is None
    (line,) = json_of(
        capsys,
        model,
        write(tmp_path / "c.jsonl", {"messages": [question], "label": 2}),
        kind="class",
    )
    assert line["label"] == 2 and set(line["labels"]) == {-100}


def test_pictures_stand_as_placeholders_that_are_not_learned(capsys, tmp_path):
    train, _ = write_pictures(tmp_path, 3, 1)
    files = MediaFiles(image_root=str(tmp_path / "images"))
    media = MediaConfig(files=files, image_encoder="builtin")
    main(Config(media=media, data=DataConfig((str(train),)), kind="media", json=True))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    records = [json.loads(line) for line in train.read_text().splitlines()]
    known = open_media(media, (str(train),), "cpu").placeholders
    tokenizer = load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig(), known)
    placeholder = tokenizer.placeholders["image"]
    assert len(lines) == len(records) > 0
    for line, record in zip(lines, records, strict=True):
        pictures = [m for m in record["messages"] if m.get("type") == "image"]
        places = [i for i, token in enumerate(line["ids"]) if token == placeholder.id]
        assert len(places) == placeholder.count * len(pictures) > 0
        assert not any(line["weights"][i] for i in places) and any(line["weights"])


def test_the_histogram_counts_every_length():
    for sizes in ([5], [1, 1, 1], list(range(1, 14)), [3, 1000], [7, 8]):
        lines = list(histogram(sizes))
        bars = [
            re.fullmatch(r" *([\d,]+)-([\d,]+) *\|(#*) ([\d,]+)", line).groups()
            for line in lines[1:]
        ]
        edges = [(int(a.replace(",", "")), int(b.replace(",", "")), int(n)) for a, b, _, n in bars]
        assert [sum(a <= size <= b for size in sizes) for a, b, _ in edges] == [
            n for _, _, n in edges
        ] and sum(n for _, _, n in edges) == len(sizes)
        assert (
            len(bars) <= 12
            and edges[0][0] == min(sizes)
            and edges[-1][0] <= max(sizes) <= edges[-1][1]
        )


def test_a_page_for_a_person(forked, door, tmp_path, model, monkeypatch):
    monkeypatch.setattr("ta.screen.has_colours", lambda stream: True)
    data = write(
        tmp_path / "a.jsonl", *chats("train", 40), {"messages": [{"role": "user", "content": "?"}]}
    )
    flags = ("--model-path", model, "--data", data)
    page = forked(
        "inspect_data", *flags, "--on-bad-record", "skip", "--max-bad-share", 0.1, "--examples", 2
    )
    assert (
        "40 records, " in page
        and "40 of 41 from" in page
        and f"dropped 1: no answer ({data}:41)" in page
    )
    assert sum(int(count) for count in re.findall(r"\|#* (\d+)", page)) == 40, (
        "the histogram counts every record"
    )
    assert page.count("\x1b[32m") >= 2 and f"{data}:2 " in page and f"{data}:3 " not in page
    code, said = door("inspect_data", *flags)
    assert (
        code == 2
        and said.startswith(f"error: {data}:41: no message of role assistant")
        and "Traceback" not in said
    )


def test_flags_of_another_kind_are_refused(door):
    for flags, kind in (
        (("--labels", "a", "b"), "class"),
        (("--image-encoder", "builtin"), "media"),
    ):
        code, said = door("inspect_data", *flags)
        assert code == 2 and "--kind chat has no" in said and f"give --kind {kind}" in said
