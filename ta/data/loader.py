"""From prepared records to batches: the records of a step, and how micro-batches divide them.

Everything here is a pure function of (data, seed, step), the same on any number of processes.
Letters: B rows, T columns, N sequences, P pairs, n records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray

from ta.command_line import check_config
from ta.data.batch import (
    Batch,
    ClassBatch,
    LabelledBatch,
    PairBatch,
    lay_out,
    part_of,
    with_source,
)
from ta.data.micro import BatchConfig, split_micro, steps_in
from ta.data.prepare import Prepared, lengths, name_of, sequence
from ta.parallel import rank, say, world

# (data, its records, packed) -> a batch
Collate = Callable[[Prepared, ndarray, bool], Any]
# records that are tried for a mismatched answer
TRIES = 1000


def collate_chats(prepared: Prepared, records: Sequence[int], packed: bool) -> Batch:
    """One Batch of the given records, all k sequences of each.

    Where k is 2 and batches are packed, the common prefix of the two sequences is laid out once.
    """
    k = prepared.k
    pairs = [sequence(prepared, int(record) * k + j) for record in records for j in range(k)]
    shared = []
    if packed and k == 2:
        for first, second in zip(pairs[0::2], pairs[1::2], strict=True):
            shared += [0, common_prefix(*first, *second)]
    return lay_out([ids for ids, _ in pairs], [weights for _, weights in pairs], packed, shared)


@dataclass(frozen=True)
class TrainBatches:
    """The batches of a run: `batches.at(step)` gives this process's micro-batches of a step."""

    prepared: Prepared
    steps: int
    # records of a step, over all processes
    batch_size: int
    # tokens of one micro-batch
    max_tokens: int
    seed: int
    packed: bool
    collate: Collate = collate_chats
    # the step with the most tokens, which changes places with the first one
    heaviest: int = 0
    # processes that share a row
    parts: int = 1

    def at(self, step: int) -> list:
        """This process's micro-batches of `step` (from 0); at least one, as on every process."""
        return micro_batches(
            self.prepared,
            self.records(step),
            self.max_tokens,
            self.packed,
            self.collate,
            self.parts,
        )

    def records(self, step: int) -> ndarray:
        """The records of `step`, over all processes."""
        step = {0: self.heaviest, self.heaviest: 0}.get(step, step)
        return records_of_step(len(self.prepared.origin), self.batch_size, self.seed, step)

    def names(self, step: int) -> list[str]:
        """file:line of the records of `step`, for error messages."""
        return [name_of(self.prepared, i) for i in self.records(step)]


def train_batches(
    prepared: Prepared | None,
    config: BatchConfig,
    *,
    packed: bool = True,
    collate: Collate = collate_chats,
    default_batch_size: int = 64,
    parts: int = 1,
) -> TrainBatches:
    """The batches of a run: --batch-size records a step, cut by --max-tokens-per-micro.

    The step of the first pass that has the most tokens comes first, so that memory runs out at
    once or not at all. With `parts`, that many processes share each row (see `row_parts`).
    ValueError where the longest record does not fit into one micro-batch.
    """
    if prepared is None:
        raise ValueError("no data to train on: give prepared records")
    check_config(config)
    check_budget(prepared, config.max_tokens_per_micro, parts)
    batch_size = config.batch_size or default_batch_size
    n = len(prepared.origin)
    steps = config.steps if config.steps is not None else steps_in(n, batch_size, config.epochs)
    return TrainBatches(
        prepared,
        steps,
        batch_size,
        config.max_tokens_per_micro,
        config.seed,
        packed,
        collate,
        heaviest_step(lengths(prepared), batch_size, config.seed, steps),
        parts,
    )


class ReadAhead:
    """The same batches, made one step ahead in a thread: for batches that read files."""

    def __init__(self, batches: TrainBatches):
        self.batches = batches
        self._pool = ThreadPoolExecutor(1)
        # remembers the step that was begun last
        self._begun = lru_cache(maxsize=1)(partial(self._pool.submit, batches.at))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def at(self, step: int) -> list:
        """This process's micro-batches of `step`; those of the next step are begun."""
        ready = self._begun(step)
        if step + 1 < self.batches.steps:
            self._begun(step + 1)
        return ready.result()


def read_ahead(batches: TrainBatches) -> ReadAhead:
    """The batches; a thread makes those of the next step while this one trains."""
    return ReadAhead(batches)


