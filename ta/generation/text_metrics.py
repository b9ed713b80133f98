"""Metrics of texts by their words: length, variety, overlap with references and with each other.

`answers` are texts, split into words at white space, or (but for ROUGE and METEOR) ready-made units
such as token ids; `references` is one text an answer. An empty answer or one of a single word has a
value; no answers at all are nan. Nothing is downloaded.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

Units = Sequence[str] | Sequence[Sequence[Hashable]]


def length(answers: Units) -> float:
    """Mean number of units (words of texts, tokens of ids) an answer."""
    return mean(len(units) for units in _split(answers))


def distinct(answers: Units, n: int = 1) -> float:
    """distinct-n, arXiv 1510.03055: different n-grams / n-grams of all answers.

    0 where no answer has n units.
    """
    grams = [gram for units in _split(answers) for gram in _ngrams(units, n)]
    return len(set(grams)) / max(len(grams), 1)


def adjusted_distinct(answers: Units, vocab_size: int, n: int = 1) -> float:
    """Expectation-adjusted distinct-n, eq. 5 of Liu et al. 2022 (ACL short 86).

    different / (V (1 - ((V - 1) / V)^count)), V = vocab_size.

    The denominator is how many different ones a uniform draw of as many would have, so that length
    is no fault; it can exceed 1.
    """
    if vocab_size < 1:
        raise ValueError(
            f"vocab_size={vocab_size} is no vocabulary; give the number of units that could occur"
        )
    grams = [gram for units in _split(answers) for gram in _ngrams(units, n)]
    expected = (
        -vocab_size * math.expm1(len(grams) * math.log1p(-1 / vocab_size)) if vocab_size > 1 else 1
    )
    return len(set(grams)) / expected if grams else 0.0


def diversity(answers: Units) -> float:
    """Mean over answers of the entropy of their units, -sum p log p in nats (Shannon 1948).

    0 for an empty answer.
    """
    totals = ((Counter(units), len(units)) for units in _split(answers))
    return mean(
        -sum(c / total * math.log(c / total) for c in counts.values()) for counts, total in totals
    )


def bleu(answers: Units, references: Units, max_n: int = 4) -> float:
    """Corpus BLEU of 0 to 1 (Papineni et al. 2002), one reference an answer.

    Equals sacrebleu with tokenize="none" (exponential smoothing).
    """
    return _bleu(
        [(a, [r]) for a, r in zip(_split(answers), _split(references), strict=True)],
        max_n,
        effective_order=False,
    )


def self_bleu(answers: Units, max_n: int = 4) -> float:
    """Self-BLEU, arXiv 1802.01886: mean sentence BLEU of each answer with the others as references.

    0 for a single answer, which is like no other.

    Of words, not letters. Sentence BLEU as in sacrebleu: orders that the answer is too short for do
    not count.
    """
    units = _split(answers)
    if len(units) == 1:
        return 0.0
    return mean(
        _bleu([(a, units[:i] + units[i + 1 :])], max_n, effective_order=True)
        for i, a in enumerate(units)
    )


def rouge_n(answers: Sequence[str], references: Sequence[str], n: int = 1) -> float:
    """ROUGE-N (Lin 2004): mean F1 of the n-grams in common, each counted as often as both have it.

    Words are lower-cased runs of letters and digits.
    """
    grams = [
        [Counter(_ngrams(_plain(text), n)) for text in pair]
        for pair in zip(answers, references, strict=True)
    ]
    overlaps = ((2 * (a & r).total(), a.total() + r.total()) for a, r in grams)
    return mean(shared / max(every, 1) for shared, every in overlaps)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004): mean F1 of the longest common subsequence of words as in `rouge_n`."""
    pairs = [(_plain(a), _plain(r)) for a, r in zip(answers, references, strict=True)]
    return mean(2 * _common_subsequence(a, r) / max(len(a) + len(r), 1) for a, r in pairs)


def meteor(answers: Sequence[str], references: Sequence[str]) -> float:
    """METEOR (Banerjee and Lavie 2005) with its exact module only: no stems, no synonyms, so no
    downloads; words as in `rouge_n`.

    10 P R / (R + 9 P) (1 - 0.5 (chunks / matches)^3), matches in as long chunks as a greedy choice
    of the longest finds.
    """

    def one(answer: list[str], reference: list[str]) -> float:
        matched, chunks = _align(answer, reference)
        if not matched:
            return 0.0
        p, r = matched / len(answer), matched / len(reference)
        return 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matched) ** 3)

    return mean(one(_plain(a), _plain(r)) for a, r in zip(answers, references, strict=True))


def mean(values: Iterable[float]) -> float:
    """The mean of numbers; nan of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _split(answers: Units) -> list[list[Hashable]]:
    return [answer.split() if isinstance(answer, str) else list(answer) for answer in answers]


def _plain(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def _bleu(
    pairs: list[tuple[list[Hashable], list[list[Hashable]]]], max_n: int, effective_order: bool
) -> float:
    """BLEU of (answer, its references): clipped n-gram precisions, of which a k-th zero counts as 1
    / (2^k total), and the brevity penalty.
    """
    orders, answered, wanted, zeros = [], 0, 0, 0
    for n in range(1, max_n + 1):
        correct = total = 0
        for answer, references in pairs:
            grams, best = Counter(_ngrams(answer, n)), Counter()
            for reference in references:
                best |= Counter(_ngrams(reference, n))
            correct, total = correct + (grams & best).total(), total + grams.total()
        orders.append((correct, total))
    for answer, references in pairs:
        answered += len(answer)
        # the closest length, the shorter of two
        wanted += min((abs(len(r) - len(answer)), len(r)) for r in references)[1]
    if not any(correct for correct, _ in orders) or (not effective_order and not orders[-1][1]):
        return 0.0 if pairs else math.nan
    logs = []
    for correct, total in orders:
        if total:
            zeros += not correct
            logs.append(math.log(correct / total if correct else 1 / (2**zeros * total)))
    return math.exp(min(0, 1 - wanted / answered) + sum(logs) / len(logs))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the bits of one integer (Hyyro 2004)."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        step = row & where.get(word, 0)
        row = (row + step | row - step) & full
    return len(a) - row.bit_count()


def _align(a: Sequence[str], b: Sequence[str]) -> tuple[int, int]:
    """Matched words and chunks (runs in the same order) of a one-to-one alignment that takes the
    longest free common run each time.
    """
    where: dict[str, list[int]] = {}
    for j, word in enumerate(b):
        where.setdefault(word, []).append(j)
    runs, partner, taken = [], {}, set()
    for i, word in enumerate(a):
        for j in where.get(word, []):
            if not (i and j and a[i - 1] == b[j - 1]):
                most = min(len(a) - i, len(b) - j)
                size = next((k for k in range(most) if a[i + k] != b[j + k]), most)
                runs.append((-size, i, j))
    heapq.heapify(runs)
    while runs:
        size, i, j = heapq.heappop(runs)
        free = [k for k in range(-size) if i + k not in partner and j + k not in taken]
        if len(free) == -size:
            partner |= {i + k: j + k for k in free}
            taken |= {j + k for k in free}
        else:
            starts = [k for k in free if k - 1 not in free]
            for start in starts:
                end = next(k for k in range(start, -size + 1) if k not in free)
                heapq.heappush(runs, (start - end, i + start, j + start))
    chunks = sum(partner.get(i - 1, -2) != j - 1 for i, j in partner.items())
    return len(partner), chunks
