"""Text metrics: hand-worked values, properties over random texts, BLEU, ROUGE and METEOR against other packages where they are installed, and empty or lone answers."""

import math
import re
import sys
import unicodedata
from collections import Counter
from itertools import combinations
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ta.generation.metrics import METRICS, spacing_note
from ta.generation.text_metrics import (
    _align,
    _common_subsequence,
    adjusted_distinct,
    bleu,
    characters,
    distinct,
    diversity,
    length,
    meteor,
    rouge_l,
    rouge_n,
    self_bleu,
    words,
)

word_lists = st.lists(st.sampled_from("abcde"), max_size=9)
texts = word_lists.map(" ".join)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def test_length_and_distinct_by_hand():
    answers = ["a b a", "", "a"]
    assert length(answers) == 4 / 3 and length([[5, 6], [7]]) == 1.5
    assert (
        distinct(answers) == 2 / 4
        and distinct(answers, n=2) == 1.0
        and distinct(answers, n=3) == 1.0
    )  # ab, ba; aba
    assert distinct(answers, n=4) == 0.0  # no answer has four words
    assert distinct(["a b", "a b"], 2) == 0.5  # n-grams do not run across answers
    assert distinct([[1, 2, 1]]) == distinct(["x y x"])


def test_adjusted_distinct_by_hand():
    assert adjusted_distinct(["a b a"], vocab_size=2) == pytest.approx(2 / (2 * (1 - 0.5**3)))
    # 14 different words of 17 in a vocabulary of 50257: the value on the authors' measurement card (huggingface.co/spaces/lsy641/distinct)
    card = [[*range(14), 0, 1, 2]]
    assert distinct(card) == pytest.approx(0.8235294117647058) and adjusted_distinct(
        card, 50257
    ) == pytest.approx(0.8236605104867569, abs=1e-10)
    assert (
        adjusted_distinct([[1, 1, 1]], 1) == 1.0
        and adjusted_distinct([""], 10) == 0.0
        and adjusted_distinct(["a"], 10, n=2) == 0.0
    )
    with pytest.raises(ValueError, match="vocab_size=0"):
        adjusted_distinct(["a"], 0)


def test_adjusted_distinct_has_no_length_bias():
    """Uniform draws of any length have 1 in the mean; plain distinct falls with length."""
    draws = {n: [Random(f"{n}-{i}").choices(range(50), k=n) for i in range(300)] for n in (5, 200)}
    for many in draws.values():
        assert sum(adjusted_distinct([x], 50) for x in many) / 300 == pytest.approx(1, abs=0.02)
    assert distinct(draws[5][:1]) > 0.7 and distinct(draws[200][:1]) < 0.3


def test_diversity_by_hand():
    assert diversity(["a a b b"]) == pytest.approx(math.log(2)) and diversity(
        ["a a a"]
    ) == 0 == diversity([""]) == diversity(["a"])
    assert diversity(["a b c d", "a"]) == pytest.approx(math.log(4) / 2)
    assert diversity([[1, 1, 2]]) == pytest.approx(
        -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    )