def val_batches(
    prepared: Prepared | None,
    config: BatchConfig,
    *,
    packed: bool = True,
    collate: Collate = collate_chats,
    parts: int = 1,
) -> list:
    """This process's share of all records, as batches; every process gets as many. [] for None.

    A batch holds records of one source, whose name it carries where there are several.
    """
    if prepared is None:
        return []
    limit = config.max_tokens_per_micro
    check_budget(prepared, limit, parts)
    batches = []
    sources = source_rows(prepared) or {"": np.arange(len(prepared.origin))}
    for name, records in sources.items():
        made = micro_batches(prepared, records, limit, packed, collate, parts)
        batches += [with_source(batch, name) for batch in made]
    return batches


def source_rows(prepared: Prepared) -> dict[str, ndarray]:
    """The records of each source by its name; {} where there is one source."""
    origin = prepared.origin[:, 0]
    used = np.unique(origin).tolist()
    if len(used) == 1:
        return {}
    return {prepared.info["sources"][i]["name"]: np.flatnonzero(origin == i) for i in used}


def micro_batches(
    prepared: Prepared,
    records: ndarray,
    max_tokens: int,
    packed: bool,
    collate: Collate,
    parts: int = 1,
) -> list:
    """This process's share of `records`, in batches of at most `max_tokens` tokens each.

    Every process gets the same number of batches. With `parts`, as many processes that follow one
    another hold the parts of the same rows.
    """
    sizes = prepared.offsets[(records + 1) * prepared.k] - prepared.offsets[records * prepared.k]
    by_rank = split_micro(sizes.tolist(), max_tokens * parts, world() // parts, packed)
    group, index = divmod(rank(), parts)
    made = (collate(prepared, records[places], packed) for places in by_rank[group])
    return [part_of(batch, index, parts) for batch in made]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> ndarray:
    """(n,) the seeded order of the records in a pass."""
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.random.Generator(bits).permutation(n)


def records_of_step(n: int, batch_size: int, seed: int, step: int) -> ndarray:
    """The records of optimizer step `step` (from 0), the same on any number of processes."""
    epoch, place = divmod(step, -(-n // batch_size))
    return _order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def heaviest_step(sizes: ndarray, batch_size: int, seed: int, steps: int) -> int:
    """The step with the most tokens in the first pass, among the first `steps`; sizes (n,)."""
    starts = np.arange(0, len(sizes), batch_size)
    totals = np.add.reduceat(sizes[_order(len(sizes), seed, 0)], starts)
    return int(totals[:steps].argmax())


def common_prefix(a, a_weights, b, b_weights) -> int:
    """The number of leading tokens that two sequences share and neither learns.

    Each sequence keeps at least one token of its own.
    """
    limit = min(len(a), len(b)) - 1
    for weights in (a_weights, b_weights):
        if weights.any():
            limit = min(limit, first_learned(weights))
    differ = a[:limit] != b[:limit]
    return int(differ.argmax()) if differ.any() else max(limit, 0)


def check_budget(prepared: Prepared, max_tokens_per_micro: int, parts: int = 1) -> None:
    """ValueError where the longest record does not fit into one micro-batch.

    A micro-batch lies on `parts` processes, each of which holds --max-tokens-per-micro.
    """
    sizes = lengths(prepared)
    longest = int(sizes.argmax())
    if sizes[longest] > max_tokens_per_micro * parts:
        raise ValueError(
            f"{name_of(prepared, longest)} has {sizes[longest]} tokens, more than "
            f"--max-tokens-per-micro {max_tokens_per_micro} fits: "
            "raise that, or give --max-tokens to cut dialogues"
        )


def collate_pairs(prepared: Prepared, records: ndarray, packed: bool) -> PairBatch:
    """Pairs with their margins (0 where a record gives none) and, where known, the reference."""
    margin = torch.from_numpy(prepared.extras["margin"][records])
    batch = PairBatch(collate_chats(prepared, records, packed), margin.nan_to_num().float())
    return with_known_reference(batch, prepared, records)


def with_known_reference(batch: Any, prepared: Prepared, records: ndarray) -> Any:
    """The batch with the reference log-probabilities that the data holds, if it holds them."""
    if prepared.reference is None:
        return batch
    return batch._replace(reference=prepared.reference[records])


def check_margins(prepared: Prepared | None, use: Literal["needed", "used", "unused"]) -> None:
    """Print a note on how the margins in the data are used.

    ValueError where the loss needs a margin in each record and one has none.
    """
    if prepared is None:
        return
    given = prepared.extras["margin"]
    missing = np.flatnonzero(np.isnan(given))
    if use == "needed" and len(missing):
        raise ValueError(
            f"{len(missing)} records have no precomputed_margin, the first of them "
            f"{name_of(prepared, missing[0])}, and this loss is made of margins: "
            "give each record one, or another --loss"
        )
    if len(missing) < len(given) and use != "needed":
        used = "is in the loss, 0 in that of the others"
        fate = used if use == "used" else "has no part in this loss"
        there = f"{len(given) - len(missing):,} of {len(given):,}"
        say(f"note: the precomputed_margin of {there} records {fate}")


def labelled_collate(prepared: Prepared, seed: int) -> Collate:
    """A collate function for labelled answers, each beside an answer to another question.

    `seed` decides which answer follows which context.
    """
    partner, desirable = partners(prepared, seed), prepared.extras["desirable"] > 0

    def collate(prepared: Prepared, records: ndarray, packed: bool) -> LabelledBatch:
        batch = collate_chats(prepared, records, packed)
        others = [partner(i) for i in records.tolist()]
        pairs = zip(records.tolist(), others, strict=True)
        swapped = [mismatch(prepared, i, other) for i, other in pairs]
        mismatched = lay_out([ids for ids, _ in swapped], [w for _, w in swapped], batch.packed)
        matched = torch.tensor([other is not None for other in others], dtype=torch.bool)
        labelled = LabelledBatch(batch, mismatched, matched, torch.from_numpy(desirable[records]))
        return with_known_reference(labelled, prepared, records)

    return collate


def partners(prepared: Prepared, seed: int) -> Callable[[int], int | None]:
    """A function partner(i): the record whose answer follows i's context in KTO's reference point.

    It is the first record after i, in a seeded order of all records, whose context and answer both
    differ from i's and whose answer makes nothing longer than the longest record; None where none
    of the next TRIES records qualifies. A pure function of (data, seed, i).
    """
    n, longest = len(prepared.origin), int(lengths(prepared).max())
    order = _order(n, seed, n)
    place = order.argsort()

    def partner(i: int) -> int | None:
        ids, weights = sequence(prepared, i)
        start = first_learned(weights)
        for step in range(1, min(n, TRIES + 1)):
            j = int(order[(place[i] + step) % n])
            other, other_weights = sequence(prepared, j)
            cut = first_learned(other_weights)
            if start + len(other) - cut > longest:
                continue
            same_answer = np.array_equal(ids[start:], other[cut:])
            if not same_answer and not np.array_equal(ids[:start], other[:cut]):
                return j
        return None

    return partner


def mismatch(prepared: Prepared, i: int, j: int | None) -> tuple[ndarray, ndarray]:
    """Ids and weights of record i's context with record j's answer.

    Where j is None they are those of record i, and nothing is learned.
    """
    ids, weights = sequence(prepared, i)
    if j is None:
        return ids, np.zeros_like(weights)
    other, other_weights = sequence(prepared, j)
    start, cut = first_learned(weights), first_learned(other_weights)
    both = np.concatenate([ids[:start], other[cut:]])
    return both, np.concatenate([weights[:start], other_weights[cut:]])


def first_learned(weights: ndarray) -> int:
    """The index of the first learned token, where the answer starts."""
    return int((weights != 0).argmax())


def collate_classes(prepared: Prepared, records: ndarray, packed: bool) -> ClassBatch:
    """Texts and their classes."""
    labels = torch.from_numpy(prepared.extras["label"][records]).long()
    return ClassBatch(collate_chats(prepared, records, packed), labels)


def labels_of(prepared: Prepared, num_labels: int) -> ndarray:
    """(n,) int64 labels; a note on the screen names absent classes.

    ValueError names the first record whose label is none of `num_labels`.
    """
    labels = prepared.extras["label"].astype("int64")
    (wrong,) = ((labels < 0) | (labels >= num_labels)).nonzero()
    if len(wrong):
        raise ValueError(
            f"{name_of(prepared, wrong[0])} has label {labels[wrong[0]]} of --num-labels "
            f"{num_labels} (0 to {num_labels - 1}), the first of {len(wrong)} such records: "
            "raise --num-labels or mend the labels"
        )
    if absent := sorted(set(range(num_labels)) - set(labels.tolist())):
        where = ", ".join(source["path"] for source in prepared.info["sources"])
        say(f"note: {where} has no record of class {', '.join(map(str, absent))}")
    return labels
