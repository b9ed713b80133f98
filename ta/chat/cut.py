"""Which messages of a dialogue stay when it is longer than the model may read."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    asked = [i for i in range(first, stop) if roles[i] not in (ANSWER, SYSTEM)]
    if end_in_answer and not asked:
        return []
    room = math.inf if max_tokens is None else max_tokens - fixed - sum(lengths[:first])
    begin = first
    if keep_end:
        total, begin = 0, stop
        for i in range(stop - 1, first - 1, -1):
            total += lengths[i]
            if total > room:
                break
            whole = i == first or roles[i] != ANSWER
            if whole and (not end_in_answer or i <= asked[-1]):
                begin = i
    else:
        total, fits = 0, first
        for i in range(first, stop):
            total += lengths[i]
            if total > room:
                break
            if not end_in_answer or (roles[i] == ANSWER and i > asked[0]):
                fits = i + 1
        stop = fits
    return [*range(first), *range(begin, stop)] if begin < stop else []
