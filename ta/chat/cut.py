"""Which messages of a dialogue stay when it is longer than the model may read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from ta.chat.messages import ANSWER, SYSTEM


def cut_dialogue(
    roles: Sequence[str],
    lengths: Sequence[int],
    max_tokens: int | None,
    keep_end: bool = False,
    end_in_answer: bool = True,
    fixed: int = 0,
) -> list[int]:
    """Indexes of the messages that stay: whole ones, in order, as many as fit.

    `lengths` are the tokens of each message and `fixed` those that come on top; what stays has at
    most `max_tokens` in all (None: no limit). Leading system messages stay and are counted. Of the
    others the first stay, or with `keep_end` the last. With `end_in_answer` they end in an answer
    and hold a question before it. Where earlier messages went, the first one left is no answer.
    The list is empty where nothing of use would stay. ValueError for lengths that cannot be.
    """
    if len(roles) != len(lengths) or any(length < 0 for length in lengths):
        raise ValueError(f"roles {roles}, lengths {lengths}: give each role a length from 0")
    first = next((i for i, role in enumerate(roles) if role != SYSTEM), len(roles))
    stop = len(roles)
    while end_in_answer and stop > first and roles[stop - 1] != ANSWER:
        stop -= 1
    ends = [0, *accumulate(lengths)]
    room = math.inf if max_tokens is None else max_tokens - fixed - ends[first]

    def of_use(begin: int, end: int) -> bool:
        stay = roles[begin:end]
        if begin > first and stay[0] == ANSWER:
            return False
        answers = stay[-1] == ANSWER and not {*stay} <= {ANSWER, SYSTEM}
        return answers or not end_in_answer

    # the longest first
    spans = ((first, end) for end in range(stop, first, -1))
    if keep_end:
        spans = ((begin, stop) for begin in range(first, stop))
    for begin, end in spans:
        if ends[end] - ends[begin] <= room and of_use(begin, end):
            return [*range(first), *range(begin, end)]
    return []
