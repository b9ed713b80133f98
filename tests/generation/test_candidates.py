"""Sampling of candidates: by hand, the acceptance probabilities of RSO as frequencies, and what may never happen."""

import math
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ta.generation.candidates import choose_best, choose_random, choose_rejection

rewards_lists = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0]), max_size=12)


def frequencies(draw, runs):
    return {
        outcome: count / runs
        for outcome, count in Counter(tuple(draw(seed)) for seed in range(runs)).items()
    }


def near(measured, expected, runs):
    """Each frequency within 4.5 standard deviations of its probability."""
    assert set(measured) <= set(expected)
    for outcome, p in expected.items():
        assert abs(measured.get(outcome, 0) - p) < 4.5 * math.sqrt(p * (1 - p) / runs) + 1e-12, (
            outcome,
            p,
        )


def rso_probability(order, rewards, beta):
    """Of accepting exactly `order`, candidates one by one: enumerate the passes of the published algorithm over every pool and every order."""

    def from_pool(pool, rest):
        if not rest:
            return 1.0
        r_max, total, orders = max(rewards[i] for i in pool), 0.0, list(permutations(pool))
        for one in orders:
            total += in_pass(one, 0, rest, r_max, frozenset(pool))
        return total / len(orders)

    def in_pass(one, place, rest, r_max, pool):
        if not rest:
            return 1.0
        if place == len(one):
            return from_pool(tuple(sorted(pool)), rest)
        i = one[place]
        p = math.exp((rewards[i] - r_max) / beta)
        total = (1 - p) * in_pass(one, place + 1, rest, r_max, pool) if p < 1 else 0.0
        return total + (
            p * in_pass(one, place + 1, rest[1:], r_max, pool - {i}) if i == rest[0] else 0.0
        )

    return from_pool(tuple(range(len(rewards))), order)


def test_one_pass_accepts_with_the_published_probability():
    """Two candidates: with p = exp((r - r_max) / beta), the worse one comes first when it stands first (1/2) and is accepted (p)."""
    runs, p = 20000, math.exp(-1 / 0.5)
    measured = frequencies(lambda seed: choose_rejection([3.0, 2.0], 1, seed=seed), runs)
    near(measured, {(1,): p / 2, (0,): 1 - p / 2}, runs)


def test_frequencies_equal_the_algorithm_enumerated():
    rewards, beta, runs = [0.0, 0.7, 1.0, -0.4], 0.8, 8000
    for n in (1, 2, 3):
        expected = {
            order: rso_probability(order, rewards, beta) for order in permutations(range(4), n)
        }
        assert math.isclose(sum(expected.values()), 1)
        near(
            frequencies(lambda seed, n=n: choose_rejection(rewards, n, seed=seed, beta=beta), runs),
            expected,
            runs,
        )
    wrong = {
        order: rso_probability(order, rewards, 2 * beta) for order in permutations(range(4), 1)
    }
    with pytest.raises(AssertionError):  # the comparison can fail
        near(
            frequencies(lambda seed: choose_rejection(rewards, 1, seed=seed, beta=beta), runs),
            wrong,
            runs,
        )


def test_random_is_uniform():
    runs = 8000
    near(
        frequencies(lambda seed: choose_random(4, 2, seed=seed), runs),
        dict.fromkeys(permutations(range(4), 2), 1 / 12),
        runs,
    )


def test_temperature_limits():
    rewards = [1.0, 5.0, 3.0, 4.0]
    assert choose_best(rewards, 3) == [1, 3, 2] and choose_best([2.0, 2.0, 1.0], 2) == [0, 1]
    assert all(
        choose_rejection(rewards, 3, seed=seed, beta=1e-9) == [1, 3, 2] for seed in range(20)
    )
    runs = 8000
    near(
        frequencies(lambda seed: choose_rejection(rewards, 1, seed=seed, beta=1e9), runs),
        {(i,): 0.25 for i in range(4)},
        runs,
    )


@given(rewards_lists, st.integers(0, 15), st.integers(), st.floats(1e-3, 1e3))
def test_n_different_candidates_whenever_they_exist(rewards, n, seed, beta):
    picks = {
        "random": choose_random(len(rewards), n, seed=seed),
        "best": choose_best(rewards, n),
        "rejection": choose_rejection(rewards, n, seed=seed, beta=beta),
    }
    for chosen in picks.values():
        assert len(chosen) == len(set(chosen)) == min(n, len(rewards)) and set(chosen) <= set(
            range(len(rewards))
        )
    assert picks["rejection"] == choose_rejection(
        rewards, n, seed=seed, beta=beta
    )  # the seed decides
    assert all(
        rewards[i] >= rewards[j]
        for i in picks["best"]
        for j in set(range(len(rewards))) - set(picks["best"])
    )
    longer = choose_rejection(rewards, n + 1, seed=seed, beta=beta)
    assert (
        longer[: len(picks["rejection"])] == picks["rejection"]
    )  # what was accepted stays accepted
    shifted = [
        r + 64.0 for r in map(float, map(round, rewards))
    ]  # only differences of rewards matter
    assert choose_rejection(shifted, n, seed=seed, beta=beta) == choose_rejection(
        [r - 64.0 for r in shifted], n, seed=seed, beta=beta
    )


def test_seeds_differ_and_the_global_generator_is_untouched():
    import random

    state = random.getstate()
    draws = {tuple(choose_rejection([0.0] * 6, 3, seed=f"7-{record}")) for record in range(30)}
    draws |= {tuple(choose_random(6, 3, seed=f"7-{record}")) for record in range(30)}
    assert len(draws) > 20 and random.getstate() == state


@pytest.mark.parametrize(
    "call",
    [
        lambda: choose_rejection([1.0], 1, seed=0, beta=0.0),
        lambda: choose_rejection([1.0], 1, seed=0, beta=math.nan),
    ],
)
def test_refuses_a_temperature_of_nothing(call):
    with pytest.raises(ValueError, match="above 0"):
        call()


def test_refuses_other_nonsense():
    for bad in (math.nan, math.inf, -math.inf):
        for call in (lambda r: choose_best(r, 1), lambda r: choose_rejection(r, 1, seed=0)):
            with pytest.raises(ValueError, match="reward 1 is"):
                call([0.0, bad])
    for call in (
        lambda: choose_random(3, -1, seed=0),
        lambda: choose_best([1.0], -1),
        lambda: choose_rejection([1.0], -1, seed=0),
    ):
        with pytest.raises(ValueError, match="0 or more"):
            call()
