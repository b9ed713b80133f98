"""The tensors of one micro-batch: how sequences are laid out, and what each method adds to them.

Letters: B rows, T columns, N sequences, M learned targets, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLUMNS = 128  # a row's columns on a GPU are a multiple of this: kernels meet few shapes
DOCUMENTS = 64  # and the number of its documents of this: empty ones at the end change nothing


class Cuts(NamedTuple):
    """How a packed row is cut, as one kernel for all documents takes it; made once a batch.

    The row is wider than its documents: what is over is one more document. Where prompts are
    shared, `seen` names for each key its column in the row: a document's keys are those of its
    prefix, then its own.
    """

    columns: int  # of the row
    queries: Tensor  # (C + 1,) int32, where documents begin and end
    keys: Tensor  # (C + 1,) int32, the same among keys
    longest: int  # at least the greatest number of queries of a document, a power of two
    longest_keys: int
    seen: Tensor | None = None  # (K,) int64


class Batch(NamedTuple):
    """What one forward pass eats. Targets are shifted here, once: `learned[m]` is the position that predicts `targets[m]`.

    A row holds either one sequence (padded on the right) or, packed, all of them one after another with restarting positions. A position may predict
    two targets: where two answers share their prompt, its last position predicts the first token of both.
    """

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, restart with every sequence
    learned: Tensor  # (M,) int64, index into the B*T positions
    targets: Tensor  # (M,) int64
    weights: Tensor  # (M,) float32, nonzero
    owners: Tensor  # (M,) int64, the sequence a target belongs to
    ends: Tensor  # (N,) int64, index of the last real position of each sequence
    lengths: tuple[int, ...]  # tokens laid down by each sequence, on the host: attention cuts here
    prefixes: tuple[int, ...] = ()  # tokens of an earlier sequence's start that one also sees
    cuts: Cuts | None = None  # lengths and prefixes of a packed row, once it is on a GPU

    @property
    def packed(self) -> bool:
        """Whether sequences stand one after another in one row."""
        return len(self.tokens) == 1


def lay_out(
    ids: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    packed: bool = True,
    shared: Sequence[int] = (),
) -> Batch:
    """Lay N token sequences into one Batch: one packed row, or N right-padded rows.

    `shared[i]` says how many leading tokens sequence i has in common with the last one before it
    that shares nothing: they are laid down once, there, and seen by both (packed only).
    No sequence at all gives one lone token that nothing learns, so that every process runs the same number of passes.
    """
    if not ids:
        zero = torch.zeros(0, dtype=torch.int64)
        return Batch(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.int64),
            zero,
            zero,
            torch.zeros(0),
            zero,
            zero,
            (),
        )
    flat, flat_weights = np.concatenate(ids), np.concatenate(weights)
    full = np.fromiter(map(len, ids), np.int64, len(ids))
    starts = np.cumsum(full) - full
    owner = np.repeat(np.arange(len(ids)), full)  # of every given token
    place = np.arange(len(flat))  # among the B*T positions, where all are laid down in one row
    column = place - starts[owner]  # and in its sequence
    if packed and not any(shared):
        laid, home, shared = full, starts, ()
        tokens, positions = flat.astype(np.int64)[None], column[None]
    else:
        skip = np.asarray(shared if len(shared) else [0] * len(ids), np.int64)
        laid = full - skip
        home = (
            np.cumsum(laid) - laid if packed else np.arange(len(ids)) * laid.max()
        )  # where each sequence begins
        here = column >= skip[owner]
        place = np.where(
            here, home[owner] + column - skip[owner], home[leads(skip)[owner]] + column
        )
        tokens = np.zeros((1, laid.sum()) if packed else (len(ids), laid.max()), np.int64)
        positions = np.zeros_like(tokens)
        tokens.flat[place[here]], positions.flat[place[here]] = flat[here], column[here]
    hit = np.flatnonzero((flat_weights != 0) & (column > 0))  # predicted one token earlier
    return Batch(
        *(
            torch.from_numpy(x)
            for x in (tokens, positions, place[hit - 1], flat[hit].astype(np.int64))
        ),
        torch.from_numpy(flat_weights[hit].astype(np.float32)),
        torch.from_numpy(owner[hit]),
        torch.from_numpy(home + laid - 1),
        tuple(laid.tolist()),
        tuple(shared) if any(shared) else (),
    )


def leads(prefixes) -> np.ndarray:
    """For each document the one that holds its prefix: the last one, up to itself, without a prefix."""
    prefixes = np.asarray(prefixes)
    return np.maximum.accumulate(np.where(prefixes == 0, np.arange(len(prefixes)), 0))


def cuts_of(lengths: tuple[int, ...], prefixes: tuple[int, ...] = ()) -> Cuts:
    """The Cuts of a row of these documents, on the host; without a document the row holds one lone token."""
    own = np.asarray(lengths or (1,), np.int64)
    before = np.asarray(prefixes or (0,) * len(own), np.int64)
    rest = -own.sum() % COLUMNS
    if prefixes:
        rest = rest or COLUMNS  # what is over among keys must have a query that sees it
        padded = -(own + before).sum() % COLUMNS
        padded += COLUMNS * -(-max(0, rest - padded) // COLUMNS)
    else:
        padded = rest
    own, whole = np.append(own, rest), np.append(own + before, padded)
    bounds = [torch.from_numpy(_bounds(x)) for x in (own, whole)]
    longest, longest_keys = (1 << max(8, int(x.max() - 1).bit_length()) for x in (own, whole))
    if not prefixes:
        return Cuts(int(own.sum()), *bounds, longest, longest_keys)
    starts = np.cumsum(own) - own
    home = starts[np.append(leads(before), len(before))]  # where each document's prefix begins
    lead = np.append(before, 0)
    column = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
    owner = np.repeat(np.arange(len(whole)), whole)
    seen = np.where(
        column < lead[owner], home[owner] + column, starts[owner] + column - lead[owner]
    )
    return Cuts(
        int(own.sum()),
        *bounds,
        longest,
        longest_keys,
        torch.from_numpy(np.minimum(seen, own.sum() - 1)),
    )


def _bounds(lengths: np.ndarray) -> np.ndarray:
    out = np.full(-(-len(lengths) // DOCUMENTS) * DOCUMENTS + 1, lengths.sum(), np.int32)
    out[0], out[1 : len(lengths) + 1] = 0, np.cumsum(lengths)
    return out


class PairBatch(NamedTuple):
    """Pairs of answers: sequence 2p is the chosen answer of pair p after its context, 2p + 1 the rejected one."""

    sequences: Batch  # N = 2P
    margin: Tensor  # (P,) float32, 0 where the record gives none
    reference: Tensor = torch.zeros(
        0, 2
    )  # (P, 2) log-probabilities of both answers by the reference
    kl: Tensor = torch.zeros(
        2
    )  # reference points of chosen and rejected answers, over the global batch

    def both(self, logps: Callable[[Batch], Tensor]) -> Tensor:
        """(P, 2) values of chosen and rejected answers, given a function to (N,) values."""
        return logps(self.sequences).view(-1, 2)


class LabelledBatch(NamedTuple):
    """Answers called desirable or not, and after each one's context the answer to another question."""

    sequences: Batch  # N
    mismatched: Batch  # N; without a learned token where no other answer was found
    matched: Tensor  # (N,) bool: another answer was found
    desirable: Tensor  # (N,) bool
    reference: Tensor = torch.zeros(
        0, 2
    )  # (N, 2) by the reference: of the answer, of the mismatched one
    kl: Tensor = torch.zeros(())  # reference point, over the global batch
    desirable_share: Tensor = torch.zeros(())  # of the global batch

    def both(self, logps: Callable[[Batch], Tensor]) -> Tensor:
        """(N, 2) values of the answer and of the mismatched one."""
        return torch.stack([logps(self.sequences), logps(self.mismatched)], 1)


class ClassBatch(NamedTuple):
    """Texts and their classes."""

    sequences: Batch  # N
    labels: Tensor  # (N,) int64


def batch_of(batch):
    """The Batch inside a method's own batch (the first field that leads to one)."""
    return batch if hasattr(batch, "learned") else batch_of(batch[0])


def to_device(batch, device):
    """The same nest of NamedTuples with every tensor on `device`; an accelerator's copies are pinned and not waited for."""
    if isinstance(batch, Tensor):
        pinned = (
            batch.pin_memory()
            if torch.device(device).type == "cuda" and batch.device.type == "cpu"
            else batch
        )
        return pinned.to(device, non_blocking=True)
    new = isinstance(batch, Batch) and batch.packed and batch.cuts is None
    if new and torch.device(device).type == "cuda":
        batch = batch._replace(cuts=cuts_of(batch.lengths, batch.prefixes))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    return batch
