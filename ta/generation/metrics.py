"""Metrics: pure functions from lists to one float, and the table that names them all.

Inputs have the same names everywhere: `answers` and `references` (texts), `tokens` (ids of each
answer) of `vocab_size`, `groups` (the answers to each prompt), `predictions` and `labels`,
`scores`, `logprobs` and `ref_logprobs` (per answer, per token), `rewards`, `retrieved` and `gold`
(passage ids per question). A single token has a value; a mean of nothing, or a question
without an answer (ROC-AUC of one class), is nan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.generation.text_metrics import (
    UNSPACED,
    adjusted_distinct,
    bleu,
    characters,
    distinct,
    diversity,
    extends,
    length,
    mean,
    meteor,
    plain,
    rouge_l,
    rouge_n,
    self_bleu,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Logprobs = Sequence[Sequence[float]]  # of each answer, of each token
Classes = Sequence[Hashable]
# of each question: ids of passages
Passages = Sequence[Collection[Hashable]]


def accuracy(predictions: Sequence[Any], labels: Sequence[Any]) -> float:
    """Exact match: the share of predictions that equal their label.

    Texts are compared in composed form (NFC), without the white space around them.
    """
    bare = [
        [plain(x) if isinstance(x, str) else x for x in pair]
        for pair in zip(predictions, labels, strict=True)
    ]
    return mean(p == y for p, y in bare)


def contains(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers in which the reference stands as whole words, whatever stands around it.

    Scripts without spaces between words have no words to cut: there any place counts.
    """
    return mean(
        _stands_in(plain(answer), plain(reference))
        for answer, reference in zip(answers, references, strict=True)
    )


def _stands_in(text: str, part: str) -> bool:
    def joined(i: int) -> bool:
        """Whether the character at i goes on with the word of the one beside it."""
        return 0 <= i < len(text) and (
            extends(text[i])
            or text[i] == "_"
            or (text[i].isalnum() and not UNSPACED.match(text[i]))
        )

    start = text.find(part)
    while start >= 0:
        if not joined(start - 1) and not joined(start + len(part)):
            return True
        start = text.find(part, start + 1)
    return False


def balanced_accuracy(predictions: Classes, labels: Classes) -> float:
    """Mean recall of the classes that occur among the labels (Brodersen et al. 2010)."""
    return mean(hits / there for hits, _, there in _counts(predictions, labels) if there)


def precision(predictions: Classes, labels: Classes) -> float:
    """Macro-average of true positives / predicted positives over the classes that occur.

    A class never predicted has 0.
    """
    return mean(hits / max(predicted, 1) for hits, predicted, _ in _counts(predictions, labels))


def recall(predictions: Classes, labels: Classes) -> float:
    """Macro-average of true positives / labels of the class over the classes that occur.

    A class only predicted has 0.
    """
    return mean(hits / max(there, 1) for hits, _, there in _counts(predictions, labels))


