"""The report of a run folder: curves, answers, settings in one file without scripts, whatever the logs hold."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ta.generation.metrics import METRICS as METRICS_OF_ANSWERS
from ta.training.report import (
    answers_at,
    before_and_after,
    chart,
    charts_of,
    downsample,
    log_ticks,
    marked,
    meaning,
    page,
    sample_cards,
    ticks,
    write_report,
)

METRICS = [
    {"step": 0, "val_loss": 2.5, "val_accuracy": 0.0},
    {
        "step": 10,
        "loss": 2.0,
        "lr": 1e-3,
        "tokens": 90,
        "learned_tokens": 40,
        "seconds": 0.5,
        "accuracy": 0.25,
    },
    {
        "step": 20,
        "loss": math.nan,
        "lr": 5e-4,
        "tokens": 90,
        "learned_tokens": 60,
        "seconds": 0.5,
        "note": "text",
    },
    {"step": 20, "val_loss": 1.5, "val_accuracy": 0.5},
]
SAMPLES = [
    {
        "step": 0,
        "id": "a",
        "prompt": "1+1?",
        "answer": "<script>alert(1)</script>",
        "reference": "2",
    },
    {"step": 0, "id": "b", "prompt": "2+2?", "answer": "4", "reference": "4"},
    {"step": 20, "id": "a", "prompt": "1+1?", "answer": " 2", "reference": "2"},
    {"step": 20, "id": "b", "prompt": "2+2?", "answer": "4", "reference": "4"},
]


class Tags(HTMLParser):
    """Tags must close in order; collects what could load something or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.bad = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.bad += [tag] * (tag in ("script", "link", "img", "iframe"))
        self.bad += [
            name for name, _ in attributes if name.startswith("on") or name in ("src", "href")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_ends_with_what_has_changed(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 10, "loss": 2.5}\n{"step": 25, "loss": 0.25}\n')
    said = before_and_after(tmp_path, {})
    assert said == f"loss 2.5 at step 10 -> 0.25 at step 25; curves in {tmp_path}/report.html"
    log.write_text('{"step": 2, "loss": 2.5}\n')
    assert before_and_after(tmp_path, {}).startswith("loss 2.5 at step 2; ")
    log.write_text('{"step": 0, "val_loss": 3}\n{"step": 2, "loss": 2.5}\n')
    said = before_and_after(tmp_path, {"loss": 2.0, "loss/a": 1.0, "new": 1.0})
    assert said.startswith("held out, before -> after training: loss 3 -> 2; answers in ")


def test_training_and_held_out_values_share_a_chart():
    assert charts_of(METRICS) == {
        "loss": {"training": [(10, 2.0)], "held out": [(0, 2.5), (20, 1.5)]},
        "accuracy": {"training": [(10, 0.25)], "held out": [(0, 0.0), (20, 0.5)]},
        "lr": {"training": [(10, 1e-3), (20, 5e-4)]},
        "tokens a second": {"training": [(10, 180.0), (20, 180.0)]},
    }
    assert charts_of([]) == {}


def test_a_chart_says_its_figures_where_the_pointer_stands():
    drawing = chart("loss", {"training": [(10, 2.0)], "held out": [(0, 2.5), (10, 1.5)]})
    titles = [title.text for title in ElementTree.fromstring(drawing).iter("title")]
    assert titles == ["step 0: held out 2.5", "step 10: training 2, held out 1.5"]
    assert "logarithmic" not in drawing and "loss, logarithmic" in chart(
        "loss", {"training": [(1, 7.0), (9, 0.1)]}
    )
    assert "logarithmic" not in chart(
        "reward", {"training": [(1, 7.0), (9, 0.1)]}
    ) and "logarithmic" not in chart("loss", {"a": [(1, 0.0)]})


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.integers(2, 8))
@example(0.0, 5e-324, 2)
@example(1e9, 1e-7, 4)
@example(-1.0, 2e8 + 2, 2)
def test_ticks_enclose_and_are_few(low, width, count):
    found = ticks(low, low + width, count)
    assert found[0] <= low + 1e-6 * max(abs(low), width, 1) and found[
        -1
    ] >= low + width - 1e-6 * max(abs(low), width, 1)
    assert 2 <= len(found) <= count + 3 and found == sorted(found)
    above = log_ticks(1e-3 + abs(low), 1e-3 + abs(low) + width)
    assert above[0] <= 1e-3 + abs(low) and above[-1] >= 1e-3 + abs(low) + width


