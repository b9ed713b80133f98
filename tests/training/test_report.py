"""The report of a run folder: curves, answers, settings in one file without scripts, whatever the logs hold."""

import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ta.training.report import (
    chart,
    charts_of,
    log_ticks,
    page,
    sample_table,
    thin,
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
def test_ticks_enclose_and_are_few(low, width, count):
    found = ticks(low, low + width, count)
    assert found[0] <= low + 1e-6 * max(abs(low), width, 1) and found[
        -1
    ] >= low + width - 1e-6 * max(abs(low), width, 1)
    assert 2 <= len(found) <= count + 2 and found == sorted(found)
    above = log_ticks(1e-3 + abs(low), 1e-3 + abs(low) + width)
    assert above[0] <= 1e-3 + abs(low) and above[-1] >= 1e-3 + abs(low) + width


@given(st.lists(st.floats(-9, 9), max_size=900))
def test_a_long_curve_is_thinned_by_means(values):
    points = list(enumerate(values))
    short = thin(points, 50)
    assert len(short) <= 50 and (len(points) > 50 or short == points)
    assert points[:1] + points[-1:] == short[:1] + short[-1:]
    if points:
        assert (
            min(values) - 1e-9 <= min(y for _, y in short)
            and max(y for _, y in short) <= max(values) + 1e-9
        )


def test_what_changed_is_shown_from_both_ends_and_right_answers_are_marked():
    table = sample_table(SAMPLES)
    assert (
        "<th>record</th><th>prompt</th><th>reference</th><th>answer, step 0</th><th>answer, step 20</th>"
        in table
    )
    assert (
        table.count("class=ok") == 3
        and "<td class=ok> 2</td>" in table
        and "&lt;script&gt;" in table
    )
    assert "more</summary>" not in table and "8 more" in sample_table(
        [{"step": 0, "id": i, "text": "x"} for i in range(20)]
    )
    classes = [
        {"step": s, "line": 3, "text": "t", "label": 1, "predicted": p, "probabilities": [0.5, 0.5]}
        for s, p in ((0, 0), (9, 1))
    ]
    assert "<td>0</td><td class=ok>1</td>" in sample_table(classes) and sample_table([]) == ""


def test_several_answers_of_a_record_have_a_row_each():
    rows = [
        {
            "step": step,
            "row": f"warm 0 {k}",
            "id": "a",
            "chat": [{"role": "user"}],
            "answer": f"{step} {k}",
        }
        for step in (0, 9)
        for k in range(3)
    ]
    table = sample_table(rows)
    assert all(f"{step} {k}" in table for step in (0, 9) for k in range(3))
    assert "chat" not in table and "role" not in table


def test_two_evaluations_are_points_and_no_curve():
    two = chart("loss", {"held out": [(0, 2.5), (10, 1.5)]})
    three = chart("loss", {"held out": [(0, 2.5), (5, 2.0), (10, 1.5)]})
    assert "What training lowers" in two
    assert "Share of answers that equal" in chart("accuracy@warm/easy", {"held out": [(0, 1.0)]})
    assert "polyline" not in two and two.count('r="2.5"') == 2 and "polyline" in three


def test_the_page_is_whole_and_runs_nothing():
    settings = {
        "command": "python sft.py --out 'a b'",
        "config": {"loop": {"out": "<x>"}, "beta": 0.1},
        "identity": {"steps": 40},
    }
    text = page("<run>", settings, METRICS, SAMPLES, [{"reason": "too long", "line": 3}] * 2)
    assert Tags(text).bad == [] and "default-src 'none'" in text
    for shown in (
        "&lt;run&gt;",
        "step 20 of 40",
        "1 s of training",
        "1.5</b> <span>from 2.5",
        "sft.py --out",
        "too long</td><td>2",
        "beta",
        "&lt;x&gt;",
    ):
        assert shown in text, shown
    assert Tags(page("new", {}, [], [], [])).bad == []


@pytest.mark.parametrize("names", [(), ("metrics",), ("config", "samples")])
def test_a_folder_that_lacks_files_has_a_report(tmp_path, names):
    texts = {
        "config": "{}",
        "metrics": json.dumps(METRICS[0]) + '\n{"step": 9, "lo',
        "samples": json.dumps(SAMPLES[0]) + "\n",
    }
    for name in names:
        (tmp_path / (name + (".json" if name == "config" else ".jsonl"))).write_text(texts[name])
    (tmp_path / "drops.jsonl").write_bytes(b'{"reason": "bad text", "text": "\xff"}\n')
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert (
        Tags(text).bad == [] and "bad text" in text and ("held out" in text) == ("metrics" in names)
    )
