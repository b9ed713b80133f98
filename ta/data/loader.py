"""From a prepared set to batches: which records a step takes, how they are cut into micro-batches, and what a method adds to each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from ta.data.prepare import lengths, sequence
from ta.parallel import rank, world

if TYPE_CHECKING:
    import numpy as np

    from ta.data.batch import Batch
    from ta.data.prepare import Prepared

Dress = Callable[["Batch", "np.ndarray"], Any]  # (batch, its records) -> the method's own batch


class Feed(NamedTuple):
    """Where training gets its batches: pure functions of the step."""

    steps: int
    batches: Callable[[int], list]  # step -> this process's micro-batches, at least one
    records: Callable[[int], list[str]] = (
        lambda step: []
    )  # step -> names of its records (file:line), for error messages


def _plain(batch: Batch, records: np.ndarray) -> Any:
    return batch


def training_feed(
    prepared: Prepared,
    *,
    batch_size: int,
    max_tokens_per_micro: int,
    seed: int,
    steps: int | None,
    epochs: float,
    packed: bool = True,
    dress: Dress = _plain,
) -> Feed:
    """The Feed of a prepared set: `batch_size` records a step over all processes, cut by the token budget; the same on any number of processes.

    The step of the first pass that has the most tokens comes first, so that memory runs out at once or not at all.
    """
    from ta.data.batch import heaviest_step, records_of_step, steps_in

    check_budget(prepared, max_tokens_per_micro)
    n = len(prepared.origin)
    for name, value in (
        ("batch-size", batch_size),
        ("steps", 1 if steps is None else steps),
        ("epochs", epochs),
    ):
        if value <= 0:
            raise ValueError(f"--{name} {value}: must be above 0")
    steps = steps if steps is not None else steps_in(n, batch_size, epochs)
    heaviest = heaviest_step(lengths(prepared), batch_size, seed, steps)

    def chosen(step: int) -> np.ndarray:
        return records_of_step(n, batch_size, seed, {0: heaviest, heaviest: 0}.get(step, step))

    def batches(step: int) -> list:
        return micro_batches(prepared, chosen(step), max_tokens_per_micro, packed, dress)

    def records(step: int) -> list[str]:
        return [name_of(prepared, i) for i in chosen(step)]

    return Feed(steps, batches, records)


def read_ahead(feed: Feed) -> Feed:
    """The same Feed for batches that read files: after each one the next is made in a thread, while this one is trained on."""
    pool, coming = ThreadPoolExecutor(1), {}

    def batches(step: int) -> list:
        ready = coming.get(step) or pool.submit(feed.batches, step)
        coming.clear()
        if step + 1 < feed.steps:
            coming[step + 1] = pool.submit(feed.batches, step + 1)
        return ready.result()

    return feed._replace(batches=batches)


def evaluation_batches(
    prepared: Prepared,
    *,
    max_tokens_per_micro: int,
    packed: bool = True,
    dress: Dress = _plain,
    limit: int | None = None,
) -> list:
    """This process's share of the first `limit` records, as batches; every process gets the same number."""
    import numpy as np

    check_budget(prepared, max_tokens_per_micro)
    n = len(prepared.origin) if limit is None else min(limit, len(prepared.origin))
    return micro_batches(prepared, np.arange(n), max_tokens_per_micro, packed, dress)


def micro_batches(
    prepared: Prepared, records: np.ndarray, max_tokens: int, packed: bool, dress: Dress
) -> list:
    """This process's share of `records`, cut into batches of at most `max_tokens` tokens; every process gets the same number."""
    from ta.data.batch import split_micro

    sizes = prepared.offsets[(records + 1) * prepared.k] - prepared.offsets[records * prepared.k]
    mine = split_micro(sizes.tolist(), max_tokens, world(), packed)[rank()]
    return [
        dress(lay_records(prepared, records[places], packed), records[places]) for places in mine
    ]


def lay_records(prepared: Prepared, records: Sequence[int], packed: bool) -> Batch:
    """One Batch of the given records, all k sequences of each; where k is 2 and packing allows it, what the two share is laid down once."""
    from ta.data.batch import lay_out

    k = prepared.k
    pairs = [sequence(prepared, int(record) * k + j) for record in records for j in range(k)]
    shared = []
    if packed and k == 2:
        for (a, wa), (b, wb) in zip(pairs[0::2], pairs[1::2], strict=True):
            shared += [0, common_prefix(a, wa, b, wb)]
    return lay_out([ids for ids, _ in pairs], [weights for _, weights in pairs], packed, shared)


def common_prefix(a, weights_a, b, weights_b) -> int:
    """Leading tokens two sequences share and neither learns, leaving each at least one token."""
    import numpy as np

    limit = min(len(a), len(b)) - 1
    limit = min([limit, *(int(np.argmax(w != 0)) for w in (weights_a, weights_b) if w.any())])
    differ = np.flatnonzero(a[:limit] != b[:limit])
    return int(differ[0]) if len(differ) else max(limit, 0)


def media_of(prepared: Prepared, record: int) -> list[tuple[str, str]]:
    """(modality, path) of a record's pictures and sounds, in the order of its placeholders."""
    if prepared.media is None:
        return []
    text, ends = prepared.media
    return [
        tuple(pair)
        for pair in json.loads(text[ends[record - 1] if record else 0 : ends[record]].tobytes())
    ]


def name_of(prepared: Prepared, record: int) -> str:
    """file:line of a record."""
    source, line = prepared.origin[record]
    return f"{prepared.info['sources'][source]['path']}:{line}"


def check_budget(prepared: Prepared, max_tokens_per_micro: int) -> None:
    """ValueError where the longest record does not fit into one micro-batch."""
    sizes = lengths(prepared)
    longest = int(sizes.argmax())
    if sizes[longest] > max_tokens_per_micro:
        raise ValueError(
            f"{name_of(prepared, longest)} has {sizes[longest]} tokens, more than --max-tokens-per-micro {max_tokens_per_micro} fits: "
            "raise that, or give --max-tokens to cut dialogues"
        )
