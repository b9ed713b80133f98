"""The batches of methods that judge answers: pairs, labelled answers with mismatched ones, classes; and how each is dressed from a prepared set.

Letters: N sequences, P pairs, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ta.data.batch import Batch, lay_out, to_device
from ta.data.loader import Dress, micro_batches, name_of
from ta.data.prepare import Prepared, lengths, sequence
from ta.parallel import gather_objects, say

if TYPE_CHECKING:
    from ta.model.language_model import LanguageModel

    Logps = Callable[[Batch], Tensor]  # -> (N,)

TRIES = 1000  # records looked at for a mismatched answer


class PairBatch(NamedTuple):
    """Pairs of answers: sequence 2p is the chosen answer of pair p after its context, 2p + 1 the rejected one."""

    seqs: Batch  # N = 2P
    margin: Tensor  # (P,) float32, 0 where the record gives none
    ref: Tensor = torch.zeros(0, 2)  # (P, 2) log-probabilities of both answers by the reference
    kl: Tensor = torch.zeros(
        2
    )  # reference points of chosen and rejected answers over the global batch

    def both(self, logps: Logps) -> Tensor:
        """(P, 2) log-probabilities of chosen and rejected."""
        return logps(self.seqs).view(-1, 2)


class LabelledBatch(NamedTuple):
    """Answers called desirable or not, and after each one's context the answer to another question."""

    seqs: Batch  # N
    mismatched: Batch  # N; without a learned token where no other answer was found
    matched: Tensor  # (N,) bool: another answer was found
    desirable: Tensor  # (N,) bool
    ref: Tensor = torch.zeros(
        0, 2
    )  # (N, 2) log-probabilities of the answer and of the mismatched one by the reference
    kl: Tensor = torch.zeros(())  # reference point over the global batch
    share: Tensor = torch.zeros(())  # of desirable answers in the global batch

    def both(self, logps: Logps) -> Tensor:
        """(N, 2) log-probabilities of the answer and of the mismatched one."""
        return torch.stack([logps(self.seqs), logps(self.mismatched)], 1)


class ClassBatch(NamedTuple):
    """Texts and their classes."""

    seqs: Batch  # N
    labels: Tensor  # (N,) int64


def pairs(prepared: Prepared, margins: Literal["needed", "used", "unused"] = "used") -> Dress:
    """PairBatches of a prepared set of pairs, and a line on what becomes of margins in the data; ValueError names the first record whose margin is
    missing where each needs one."""
    given = prepared.extras["margin"]
    missing = np.flatnonzero(np.isnan(given))
    if margins == "needed" and len(missing):
        raise ValueError(
            f"{name_of(prepared, missing[0])} has no precomputed_margin, nor have {len(missing) - 1} other records, and this loss is made of "
            "margins: give each record one, or another --loss"
        )
    if len(missing) < len(given) and margins != "needed":
        fate = (
            "is in the loss, 0 in that of the others"
            if margins == "used"
            else "has no part in this loss"
        )
        say(
            f"note: the precomputed_margin of {len(given) - len(missing):,} of {len(given):,} records {fate}"
        )
    return lambda batch, records: PairBatch(
        batch, torch.from_numpy(np.nan_to_num(given[records]).astype(np.float32))
    )


def labelled(prepared: Prepared, seed: int) -> Dress:
    """LabelledBatches of a prepared set of labelled answers; `seed` decides whose answers are put where they do not belong."""
    partner, desirable = partners(prepared, seed), prepared.extras["desirable"] > 0

    def dress(batch: Batch, records: np.ndarray) -> LabelledBatch:
        others = [partner(int(record)) for record in records]
        laid = [
            mismatch(prepared, int(record), other)
            for record, other in zip(records, others, strict=True)
        ]
        mismatched = lay_out(
            [ids for ids, _ in laid], [weights for _, weights in laid], batch.packed
        )
        matched = torch.tensor([other is not None for other in others], dtype=torch.bool)
        return LabelledBatch(batch, mismatched, matched, torch.from_numpy(desirable[records]))

    return dress


def partners(prepared: Prepared, seed: int) -> Callable[[int], int | None]:
    """partner(i): the record whose answer stands after i's context to estimate KTO's reference point, a pure function of (set, seed, i).

    It is the first after i in a seeded order of all records whose context and answer both differ from i's and whose answer makes nothing longer than
    the longest record; None where none of the next TRIES is such.
    """
    n, longest = len(prepared.origin), int(lengths(prepared).max())
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, n]))).permutation(n)
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)

    def partner(i: int) -> int | None:
        """The record whose answer stands in for that of record i, or None where none fits."""
        ids, weights = sequence(prepared, i)
        start = first_learned(weights)
        for step in range(1, min(n, TRIES + 1)):
            j = int(order[(place[i] + step) % n])
            other, other_weights = sequence(prepared, j)
            cut = first_learned(other_weights)
            if start + len(other) - cut > longest:
                continue
            if not np.array_equal(ids[start:], other[cut:]) and not np.array_equal(
                ids[:start], other[:cut]
            ):
                return j
        return None

    return partner


def mismatch(prepared: Prepared, i: int, j: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of record i's context with record j's answer; without j, of record i with nothing learned."""
    ids, weights = sequence(prepared, i)
    if j is None:
        return ids, np.zeros_like(weights)
    other, other_weights = sequence(prepared, j)
    start, cut = first_learned(weights), first_learned(other_weights)
    return np.concatenate([ids[:start], other[cut:]]), np.concatenate(
        [weights[:start], other_weights[cut:]]
    )


def first_learned(weights: np.ndarray) -> int:
    """Where the answer starts."""
    return int(np.argmax(weights != 0))


def classes(prepared: Prepared, num_labels: int) -> Dress:
    """ClassBatches of a prepared set of classes; ValueError names the first record whose label is none of `num_labels`, absent classes are told."""
    labels = labels_of(prepared, num_labels)
    if absent := sorted(set(range(num_labels)) - set(labels.tolist())):
        where = ", ".join(source["path"] for source in prepared.info["sources"])
        say(f"note: {where} has no record of class {', '.join(map(str, absent))}")
    return lambda batch, records: ClassBatch(batch, torch.from_numpy(labels[records]))


def labels_of(prepared: Prepared, num_labels: int) -> np.ndarray:
    """(n,) int64 labels; ValueError names the first record whose label is none of `num_labels`."""
    labels = prepared.extras["label"].astype(np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_labels))
    if len(wrong):
        raise ValueError(
            f"{name_of(prepared, wrong[0])} has label {labels[wrong[0]]} of --num-labels {num_labels} (0 to {num_labels - 1}), as have "
            f"{len(wrong) - 1} other records: raise --num-labels or mend the labels"
        )
    return labels


def scores_of(model: LanguageModel, prepared: Prepared, n: int, max_tokens: int) -> Tensor:
    """(n, k, C) scores of each sequence of the first n records, on the CPU of every process; all processes take part."""
    device, was_training = next(model.parameters()).device, model.training
    records = np.arange(min(n, len(prepared.origin)))
    batches = micro_batches(
        prepared,
        records,
        max_tokens,
        model.mode == "packed",
        lambda batch, chosen: (to_device(batch, device), chosen),
    )
    model.eval()
    with torch.no_grad():
        mine = [
            (chosen, model.scores(batch).unflatten(0, (-1, prepared.k)).cpu())
            for batch, chosen in batches
        ]
    model.train(was_training)
    shares = [part for share in gather_objects(mine) for part in share]
    order = np.argsort(np.concatenate([chosen for chosen, _ in shares]))
    return torch.cat([scores for _, scores in shares])[order]
