"""Which of a record's candidate answers to keep: some at random, the best by reward, or those that
rejection sampling accepts.

Each function returns indexes of candidates, none twice, in the order in which they were chosen;
asked for more than there are, it returns all of them. The same seed gives the same choice; give
every record a seed of its own, such as f"{seed}-{record_id}".
"""

import math
from collections.abc import Sequence
from random import Random


def choose_random(count: int, n: int, *, seed: int | str) -> list[int]:
    """`n` of `count` candidates, every choice and every order being equally likely."""
    return Random(seed).sample(range(count), _within(n, count))


def choose_best(rewards: Sequence[float], n: int) -> list[int]:
    """The `n` candidates of highest reward, the highest first.

    Of equal rewards the earlier candidate.
    """
    _check(rewards)
    order = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    return order[: _within(n, len(rewards))]


def choose_rejection(
    rewards: Sequence[float], n: int, *, seed: int | str, beta: float = 0.5
) -> list[int]:
    """Statistical rejection sampling, algorithm 1 of arXiv 2309.06657 (RSO), whose beta is 0.5.

    In passes over the pool each candidate is accepted with probability exp((reward - r_max) /
    beta), r_max being the highest reward that was in the pool when the pass began. The accepted
    leave the pool; it ends with the n-th. The best one left is accepted in every pass, so it always
    ends. A pass goes through the pool in a random order, so that the place in the file is worth
    nothing. beta towards 0 is `choose_best`, a large beta is `choose_random`.
    """
    if not beta > 0:
        raise ValueError(
            f"beta={beta} is a temperature; give a number above 0, or take the best of n"
        )
    _check(rewards)
    n, random = _within(n, len(rewards)), Random(seed)
    pool, accepted = list(range(len(rewards))), []
    while len(accepted) < n:
        r_max = max(rewards[i] for i in pool)
        random.shuffle(pool)
        taken = [i for i in pool if random.random() < math.exp((rewards[i] - r_max) / beta)]
        accepted += taken
        pool = sorted(set(pool) - set(taken))
    return accepted[:n]


def _within(n: int, count: int) -> int:
    if n < 0:
        raise ValueError(f"{n} answers cannot be chosen; give 0 or more")
    return min(n, count)


def _check(rewards: Sequence[float]) -> None:
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(
                f"reward {i} is {reward}, which has no place in an order; give finite rewards"
            )