@given(st.lists(st.floats(-9, 9), max_size=200))
def test_a_long_curve_is_thinned_by_means(values):
    points = list(enumerate(values))
    short = downsample(points, 20)
    assert len(short) <= 20 and (len(points) > 20 or short == points)
    assert points[:1] + points[-1:] == short[:1] + short[-1:]
    if points:
        assert (
            min(values) - 1e-9 <= min(y for _, y in short)
            and max(y for _, y in short) <= max(values) + 1e-9
        )


def cards(samples, pictures=""):
    steps = sorted({sample["step"] for sample in samples})
    return sample_cards({f"step {n}": answers_at(samples, n) for n in steps}, pictures)


def test_answers_stand_side_by_side_and_what_is_right_is_in_colour():
    """Groups by what became of the answers, wrong ones first; of a wrong answer the words that are right are marked."""
    text = cards(SAMPLES)
    assert Tags(text).bad == [] and "<script" not in text and "&lt;script&gt;" in text
    assert re.findall("<h3>(.*?)</h3>", text) == [
        "step 0 wrong, step 20 right: 1",
        "step 0 right, step 20 right: 1",
    ]
    assert text.count("class=ok") == 3 and "right answer</b> 2" in text
    worse = cards(
        [SAMPLES[3] | {"step": 0}, SAMPLES[1] | {"step": 20, "answer": "5"}, *SAMPLES[2:3]]
    )
    assert worse.index("step 0 right, step 20 wrong: 1") < worse.index("step 20 right")
    assert marked("The cat: sat <b> down", "a cat sat") == (
        "The <mark>cat:</mark> <mark>sat</mark> &lt;b&gt; down"
    )
    assert marked("\u6211\u5728", "\u6211") == "<mark>\u6211</mark>\u5728" and marked("a") == "a"
    many = [
        {"step": s, "id": i, "answer": "x", "reference": "y"} for s in (0, 9) for i in range(20)
    ]
    assert "14 more</summary>" in cards(many) and cards([]) == ""


def test_classes_and_rankings_are_compared_too():
    classes = [
        {"step": s, "line": 3, "text": "t", "label": 1, "predicted": p, "probabilities": [0.5, 0.5]}
        for s, p in ((0, 0), (9, 1))
    ]
    pairs = [
        {"step": s, "line": 1, "prompt": "p", "chosen": "c", "rejected": "r", "scores": scores}
        for s, scores in ((0, [0.5, 0.5]), (9, [2.0, -1.0]))
    ]
    for samples in (classes, pairs):
        text = cards(samples)
        assert "step 0 wrong, step 9 right: 1" in text and text.count("class=ok") == 1
    assert "probabilities" in cards(classes) and "scores [2.0, -1.0]" in cards(pairs)


def test_several_answers_of_a_record_have_a_card_each_with_the_whole_dialogue():
    chat = [
        {"role": "user", "content": "first <i>"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "user", "content": [{"type": "text", "content": "second"}]},
    ]
    rows = [
        {"step": step, "row": f"warm 0 {k}", "id": "a", "chat": chat, "answer": f"{step} {k}"}
        for step in (0, 9)
        for k in range(3)
    ]
    text = cards(rows)
    assert Tags(text).bad == [] and text.count("<article>") == 3
    assert all(f"{step} {k}" in text for step in (0, 9) for k in range(3))
    assert "first &lt;i&gt;" in text and "look" in text and "second" in text


