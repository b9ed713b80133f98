"""Metrics: pure functions from lists to one float, and the table that names them all.

Inputs have the same names everywhere: `answers` and `references` (texts), `predictions` and
`labels`, `scores`, `logprobs` and `ref_logprobs` (per answer, per token), `rewards`, `retrieved`
and `gold` (passage ids per question). A single token has a value; a mean of nothing, or a question
without an answer (ROC-AUC of one class), is nan.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from ta.generation.text_metrics import (
    adjusted_distinct,
    bleu,
    distinct,
    diversity,
    length,
    mean,
    meteor,
    rouge_l,
    rouge_n,
    self_bleu,
)


def accuracy(predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    """Exact match: the share of predictions that equal their label.

    Texts are compared without the white space around them.
    """
    bare = [
        [x.strip() if isinstance(x, str) else x for x in pair]
        for pair in zip(predictions, labels, strict=True)
    ]
    return mean(p == y for p, y in bare)


def contains(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers in which the reference stands as whole words, whatever stands around it."""
    patterns = (rf"(?<!\w){re.escape(reference.strip())}(?!\w)" for reference in references)
    pairs = zip(answers, patterns, strict=True)
    return mean(re.search(pattern, answer) is not None for answer, pattern in pairs)


def balanced_accuracy(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Mean recall of the classes that occur among the labels (Brodersen et al. 2010)."""
    hits, count = (
        Counter(y for p, y in zip(predictions, labels, strict=True) if p == y),
        Counter(labels),
    )
    return mean(hits[c] / count[c] for c in count)


def precision(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Macro-average of true positives / predicted positives over the classes that occur.

    A class never predicted has 0.
    """
    return mean(hits / max(predicted, 1) for hits, predicted, _ in _counts(predictions, labels))


def recall(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Macro-average of true positives / labels of the class over the classes that occur.

    A class only predicted has 0.
    """
    return mean(hits / max(there, 1) for hits, _, there in _counts(predictions, labels))


def f1(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Macro-average over the classes that occur of 2 true positives / (predicted positives + labels
    of the class).
    """
    return mean(
        2 * hits / (predicted + there) for hits, predicted, there in _counts(predictions, labels)
    )


def roc_auc(scores: Sequence[float], labels: Sequence[int | bool]) -> float:
    """Share of (positive, negative) pairs ranked rightly by score, ties half.

    It is Mann-Whitney's U (Hanley and McNeil 1982); labels are 0 or 1.
    """
    import numpy as np

    values, positive = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if len(values) != len(positive):
        raise ValueError(
            f"{len(values)} scores and {len(positive)} labels do not pair up; "
            "give one label a score"
        )
    wins, losses = np.sort(values[positive]), np.sort(values[~positive])
    if not len(wins) or not len(losses):
        return math.nan
    below = np.searchsorted(losses, wins, "left") + np.searchsorted(losses, wins, "right")
    return float(below.sum() / (2 * len(wins) * len(losses)))


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """exp(-mean log-probability) over the tokens of all answers (Jelinek et al. 1977).

    One token of probability p has 1 / p.
    """
    average = mean(logprob for answer in logprobs for logprob in answer)
    return math.inf if average < -700 else math.exp(-average)


def kl(
    logprobs: Sequence[Sequence[float]],
    ref_logprobs: Sequence[Sequence[float]],
    estimator: str = "k1",
) -> float:
    """KL(policy || reference), nats a token, over the tokens of answers sampled from the policy
    (Schulman 2020, "Approximating KL divergence").

    With d = logprob - ref_logprob: "k1" is the mean of d, unbiased; "k3" of exp(-d) - 1 + d,
    unbiased too, of lower variance, never below 0.
    """
    if estimator not in ("k1", "k3"):
        raise ValueError(f"unknown estimator {estimator!r}; give k1 or k3")
    pairs = [zip(p, q, strict=True) for p, q in zip(logprobs, ref_logprobs, strict=True)]
    gaps = (p - q for answer in pairs for p, q in answer)
    return mean(
        gaps if estimator == "k1" else (math.inf if d < -700 else math.expm1(-d) + d for d in gaps)
    )


def reward(rewards: Sequence[float]) -> float:
    """Mean reward."""
    return mean(rewards)


def recall_at_k(
    retrieved: Sequence[Sequence[Hashable]], gold: Sequence[Collection[Hashable]], k: int = 5
) -> float:
    """Mean share of a question's gold passages that are among its first k retrieved.

    With one gold passage, the hit rate.
    """
    return mean(
        len(set(ranked[:k]) & set(right)) / len(set(right))
        for ranked, right in zip(retrieved, gold, strict=True)
        if right
    )


def mrr(retrieved: Sequence[Sequence[Hashable]], gold: Sequence[Collection[Hashable]]) -> float:
    """Mean of 1 / rank of the first gold passage, 0 where none was retrieved (Voorhees 1999).

    Questions without gold do not count.
    """
    pairs = [(ranked, right) for ranked, right in zip(retrieved, gold, strict=True) if right]
    return mean(
        next((1 / rank for rank, passage in enumerate(ranked, 1) if passage in right), 0.0)
        for ranked, right in pairs
    )


def retrieval_utility(
    logprobs: Sequence[Sequence[float]], passage_logprobs: Sequence[Sequence[Sequence[float]]]
) -> float:
    """Mean over passages, then questions, of log p(answer | question, passage) - log p(answer |
    question), nats a token.

    `logprobs`: per question, of the reference answer's tokens without passages; `passage_logprobs`:
    the same after each of its passages. Above 0 the passages help. The likelihood of the answer as
    a measure of a passage is that of arXiv 2301.12652 (REPLUG), section 4.2.
    """
    pairs = [
        (alone, after) for alone, after in zip(logprobs, passage_logprobs, strict=True) if after
    ]
    return mean(mean(mean(tokens) for tokens in after) - mean(alone) for alone, after in pairs)


class Metric(NamedTuple):
    """A function and the inputs that it takes, in order."""

    function: Callable[..., float]
    inputs: tuple[str, ...]


def measure(names: Iterable[str], **data: Any) -> dict[str, float]:
    """The metrics `names` of METRICS, each given those of `data` that it takes.

    ValueError for an unknown name or for missing data.
    """
    names = list(names)
    check_metrics(names, [key for key, value in data.items() if value is not None])
    values = {}
    for name in names:
        function, inputs = METRICS[name]
        values[name] = function(*(data[key] for key in inputs))
    return values


def check_metrics(names: Iterable[str], given: Collection[str]) -> None:
    """ValueError for an unknown name, and for a metric that needs inputs that are not `given`."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; give some of: {', '.join(METRICS)}")
        if missing := [key for key in METRICS[name].inputs if key not in given]:
            raise ValueError(
                f"metric {name} needs {' and '.join(missing)}, and there is only "
                f"{', '.join(given) or 'nothing'}; leave it out"
            )


def _counts(
    predictions: Sequence[Hashable], labels: Sequence[Hashable]
) -> list[tuple[int, int, int]]:
    """Per class that occurs: true positives, predicted positives, labels."""
    hits = Counter(y for p, y in zip(predictions, labels, strict=True) if p == y)
    predicted, there = Counter(predictions), Counter(labels)
    return [(hits[c], predicted[c], there[c]) for c in predicted | there]


CLASSES = ("predictions", "labels")
TEXTS = ("answers", "references")
METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, CLASSES),
    "contains": Metric(contains, TEXTS),
    "balanced_accuracy": Metric(balanced_accuracy, CLASSES),
    "precision": Metric(precision, CLASSES),
    "recall": Metric(recall, CLASSES),
    "f1": Metric(f1, CLASSES),
    "roc_auc": Metric(roc_auc, ("scores", "labels")),
    "length": Metric(length, ("answers",)),
    "distinct_1": Metric(distinct, ("answers",)),
    "distinct_2": Metric(partial(distinct, n=2), ("answers",)),
    "adjusted_distinct_1": Metric(adjusted_distinct, ("answers", "vocab_size")),
    "adjusted_distinct_2": Metric(partial(adjusted_distinct, n=2), ("answers", "vocab_size")),
    "diversity": Metric(diversity, ("answers",)),
    "bleu": Metric(bleu, TEXTS),
    "self_bleu": Metric(self_bleu, ("answers",)),
    "rouge_1": Metric(rouge_n, TEXTS),
    "rouge_2": Metric(partial(rouge_n, n=2), TEXTS),
    "rouge_l": Metric(rouge_l, TEXTS),
    "meteor": Metric(meteor, TEXTS),
    "perplexity": Metric(perplexity, ("logprobs",)),
    "kl": Metric(kl, ("logprobs", "ref_logprobs")),
    "reward": Metric(reward, ("rewards",)),
    "recall_at_1": Metric(partial(recall_at_k, k=1), ("retrieved", "gold")),
    "recall_at_5": Metric(recall_at_k, ("retrieved", "gold")),
    "mrr": Metric(mrr, ("retrieved", "gold")),
    "retrieval_utility": Metric(retrieval_utility, ("logprobs", "passage_logprobs")),
}