def test_bleu_by_hand():
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == 1.0
    # 5/6, 3/5, 1/4 and no 4-gram of 3, which counts as 1/6; as long as the reference
    assert bleu(["the cat sat on a mat"], ["the cat is on a mat"]) == pytest.approx(
        (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    )
    assert bleu(["a b c d"], ["a b c d e f"]) == pytest.approx(math.exp(1 - 6 / 4))  # too short
    assert bleu(["the the the the the"], ["the cat sat on mats"], max_n=1) == pytest.approx(
        1 / 5
    )  # clipped
    assert (
        bleu([""], ["a"]) == 0.0 == bleu(["a"], [""]) == bleu(["a b"], ["a b"])
    )  # too short for 4-grams
    assert bleu([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1.0


def brute_self_bleu(answers):
    """Sentence BLEU of each answer against all the others, by the definition: quadratic."""
    values = []
    for i, answer in enumerate(answers):
        others, logs, zeros, any_match = answers[:i] + answers[i + 1 :], [], 0, False
        for n in range(1, 5):
            mine = Counter(tuple(answer[k : k + n]) for k in range(len(answer) - n + 1))
            best = Counter()
            for other in others:
                best |= Counter(tuple(other[k : k + n]) for k in range(len(other) - n + 1))
            hits, total = (mine & best).total(), mine.total()
            any_match = any_match or hits > 0
            if total:
                zeros += not hits
                logs.append(math.log(hits / total if hits else 1 / (2**zeros * total)))
        closest = min((abs(len(o) - len(answer)), len(o)) for o in others)[1]
        short = min(0, 1 - closest / max(len(answer), 1))
        values.append(math.exp(short + sum(logs) / len(logs)) if any_match else 0.0)
    return sum(values) / len(values)


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=7))
def test_self_bleu_equals_its_definition(answers):
    """The length is that of the closest other answer, of two the shorter; counts are clipped by the others' greatest."""
    assert self_bleu(answers) == pytest.approx(brute_self_bleu(answers), abs=1e-12)


def test_self_bleu_of_many_answers_takes_one_pass():
    """The work is that of counting n-grams: four times the answers, about four times the calls."""
    counts = []
    for n in (50, 200):
        random, calls = Random(0), [0]
        answers = [random.choices(range(300), k=60) for _ in range(n)]
        sys.setprofile(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        try:
            self_bleu(answers)
        finally:
            sys.setprofile(None)
        counts.append(calls[0])
    assert counts[1] < 5 * counts[0]


def test_self_bleu_counts_words_and_has_a_value_for_one_answer():
    assert self_bleu(["alone"]) == 0.0 == self_bleu(["", ""]) and math.isnan(self_bleu([]))
    assert self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(1) == self_bleu(["a", "a"])
    assert self_bleu(["listen now", "silent won"]) == 0.0  # the same letters, not a word in common
    # either of its words alone in the other: 1/2, then 1/(2 * 1) for the bigram, no longer order fits
    assert self_bleu(["a b", "a c"]) == pytest.approx(0.5)


def test_bleu_agrees_with_sacrebleu():
    sacrebleu, random = pytest.importorskip("sacrebleu"), Random(0)
    for _ in range(200):
        answers = [
            " ".join(random.choices("abcdef", k=random.randrange(12)))
            for _ in range(random.randint(1, 4))
        ]
        references = [" ".join(random.choices("abcdef", k=random.randint(1, 12))) for _ in answers]
        theirs = sacrebleu.corpus_bleu(answers, [references], tokenize="none").score / 100
        assert bleu(answers, references) == pytest.approx(theirs, abs=1e-12)
        if len(answers) > 1:
            others = [
                sacrebleu.sentence_bleu(a, answers[:i] + answers[i + 1 :], tokenize="none").score
                for i, a in enumerate(answers)
            ]
            assert self_bleu(answers) == pytest.approx(sum(others) / len(others) / 100, abs=1e-12)


NASTY = [
    "a",
    "The",
    "the",
    "b.",
    "don't",
    "x_y",
    "3.14",
    "...",
    "\u2028",
    "caf\u00e9",
    "\u6771\u4eac",
]


def test_rouge_and_meteor_agree_with_other_packages():
    """rouge_score with our words (ASCII texts: with its own); nltk's METEOR nearly always, as both align words by a greedy choice of their own."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    nltk = pytest.importorskip("nltk.translate.meteor_score")
    kinds, random = ["rouge1", "rouge2", "rougeL"], Random(0)
    ours = rouge_scorer.RougeScorer(kinds, tokenizer=SimpleNamespace(tokenize=words))
    own = rouge_scorer.RougeScorer(kinds)
    nothing = SimpleNamespace(stem=str, synsets=lambda word: [])
    tried = equal = 0
    for i in range(400):
        of = NASTY[:8] if i % 2 else NASTY
        a, r = (" ".join(random.choices(of, k=random.randrange(12))) for _ in range(2))
        theirs = (own if i % 2 else ours).score(r, a)
        found = rouge_n([a], [r]), rouge_n([a], [r], 2), rouge_l([a], [r])
        assert found == pytest.approx([theirs[kind].fmeasure for kind in kinds])
        if words(a) and words(r):
            theirs = nltk.single_meteor_score(words(r), words(a), str, nothing, nothing)
            tried += 1
            equal += meteor([a], [r]) == pytest.approx(theirs)
    assert tried > 300 and equal > 0.8 * tried


def test_rouge_by_hand():
    assert rouge_n(["the cat sat"], ["The cat, sat down!"]) == pytest.approx(2 * 3 / (3 + 4))
    assert rouge_n(["the cat sat"], ["the sat cat"], n=2) == 0.0 and rouge_n(
        ["a a a"], ["a"]
    ) == pytest.approx(2 / 4)
    assert rouge_l(["a b c d"], ["a c d b"]) == pytest.approx(2 * 3 / 8)
    assert rouge_l(["police killed the gunman"], ["police kill the gunman"]) == pytest.approx(
        0.75
    )  # the example of Lin 2004
    for metric in (rouge_n, rouge_l, meteor):
        assert metric([""], [""]) == metric([""], ["a"]) == metric(["a"], [""]) == 0.0
        assert math.isnan(metric([], []))
        with pytest.raises(ValueError):
            metric(["a"], ["a", "b"])


MARKED = [  # (answer, reference, rouge_1, rouge_l)
    ("\u0915\u093e", "\u0915\u0940", 0, 0),  # Hindi ka and ki differ by a vowel sign alone
    (
        "\u0643\u064e\u062a\u064e\u0628\u064e",
        "\u0643\u064f\u062a\u0650\u0628\u064e",
        0,
        0,
    ),  # Arabic kataba, kutiba
    ("caf\u00e9s", "cafe\u0301s", 1, 1),  # one word, composed and decomposed
    ("\u0130zmir", "I\u0307zmir", 1, 1),
    ("e\u0301a b", "\u00e9a", 2 / 3, 2 / 3),
    (
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd!",
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
        1,
        1,
    ),  # Hebrew with points
    (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        1,
        1,
    ),
]


@pytest.mark.parametrize(("answer", "reference", "unigrams", "subsequence"), MARKED)
def test_marks_belong_to_the_letter_before_them(answer, reference, unigrams, subsequence):
    assert rouge_n([answer], [reference]) == pytest.approx(unigrams)
    assert rouge_l([answer], [reference]) == pytest.approx(subsequence)
    assert (meteor([answer], [reference]) > 0) == (unigrams > 0)
    assert len(words(answer)) == len(answer.split())


@settings(max_examples=50)
@given(st.text(max_size=8), st.text(max_size=8))
def test_spelling_in_unicode_changes_no_score(answer, reference):
    """NFC and NFD are one text; words hold letters and digits with their marks, and no more."""
    other = unicodedata.normalize("NFD", answer)
    for metric in (rouge_n, rouge_l, meteor):
        assert metric([answer], [reference]) == metric([other], [reference])
    assert characters(answer) == characters(other)
    for word in words(answer):
        assert word[0].isalnum() and not any(c.isspace() for c in word)
    plain = "".join(c for c in answer.lower() if c.isascii())
    assert words(plain) == re.findall("[a-z0-9]+", plain)


def test_scripts_without_spaces_are_measured_by_characters():
    chinese, thai = "\u6211\u5728\u5317\u4eac", "\u0e44\u0e1b\u0e01\u0e34\u0e19"
    assert rouge_n([chinese], [chinese[:3]]) == 0.0  # one word each
    assert METRICS["rouge_1_characters"].function([chinese], [chinese[:3]]) == pytest.approx(6 / 7)
    assert characters(thai) == [
        "\u0e44",
        "\u0e1b",
        "\u0e01\u0e34",
        "\u0e19",
    ]  # the vowel sign stays
    assert METRICS["length_characters"].function(["a b\n c"]) == 3
    note = spacing_note(["rouge_l", "accuracy"], [chinese, "a b", thai])
    assert "2 of 3 texts" in note and note.endswith("give rouge_l_characters")
    assert (
        spacing_note(["rouge_l"], ["\u00e9t\u00e9"]) == "" == spacing_note(["accuracy"], [chinese])
    )


def test_meteor_by_hand():
    assert meteor(["The cat sat on the mat."], ["the cat sat on the mat"]) == pytest.approx(
        1 - 0.5 / 6**3
    )
    assert meteor(["on the mat sat the cat"], ["the cat sat on the mat"]) == pytest.approx(
        1 - 0.5 * (3 / 6) ** 3
    )
    p, r = 6 / 7, 1.0  # the example of the English Wikipedia: one word inserted, two chunks
    assert meteor(["the cat was sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(
        10 * p * r / (r + 9 * p) * (1 - 0.5 * (2 / 6) ** 3)
    )
    assert (
        meteor(["a"], ["a"]) == 0.5 and meteor(["running"], ["run"]) == 0.0
    )  # one chunk of one word; no stems
    assert meteor(["a b", "c"], ["a b", "d"]) == pytest.approx((1 - 0.5 / 8) / 2)


def test_alignment_keeps_what_a_longer_run_leaves_of_a_shorter():
    assert _align([*"abcxcdef"], [*"abcdef"]) == (6, 2)  # cdef, then ab of abc
    assert _align([*"abcdxcde"], [*"abcde"]) == (5, 2)  # abcd, then e of cde
    assert _align([*"abcdexbcdefg"], [*"abcdefg"]) == (7, 2)  # bcdefg, then a of abcde


@given(word_lists, word_lists)
def test_alignment_matches_every_common_word_in_few_chunks(a, b):
    matched, chunks = _align(a, b)
    assert matched == (Counter(a) & Counter(b)).total() and (chunks == 0) == (matched == 0)
    assert chunks <= matched and _align(a, a)[1] == min(1, len(a))
    longest = max(
        (
            n
            for n in range(len(a) + 1)
            for i in range(len(a) - n + 1)
            if any(a[i : i + n] == b[j : j + n] for j in range(len(b)))
        ),
        default=0,
    )
    assert matched <= longest * chunks and chunks <= matched - max(
        longest - 1, 0
    )  # the longest common run is one of its chunks


@given(word_lists, word_lists)
def test_common_subsequence_equals_brute_force(a, b):
    subsequences = {tuple(c) for n in range(len(b) + 1) for c in combinations(b, n)}
    longest = max(
        n for n in range(len(a) + 1) if any(c in subsequences for c in combinations(a, n))
    )
    assert _common_subsequence(a, b) == longest == _common_subsequence(b, a)


@given(pairs)
def test_every_overlap_lies_in_0_to_1_and_is_highest_for_the_reference_itself(texts):
    answers, references = map(list, zip(*texts, strict=True))
    for metric in (bleu, rouge_n, rouge_l, meteor):
        best = (
            1 if metric is bleu else metric(references, references)
        )  # BLEU of a text of three words with itself is 0
        assert 0 <= metric(answers, references) <= best + 1e-12
    assert 0 <= self_bleu(answers) <= 1 + 1e-12 and 0 <= distinct(answers) <= 1
    assert (
        rouge_n(answers, references) >= rouge_l(answers, references) - 1e-12
    )  # a subsequence is a part of the bag