def test_pictures_stand_in_the_page_and_what_is_no_picture_is_named(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "red.png")
    (tmp_path / "no.png").write_text("<svg onload=x>")
    chat = [{"role": "user", "type": "image", "content": name} for name in ("red.png", "no.png")]
    chat += [{"role": "user", "type": "audio", "content": '"><script>.wav'}]
    text = cards([{"step": 0, "id": 1, "chat": chat, "answer": "red"}], str(tmp_path))
    shown = re.findall('src="data:image/jpeg;base64,([^"]*)"', text)
    assert Image.open(io.BytesIO(base64.b64decode(shown[0]))).size == (160, 53)
    assert len(shown) == 1 and "[image no.png]" in text and "<script" not in text


def test_figures_of_several_sets_stand_in_a_table_and_their_curves_are_folded():
    rows = [
        {"step": n, "val_loss": n + 1.5, "val_loss/<a>": n + 1.0, "val_loss/b": n + 2.0}
        for n in (0, 3)
    ]
    text = page("x", {}, rows, [])
    assert "<th>all</th><th>&lt;a&gt;</th><th>b</th>" in text
    assert "<td>loss</td><td>1.5 → 4.5</td><td>1 → 4</td><td>2 → 5</td>" in text
    before, folded = text.split("curves of single sets")
    assert (before.count("<svg"), folded.count("<svg")) == (1, 2) and Tags(text).bad == []
    assert "of each set" not in page("x", {}, METRICS, [])


def test_every_figure_has_a_sentence():
    assert [name for name in METRICS_OF_ANSWERS if not 20 < len(meaning(name)) < 200] == []
    assert meaning("accuracy@warm/easy") == meaning("accuracy") and meaning("recall_at_3/set")
    assert meaning("reward brief") == meaning("reward") and meaning("mine") == ""


def test_two_evaluations_are_points_and_no_curve():
    two = chart("loss", {"held out": [(0, 2.5), (10, 1.5)]})
    three = chart("loss", {"held out": [(0, 2.5), (5, 2.0), (10, 1.5)]})
    assert "What training lowers" in two
    assert "polyline" not in two and two.count('r="2.5"') == 2 and "polyline" in three


def test_the_page_is_whole_and_runs_nothing():
    settings = {
        "command": "python sft.py --out 'a b'",
        "config": {"loop": {"out": "<x>"}, "beta": 0.1},
        "identity": {"steps": 40},
        "records": {
            "records": 38,
            "tokens": 400,
            "learned_tokens": 100,
            "sources": [{"source": "<a>.jsonl", "used": 38, "records": 40}],
            "lengths": {"least": 3, "50 %": 9, "most": 31},
            "drops": {"too long": {"count": 2, "first": ["a.jsonl:3"]}},
        },
    }
    text = page("<run>", settings, METRICS, SAMPLES)
    assert Tags(text).bad == [] and "default-src 'none'" in text and "refresh" not in text
    assert 'http-equiv="refresh"' in page("<run>", settings, METRICS, SAMPLES, live=True)
    for shown in (
        "&lt;run&gt;",
        "step 20 of 40",
        "1 s of training",
        "1.5</b> <span>from 2.5",
        "sft.py --out",
        "too long</td><td>2</td><td>a.jsonl:3",
        "25% learned",
        "<th>least</th><th>50 %</th><th>most</th>",
        "&lt;a&gt;.jsonl",
        "beta",
        "&lt;x&gt;",
    ):
        assert shown in text, shown
    assert Tags(page("new", {}, [], [])).bad == []


@pytest.mark.parametrize("names", [(), ("metrics",), ("config", "samples")])
def test_a_folder_that_lacks_files_has_a_report(tmp_path, names):
    texts = {
        "config": "{}",
        "metrics": json.dumps(METRICS[0]) + '\n{"step": 9, "lo',
        "samples": json.dumps(SAMPLES[0]) + "\n",
    }
    for name in names:
        (tmp_path / (name + (".json" if name == "config" else ".jsonl"))).write_text(texts[name])
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert Tags(text).bad == [] and ("held out" in text) == ("metrics" in names)


def test_a_metric_without_a_docstring_is_explained_by_nothing(monkeypatch):
    own = METRICS_OF_ANSWERS["accuracy"]._replace(function=lambda *given: 1.0)
    monkeypatch.setitem(METRICS_OF_ANSWERS, "own", own)
    assert meaning("own") == ""