def f1(predictions: Classes, labels: Classes) -> float:
    """Macro-average over the classes that occur of 2 true positives / (predicted positives + labels
    of the class).
    """
    return mean(
        2 * hits / (predicted + there) for hits, predicted, there in _counts(predictions, labels)
    )


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Share of (positive, negative) pairs ranked rightly by score, ties half.

    It is Mann-Whitney's U (Hanley and McNeil 1982). NaN where all labels are alike. ValueError for
    labels that are not 0 or 1, and for scores that are NaN or not as many.
    """
    import numpy as np

    values, positive = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if (
        len(values) != len(positive)
        or np.isnan(values).any()
        or (positive != np.asarray(labels)).any()
    ):
        raise ValueError(
            f"{len(values)} scores, {np.isnan(values).sum()} of them no number, and "
            f"{len(positive)} labels do not pair up; "
            "give each score, a number, one label, 0 or 1"
        )
    wins, losses = values[positive], np.sort(values[~positive])
    if not len(wins) or not len(losses):
        return math.nan
    below = np.searchsorted(losses, wins, "left") + np.searchsorted(losses, wins, "right")
    return float(below.sum() / (2 * len(wins) * len(losses)))


def perplexity(logprobs: Logprobs) -> float:
    """exp(-mean log-probability) over the tokens of all answers (Jelinek et al. 1977).

    One token of probability p has 1 / p.
    """
    average = mean(logprob for answer in logprobs for logprob in answer)
    return math.inf if average < -700 else math.exp(-average)


def kl(logprobs: Logprobs, ref_logprobs: Logprobs) -> float:
    """KL(policy || reference), nats a token, over the tokens of answers sampled from the policy.

    The mean of logprob - ref_logprob, the unbiased "k1" of Schulman 2020, "Approximating KL
    divergence".
    """
    pairs = [zip(p, q, strict=True) for p, q in zip(logprobs, ref_logprobs, strict=True)]
    return mean(p - q for answer in pairs for p, q in answer)


def reward(rewards: Sequence[float]) -> float:
    """Mean reward."""
    return mean(rewards)


def recall_at_k(retrieved: Sequence[Classes], gold: Passages, k: int = 5) -> float:
    """Mean share of a question's gold passages that are among its first k retrieved.

    With one gold passage, the hit rate.
    """
    return mean(
        len(set(right).intersection(ranked[:k])) / len(set(right))
        for ranked, right in zip(retrieved, gold, strict=True)
        if right
    )


def mrr(retrieved: Passages, gold: Passages) -> float:
    """Mean of 1 / rank of the first gold passage, 0 where none was retrieved (Voorhees 1999).

    Questions without gold do not count.
    """
    pairs = [(ranked, right) for ranked, right in zip(retrieved, gold, strict=True) if right]
    return mean(
        next((1 / rank for rank, passage in enumerate(ranked, 1) if passage in right), 0.0)
        for ranked, right in pairs
    )


def retrieval_utility(logprobs: Logprobs, passage_logprobs: Sequence[Logprobs]) -> float:
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
    # "each": the mean of a value of each answer; "all": one value of all answers together;
    # "variety": how the answers differ from each other, which a sample with repeats does not show
    of: Literal["each", "all", "variety"] = "each"


def measure(names: Iterable[str], **data: Any) -> dict[str, float]:
    """The metrics `names` of METRICS, each given those of `data` that it takes.

    ValueError for an unknown name, for missing data, and for a text in place of a list.
    """
    names = list(names)
    if alone := [key for key, value in data.items() if isinstance(value, str)]:
        raise ValueError(f"{alone[0]} is one text: give a list")
    check_metrics(names, [key for key, value in data.items() if value is not None])
    values = {}
    for name in names:
        function, inputs, _ = METRICS[name]
        values[name] = function(*map(data.get, inputs))
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


def _counts(predictions: Classes, labels: Classes) -> list[tuple[int, int, int]]:
    """Per class that occurs: true positives, predicted positives, labels."""
    hits = Counter(y for p, y in zip(predictions, labels, strict=True) if p == y)
    predicted, there = Counter(predictions), Counter(labels)
    return [(hits[c], predicted[c], there[c]) for c in predicted | there]


def spacing_note(names: Iterable[str], texts: Iterable[str]) -> str:
    """A line for a person where metrics of words meet texts without spaces between words, or ""."""
    texts = list(texts)
    count = sum(UNSPACED.search(text) is not None for text in texts)
    other = [f"{name}_characters" for name in names if f"{name}_characters" in METRICS]
    if not (count and other):
        return ""
    return (
        f"note: {count} of {len(texts)} texts are in a script without spaces between words, whose "
        f"runs count as one word: give {' '.join(other)}"
    )


def _of_characters(function: Callable[..., float], *texts: Sequence[str]) -> float:
    return function(*([characters(text) for text in side] for side in texts))


def _within(function: Callable[[Sequence[str]], float], groups: Sequence[Sequence[str]]) -> float:
    return mean(function(answers) for answers in groups)


CLASSES = ("predictions", "labels")
TEXTS = ("answers", "references")
METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, CLASSES),
    "contains": Metric(contains, TEXTS),
    "balanced_accuracy": Metric(balanced_accuracy, CLASSES, "all"),
    "precision": Metric(precision, CLASSES, "all"),
    "recall": Metric(recall, CLASSES, "all"),
    "f1": Metric(f1, CLASSES, "all"),
    "roc_auc": Metric(roc_auc, ("scores", "labels"), "all"),
    "length": Metric(length, ("answers",)),
    "distinct_1": Metric(distinct, ("answers",), "variety"),
    "distinct_2": Metric(partial(distinct, n=2), ("answers",), "variety"),
    "adjusted_distinct_1": Metric(adjusted_distinct, ("tokens", "vocab_size"), "variety"),
    "adjusted_distinct_2": Metric(
        partial(adjusted_distinct, n=2), ("tokens", "vocab_size"), "variety"
    ),
    "diversity": Metric(diversity, ("answers",)),
    "bleu": Metric(bleu, TEXTS, "all"),
    "self_bleu": Metric(self_bleu, ("answers",), "variety"),
    "rouge_1": Metric(rouge_n, TEXTS),
    "rouge_2": Metric(partial(rouge_n, n=2), TEXTS),
    "rouge_l": Metric(rouge_l, TEXTS),
    "meteor": Metric(meteor, TEXTS),
    "perplexity": Metric(perplexity, ("logprobs",), "all"),
    "kl_to_reference": Metric(kl, ("logprobs", "ref_logprobs"), "all"),
    "reward": Metric(reward, ("rewards",)),
    "recall_at_1": Metric(partial(recall_at_k, k=1), ("retrieved", "gold")),
    "recall_at_5": Metric(recall_at_k, ("retrieved", "gold")),
    "mrr": Metric(mrr, ("retrieved", "gold")),
    "retrieval_utility": Metric(retrieval_utility, ("logprobs", "passage_logprobs")),
}
# the same of characters, for scripts without spaces between words
METRICS |= {
    f"{name}_characters": METRICS[name]._replace(
        function=partial(_of_characters, METRICS[name].function)
    )
    for name in (
        *("length", "distinct_1", "distinct_2", "bleu", "self_bleu"),
        *("rouge_1", "rouge_2", "rouge_l", "meteor"),
    )
}
# the same of the answers to one prompt, as a mean over prompts
METRICS |= {
    f"{name}_of_prompt": Metric(partial(_within, METRICS[name].function), ("groups",))
    for name in ("distinct_1", "distinct_2", "self_bleu")
}
