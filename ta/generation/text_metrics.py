"""Metrics of texts by their words: length, variety, overlap with references and with each other.

`answers` are texts or ready-made units, such as token ids or characters; `references` is one of
them an answer. Texts are split into words at white space, by ROUGE and METEOR at Unicode's word
boundaries. An empty answer or one of a single word has a value; no answers at all are nan. Nothing
is downloaded.
"""

import heapq
import math
import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import groupby

Units = Sequence[str] | Sequence[Sequence[Hashable]]


def length(answers: Units) -> float:
    """Mean number of units (words of texts, tokens of ids) an answer."""
    return mean(map(len, _units(answers)))


def distinct(answers: Units, n: int = 1) -> float:
    """distinct-n, arXiv 1510.03055: different n-grams / n-grams of all answers.

    0 where no answer has n units.
    """
    grams = [gram for units in _units(answers) for gram in _ngrams(units, n)]
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
    grams = [gram for units in _units(answers) for gram in _ngrams(units, n)]
    expected = 1
    if vocab_size > 1:
        expected = -vocab_size * math.expm1(len(grams) * math.log1p(-1 / vocab_size))
    return len(set(grams)) / expected if grams else 0.0


def diversity(answers: Units) -> float:
    """Mean over answers of the entropy of their units, -sum p log p in nats (Shannon 1948).

    0 for an empty answer.
    """
    totals = ((Counter(units), len(units)) for units in _units(answers))
    shares = [[count / total for count in counts.values()] for counts, total in totals]
    return mean(-sum(share * math.log(share) for share in each) for each in shares)


def bleu(answers: Units, references: Units, max_n: int = 4) -> float:
    """Corpus BLEU of 0 to 1 (Papineni et al. 2002), one reference an answer.

    Equals sacrebleu with tokenize="none" (exponential smoothing).
    """
    pairs = list(zip(_units(answers), _units(references), strict=True))
    if not pairs:
        return math.nan
    orders = []
    for n in range(1, max_n + 1):
        grams = [(Counter(_ngrams(a, n)), Counter(_ngrams(r, n))) for a, r in pairs]
        matches = sum((mine & theirs).total() for mine, theirs in grams)
        orders.append((matches, sum(mine.total() for mine, _ in grams)))
    # an answer too short for the longest n-grams has no BLEU, as in sacrebleu
    lengths = [sum(len(pair[side]) for pair in pairs) for side in (0, 1)]
    return _bleu(orders, *lengths) if orders[-1][1] else 0.0


def self_bleu(answers: Units) -> float:
    """Self-BLEU, arXiv 1802.01886: mean sentence BLEU of each answer with the others as references.

    0 for a single answer, which is like no other.

    Of words, not letters. Sentence BLEU as in sacrebleu: orders that the answer is too short for do
    not count. One pass keeps the two greatest counts of an n-gram: the greatest among the others
    is the first one, or the second where the first is the answer's own.
    """
    units = _units(answers)
    if len(units) == 1:
        return 0.0
    orders: list[list[tuple[int, int]]] = [[] for _ in units]
    for n in range(1, 5):
        every = [Counter(_ngrams(answer, n)) for answer in units]
        first, second = {}, {}
        for grams in every:
            for gram, count in grams.items():
                greatest = first.get(gram, 0)
                if count > greatest:
                    first[gram], second[gram] = count, greatest
                elif count > second[gram]:
                    second[gram] = count
        for order, grams in zip(orders, every, strict=True):
            matches = 0
            for gram, count in grams.items():
                others = second if count == first[gram] else first
                matches += min(count, others[gram])
            order.append((matches, grams.total()))
    lengths = sorted(len(answer) for answer in units)
    return mean(
        _bleu(counts, len(answer), _closest(lengths, len(answer)))
        for counts, answer in zip(orders, units, strict=True)
    )


def _closest(lengths: Sequence[int], own: int) -> int:
    """The length closest to `own` among sorted lengths without one of its own; of two the less."""
    place = bisect_left(lengths, own)
    near = lengths[max(place - 1, 0) : place + 2]
    near.remove(own)
    return min(near, key=lambda other: (abs(other - own), other))


