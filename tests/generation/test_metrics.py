"""Metrics of labels, scores, log-probabilities, rewards and passages: hand-worked values, definitions recomputed, empty and lone inputs."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ta.generation.metrics import (
    METRICS,
    accuracy,
    balanced_accuracy,
    contains,
    f1,
    kl,
    measure,
    mrr,
    perplexity,
    precision,
    recall,
    recall_at_k,
    retrieval_utility,
    reward,
    roc_auc,
)


def test_classification_by_hand():
    labels, predictions = (
        [0, 0, 0, 0, 1, 1, 2],
        [0, 0, 0, 1, 1, 0, 3],
    )  # 2 is never predicted, 3 is no label
    assert accuracy(predictions, labels) == 4 / 7
    assert balanced_accuracy(predictions, labels) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert precision(predictions, labels) == pytest.approx((3 / 4 + 1 / 2 + 0 + 0) / 4)
    assert recall(predictions, labels) == pytest.approx((3 / 4 + 1 / 2 + 0 + 0) / 4)
    assert f1(predictions, labels) == pytest.approx((6 / 8 + 2 / 4 + 0 + 0) / 4)
    assert precision([1, 1, 0], [1, 0, 0]) == pytest.approx((1 / 2 + 1) / 2) and recall(
        [1, 1, 0], [1, 0, 0]
    ) == pytest.approx((1 + 1 / 2) / 2)
    assert accuracy([" yes\n", "No"], ["yes", "no"]) == 0.5
    answers, references = (
        ["5, of course!", "It is 15.", "5", "", "a.c"],
        ["5", "5", "5\n", "5", "abc"],
    )
    assert contains(answers, references) == 2 / 5
    # a vowel sign goes on with its word; Chinese has no spaces to cut at
    marked = ["\u0915\u093e", "\u0915 hai", "caf\u00e9!", "\u6211\u5728\u5317\u4eac"]
    wanted = ["\u0915", "\u0915", "cafe\u0301", "\u5317\u4eac"]
    assert [contains([a], [r]) for a, r in zip(marked, wanted, strict=True)] == [0, 1, 1, 1]
    assert accuracy(["caf\u00e9"], ["cafe\u0301 "]) == 1
    assert (
        accuracy([0] * 99 + [1], [0] * 98 + [1, 1]) == 0.99
        and balanced_accuracy([0] * 99 + [1], [0] * 98 + [1, 1]) == 0.75
    )


def test_roc_auc_by_hand():
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert (
        roc_auc([1, 2], [0, 1]) == 1.0
        and roc_auc([2, 1], [0, 1]) == 0.0
        and roc_auc([3, 3, 3], [0, 1, 1]) == 0.5
    )
    assert math.isnan(roc_auc([1.0, 2.0], [1, 1])) and math.isnan(roc_auc([], []))
    with pytest.raises(ValueError, match="2 scores, 0 of them no number, and 1 labels"):
        roc_auc([1, 2], [1])


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=12))
def test_roc_auc_counts_pairs(points):
    wins = [(s > t) + 0.5 * (s == t) for s, y in points if y for t, z in points if not z]
    got = roc_auc([s for s, _ in points], [y for _, y in points])
    assert got == pytest.approx(sum(wins) / len(wins)) if wins else math.isnan(got)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=15))
def test_classification_equals_the_confusion_matrix(points):
    predictions, labels = map(list, zip(*points, strict=True))
    every = sorted(set(predictions) | set(labels))
    cell = lambda y, p: sum((a, b) == (p, y) for a, b in points)
    row, column = (
        {c: sum(cell(c, p) for p in every) for c in every},
        {c: sum(cell(y, c) for y in every) for c in every},
    )
    rates = [(cell(c, c) / (column[c] or 1), cell(c, c) / (row[c] or 1)) for c in every]
    assert accuracy(predictions, labels) == pytest.approx(
        sum(cell(c, c) for c in every) / len(points)
    )
    assert precision(predictions, labels) == pytest.approx(sum(p for p, _ in rates) / len(every))
    assert recall(predictions, labels) == pytest.approx(sum(r for _, r in rates) / len(every))
    assert f1(predictions, labels) == pytest.approx(
        sum(2 * p * r / (p + r or 1) for p, r in rates) / len(every)
    )
    present = [c for c in every if row[c]]
    assert balanced_accuracy(predictions, labels) == pytest.approx(
        sum(cell(c, c) / row[c] for c in present) / len(present)
    )


def test_perplexity_by_hand():
    assert perplexity([[math.log(0.25)]]) == pytest.approx(4)  # one token
    assert perplexity([[math.log(0.5), math.log(0.125)], [math.log(0.25)], []]) == pytest.approx(
        4
    )  # tokens weigh alike, whatever their answer
    assert (
        perplexity([[-1e4]]) == math.inf == perplexity([[-math.inf]]) and perplexity([[0.0]]) == 1.0
    )
    assert math.isnan(perplexity([[]])) and math.isnan(perplexity([]))


def test_kl_by_hand():
    assert kl([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]]) == pytest.approx((0.5 + 0 - 1) / 3)
    assert kl([[-3.0]], [[-3.0]]) == 0
    with pytest.raises(ValueError):
        kl([[0.0, 0.0]], [[0.0]])


def test_the_estimator_of_kl_is_unbiased():
    """Over all outcomes of a policy p, weighted as p draws them, it gives sum p log(p / q)."""
    counts, reference = (6, 3, 1), (2, 3, 5)  # tenths: each outcome as often as the policy draws it
    p, q = [
        [math.log(c / 10) for c, n in zip(side, counts, strict=True) for _ in range(n)]
        for side in (counts, reference)
    ]
    exact = sum(c / 10 * math.log(c / r) for c, r in zip(counts, reference, strict=True))
    assert kl([p], [q]) == pytest.approx(exact)


def test_retrieval_by_hand():
    retrieved, gold = (
        [["a", "b", "c"], ["d", "e", "f"], ["g"], ["h"]],
        [{"c"}, ["d", "f", "x", "y"], ["z"], []],
    )
    assert recall_at_k(retrieved, gold, k=1) == pytest.approx(
        (0 + 1 / 4 + 0) / 3
    )  # the question without gold does not count
    assert (
        recall_at_k(retrieved, gold, k=3)
        == pytest.approx((1 + 2 / 4 + 0) / 3)
        == recall_at_k(retrieved, gold)
    )
    assert mrr(retrieved, gold) == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert math.isnan(mrr([["a"]], [[]])) and recall_at_k([[]], [["a"]]) == 0 == mrr([[]], [["a"]])
    alone, after = [[-2.0, -4.0], [-1.0], [-9.0]], [[[-1.0, -1.0], [-3.0, -3.0]], [[-4.0]], []]
    assert retrieval_utility(alone, after) == pytest.approx(
        ((3 - 1 + 3 - 3) / 2 + (1 - 4)) / 2
    )  # 2 and 0; -3; no passages: no question
    assert reward([1.0, 2.0]) == 1.5 and math.isnan(reward([]))


def test_measure_gives_each_metric_what_it_takes():
    got = measure(
        ["accuracy", "distinct_2", "rouge_l"],
        predictions=[1],
        labels=[1],
        answers=["a b a b"],
        references=["a b"],
        rewards=None,
    )
    assert got == {"accuracy": 1.0, "distinct_2": 2 / 3, "rouge_l": pytest.approx(2 * 2 / 6)}
    assert measure(
        ["adjusted_distinct_1", "recall_at_1"],
        tokens=[[3]],
        vocab_size=5,
        retrieved=[["x", "y"]],
        gold=[["y"]],
    ) == {
        "adjusted_distinct_1": pytest.approx(1.0),
        "recall_at_1": 0.0,
    }
    with pytest.raises(ValueError, match=r"unknown metric 'blue'.*bleu"):
        measure(["blue"])
    with pytest.raises(
        ValueError, match=r"kl_to_reference needs logprobs and ref_logprobs.*only answers"
    ):
        measure(["kl_to_reference"], answers=["a"])
    with pytest.raises(ValueError, match="reward needs rewards, and there is only nothing"):
        measure(["reward"])


def test_every_metric_can_be_measured_from_the_common_names():
    data = {
        "answers": ["a b", "a"],
        "references": ["a b", "c"],
        "predictions": [0, 1],
        "labels": [0, 1],
        "scores": [0.1, 0.7],
        "vocab_size": 9,
        "groups": [["a b", "a"]],
        "tokens": [[1, 2], [1]],
    }
    data |= {
        "logprobs": [[-1.0], [-2.0]],
        "ref_logprobs": [[-1.0], [-1.0]],
        "rewards": [0.5],
        "retrieved": [["x"]] * 2,
        "gold": [["x"]] * 2,
    }
    values = measure(METRICS, **data, passage_logprobs=[[[-1.0]], [[-1.0]]])
    assert list(values) == list(METRICS) and all(
        isinstance(v, float) and math.isfinite(v) for v in values.values()
    )


def test_importing_metrics_is_light():
    heavy = "import sys, ta.generation.metrics, ta.generation.candidates; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", heavy], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