def rouge_n(answers: Units, references: Units, n: int = 1) -> float:
    """ROUGE-N (Lin 2004): mean F1 of the n-grams in common, each counted as often as both have it.

    Words are lower-cased runs of letters and digits, marks with the letter before them.
    """
    grams = [
        [Counter(_ngrams(units, n)) for units in pair] for pair in _word_pairs(answers, references)
    ]
    return mean(_f1((a & r).total(), a.total() + r.total()) for a, r in grams)


def rouge_l(answers: Units, references: Units) -> float:
    """ROUGE-L (Lin 2004): mean F1 of the longest common subsequence of words as in `rouge_n`."""
    pairs = _word_pairs(answers, references)
    return mean(_f1(_common_subsequence(a, r), len(a) + len(r)) for a, r in pairs)


def meteor(answers: Units, references: Units) -> float:
    """METEOR (Banerjee and Lavie 2005) with its exact module only: no stems, no synonyms, so no
    downloads; words as in `rouge_n`.

    10 P R / (R + 9 P) (1 - 0.5 (chunks / matches)^3), matches in as long chunks as a greedy choice
    of the longest finds.
    """

    def one(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
        matched, chunks = _align(answer, reference)
        if not matched:
            return 0.0
        p, r = matched / len(answer), matched / len(reference)
        return 10 * p * r / (r + 9 * p) * (1 - 0.5 * (chunks / matched) ** 3)

    return mean(one(a, r) for a, r in _word_pairs(answers, references))


def mean(values: Iterable[float]) -> float:
    """The mean of numbers; nan of none."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def plain(text: str) -> str:
    """The text in Unicode's composed form (NFC), without the white space around it."""
    return unicodedata.normalize("NFC", text.strip())


def extends(character: str) -> bool:
    """Whether a character belongs to the one before it (Unicode annex 29, rule WB4).

    That is a mark, such as an accent or a vowel sign, or a joiner.
    """
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits with their marks, in composed form."""
    text = plain(text.lower())
    if text.isascii():
        return re.findall(r"[a-z0-9]+", text)
    runs = groupby(_with_marks(text), key=lambda character: character[0].isalnum())
    return ["".join(run) for of_word, run in runs if of_word]


def characters(text: str) -> list[str]:
    """The characters of a text in composed form, each with its marks, without white space."""
    return _with_marks("".join(plain(text).split()))


def _with_marks(text: str) -> list[str]:
    found: list[str] = []
    for character in text:
        if found and extends(character):
            found[-1] += character
        else:
            found.append(character)
    return found


# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese: no spaces between words
UNSPACED = re.compile(
    r"[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)


def _units(texts: Units, cut: Callable = str.split) -> list[list[Hashable]]:
    return [cut(text) if isinstance(text, str) else list(text) for text in texts]


def _word_pairs(answers: Units, references: Units) -> Iterable[tuple]:
    return zip(_units(answers, words), _units(references, words), strict=True)


def _f1(common: int, total: int) -> float:
    return 2 * common / max(total, 1)


def _ngrams(units: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def _bleu(orders: Sequence[tuple[int, int]], answered: int, wanted: int) -> float:
    """BLEU of (matches, n-grams) of each order, with the lengths of answers and references.

    A k-th order without a match counts as 1 / (2^k n-grams); orders without n-grams do not count.
    """
    if not any(matches for matches, _ in orders):
        return 0.0
    logs, zeros = [], 0
    for matches, total in orders:
        if total:
            zeros += not matches
            logs.append(math.log(matches / total if matches else 1 / (2**zeros * total)))
    return math.exp(min(0, 1 - wanted / answered) + sum(logs) / len(logs))


def _common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by the bits of one integer (Hyyro 2004)."""
    where: dict[Hashable, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        step = row & where.get(word, 0)
        row = (row + step | row - step) & full
    return len(a) - row.bit_count()


def _align(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[int, int]:
    """Matched words and chunks (runs in the same order) of a one-to-one alignment that takes the
    longest free common run each time.
    """
    where: dict[Hashable, list[int]] = {}
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
