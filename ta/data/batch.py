"""The tensors of one micro-batch: how sequences are laid out, and what each method adds to them.

Letters: B rows, T columns, N sequences, M learned targets, P pairs, C documents of a cut row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from numpy.typing import ArrayLike
from torch import Tensor

# On a GPU a row has a multiple of COLUMNS columns and of DOCUMENTS documents, so that kernels meet
# few shapes. Empty documents at the end change nothing.
COLUMNS = 128
DOCUMENTS = 64


class Cuts(NamedTuple):
    """How a packed row is cut, in the form of one kernel for all documents; made once a batch.

    The row is wider than its documents; the remaining columns are one more document. Where prompts
    are shared, `seen` gives for each key its column in the row: the keys of a document are those of
    its prefix, then its own.
    """

    # of the row
    columns: int
    # (C + 1,) int32, where the queries of each document begin and end
    queries: Tensor
    # (C + 1,) int32, the same of keys
    keys: Tensor
    # a power of two that no document exceeds in queries
    longest: int
    # the same of keys
    longest_keys: int
    # (K,) int64, the column of each key
    seen: Tensor | None = None


class Batch(NamedTuple):
    """The input of one forward pass. `learned[m]` is the position that predicts `targets[m]`.

    Targets are shifted here, once. A row holds either one sequence (padded on the right) or,
    packed, all of them one after another with positions that start at 0 again. A position may
    predict two targets: where two answers share their prompt, its last position predicts the first
    token of both.
    """

    # (B, T) int64
    tokens: Tensor
    # (B, T) int64, start at 0 in every sequence
    positions: Tensor
    # (M,) int64, index into the B*T positions
    learned: Tensor
    # (M,) int64
    targets: Tensor
    # (M,) float32, nonzero
    weights: Tensor
    # (M,) int64, the sequence of a target
    owners: Tensor
    # (N,) int64, index of the last real position of each sequence
    ends: Tensor
    # tokens that each sequence has in the row, on the host: attention cuts the row there
    lengths: tuple[int, ...]
    # leading tokens of an earlier sequence that a sequence also sees
    prefixes: tuple[int, ...] = ()
    # lengths and prefixes of a packed row on a GPU
    cuts: Cuts | None = None
    # name of the source of its records, where held-out records have several
    source: str = ""
    # which part of the row's columns this process holds, and of how many; `lengths` are the row's
    part: tuple[int, int] = (0, 1)

    @property
    def packed(self) -> bool:
        """Whether sequences stand one after another in one row."""
        return len(self.tokens) == 1


def lay_out(
    ids: Sequence[ArrayLike],
    weights: Sequence[ArrayLike],
    packed: bool = True,
    shared: Sequence[int] = (),
) -> Batch:
    """One Batch of N token sequences: one packed row, or N right-padded rows.

    `ids[i]` and `weights[i]` are (T_i,), lists or arrays; tokens of weight 0 are not learned.
    `shared[i]` is the number of leading tokens that sequence i has in common with the last sequence
    before it that shares nothing: they stand in the row once, there, and both see them (packed
    only). Without a sequence the batch is one token that nothing learns, so that every process runs
    the same number of passes. ValueError for ids and weights that are not as many, no whole numbers
    from 0 and no finite numbers, and for `shared` where rows are padded.
    """
    if not len(ids):
        zero = torch.zeros(1, 1, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        return Batch(zero, zero.clone(), none, none, torch.zeros(0), none, none, ())
    flat, flat_weights = np.concatenate(ids), np.concatenate(weights)
    whole = flat.astype(np.int64)
    full = np.fromiter(map(len, ids), np.int64, len(ids))
    if [*map(len, weights)] != full.tolist() or flat.ndim > 1 or flat_weights.ndim > 1:
        raise ValueError("ids and weights differ in shape: give each sequence a weight for each id")
    if (whole != flat).any() or (whole < 0).any() or not np.isfinite(flat_weights).all():
        raise ValueError("give ids that are whole numbers from 0, and weights that are finite")
    if any(shared) and not (packed and len(shared) == len(ids)):
        raise ValueError("give `shared` for packed rows alone, one number for each sequence")
    skip = np.asarray(shared if any(shared) else [0] * len(ids), np.int64)
    sizes = full - skip
    starts = _starts(sizes) if packed else np.arange(len(ids)) * sizes.max()
    column, place = _places(full, skip, starts)
    owner = np.repeat(np.arange(len(ids)), full)
    shape = (1, sizes.sum()) if packed else (len(ids), sizes.max())
    tokens = np.zeros(shape, np.int64)
    positions = np.zeros_like(tokens)
    tokens.ravel()[place] = whole
    positions.ravel()[place] = column
    # a target is predicted at the token before it
    hit = np.flatnonzero((flat_weights != 0) & (column > 0))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        torch.from_numpy(place[hit - 1]),
        torch.from_numpy(whole[hit]),
        torch.from_numpy(flat_weights[hit].astype(np.float32)),
        torch.from_numpy(owner[hit]),
        torch.from_numpy(starts + sizes - 1),
        tuple(sizes.tolist()),
        tuple(shared) if any(shared) else (),
    )


def _starts(lengths: ndarray) -> ndarray:
    """(N,) where each of sequences that follow one another begins."""
    return np.cumsum(lengths) - lengths


def _places(lengths: ndarray, prefixes: ndarray, starts: ndarray) -> tuple[ndarray, ndarray]:
    """Of every token of all sequences its place in its sequence, and its place in the row.

    The first `prefixes[i]` tokens of a sequence stand in the row where the sequence does that it
    shares them with, the others from `starts[i]` on.
    """
    column = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
    shared = column < np.repeat(prefixes, lengths)
    begins = (starts[leads(prefixes)], starts - prefixes)
    at_prefix, at_own = (np.repeat(begin, lengths) for begin in begins)
    return column, column + np.where(shared, at_prefix, at_own)


def part_of(batch: Batch, index: int, parts: int) -> Batch:
    """Part `index` of a packed row that is cut into `parts` of as many columns, with its targets.

    Attention puts the row together again. The row is filled up to a multiple of COLUMNS a part.
    """
    if parts == 1:
        return batch
    assert batch.packed and not batch.prefixes
    wide = batch.tokens.shape[1]
    columns = -(-wide // (COLUMNS * parts)) * COLUMNS
    first = index * columns
    own = (batch.learned >= first) & (batch.learned < first + columns)
    tokens, positions = (
        F.pad(x, (0, columns * parts - wide))[:, first : first + columns]
        for x in (batch.tokens, batch.positions)
    )
    return batch._replace(
        tokens=tokens,
        positions=positions,
        learned=batch.learned[own] - first,
        targets=batch.targets[own],
        weights=batch.weights[own],
        owners=batch.owners[own],
        part=(index, parts),
    )


def sequences_of(batch: Batch) -> list[list[int]]:
    """The token ids of each sequence of a batch, with the prefix that it shares."""
    if not batch.packed:
        rows = zip(batch.tokens.tolist(), batch.lengths, strict=True)
        return [row[:length] for row, length in rows]
    row, sizes = batch.tokens[0].tolist(), np.asarray(batch.lengths)
    prefixes = np.asarray(batch.prefixes or (0,) * len(sizes))
    starts = _starts(sizes)
    places = zip(starts, sizes, starts[leads(prefixes)], prefixes, strict=True)
    return [row[lead : lead + prefix] + row[at : at + n] for at, n, lead, prefix in places]


def leads(prefixes) -> ndarray:
    """(N,) for each document the one that holds its prefix.

    That is the last document without a prefix, up to the document itself.
    """
    prefixes = np.asarray(prefixes)
    return np.maximum.accumulate(np.where(prefixes == 0, np.arange(len(prefixes)), 0))


def cuts_of(lengths: tuple[int, ...], prefixes: tuple[int, ...] = (), parts: int = 1) -> Cuts:
    """The Cuts of a row of these documents in so many `parts` (see `part_of`), on the host.

    Without a document the row holds one token.
    """
    queries = np.asarray(lengths or (1,), np.int64)
    prefix = np.asarray(prefixes or (0,) * len(queries), np.int64)
    keys = queries + prefix
    rest = rest_keys = -queries.sum() % (COLUMNS * parts)
    if prefixes:
        # the keys of the rest must have a query that sees them
        rest = rest or COLUMNS
        rest_keys = -keys.sum() % COLUMNS
        rest_keys += COLUMNS * -(-max(0, rest - rest_keys) // COLUMNS)
    queries, keys = np.append(queries, rest), np.append(keys, rest_keys)
    columns, seen = int(queries.sum()), None
    if prefixes:
        _, places = _places(keys, np.append(prefix, 0), _starts(queries))
        seen = torch.from_numpy(np.minimum(places, columns - 1))
    bounds = [torch.from_numpy(_bounds(x)) for x in (queries, keys)]
    return Cuts(columns, *bounds, _power_of_two(queries), _power_of_two(keys), seen)


def _power_of_two(lengths: ndarray) -> int:
    """The least power of two, from 256 on, that is at least the greatest length."""
    return 1 << max(8, int(lengths.max() - 1).bit_length())


def _bounds(lengths: ndarray) -> ndarray:
    """(C + 1,) int32 cumulative lengths; empty documents fill C up to a multiple of DOCUMENTS."""
    out = np.full(-(-len(lengths) // DOCUMENTS) * DOCUMENTS + 1, lengths.sum(), np.int32)
    out[0], out[1 : len(lengths) + 1] = 0, np.cumsum(lengths)
    return out


class PairBatch(NamedTuple):
    """Pairs of answers after their contexts.

    Sequence 2p is the chosen answer of pair p, sequence 2p + 1 the rejected one.
    """

    # N = 2P
    sequences: Batch
    # (P,) float32, 0 where the record gives none
    margin: Tensor
    # (P, 2) log-probabilities of both answers by the reference
    reference: Tensor = torch.zeros(0, 2)
    # (2,) reference points of chosen and rejected answers over the global batch
    kl: Tensor = torch.zeros(2)

    def both(self, logps: Callable[[Batch], Tensor]) -> Tensor:
        """(P, 2) values of chosen and rejected answers.

        `logps` is a function from a Batch to (N,) values.
        """
        return logps(self.sequences).view(-1, 2)


class LabelledBatch(NamedTuple):
    """Answers with labels, and each context with the answer to another question (KTO)."""

    # N
    sequences: Batch
    # N; without a learned token where no other answer was found
    mismatched: Batch
    # (N,) bool: another answer was found
    matched: Tensor
    # (N,) bool
    desirable: Tensor
    # (N, 2) log-probabilities by the reference: of the answer and of the mismatched one
    reference: Tensor = torch.zeros(0, 2)
    # () reference point over the global batch
    kl: Tensor = torch.zeros(())

    def both(self, logps: Callable[[Batch], Tensor]) -> Tensor:
        """(N, 2) values of the answer and of the mismatched one.

        `logps` is a function from a Batch to (N,) values.
        """
        return torch.stack([logps(self.sequences), logps(self.mismatched)], 1)


class ClassBatch(NamedTuple):
    """Texts and their classes."""

    sequences: Batch  # N
    labels: Tensor  # (N,) int64


def batch_of(batch):
    """The Batch inside a method's own batch: the first field that leads to one."""
    return batch if hasattr(batch, "learned") else batch_of(batch[0])


def with_source(batch, name: str):
    """The same batch, whose records are of the source `name`."""
    if hasattr(batch, "learned"):
        return batch._replace(source=name)
    return batch._replace(**{batch._fields[0]: with_source(batch[0], name)})


def to_device(batch, device):
    """The same nested NamedTuples with every tensor on `device`.

    Tensors for an accelerator are copied from pinned memory and without waiting. A packed Batch
    gets its `cuts` there.
    """
    gpu = torch.device(device).type == "cuda"
    if isinstance(batch, Tensor):
        pinned = gpu and batch.device.type == "cpu"
        return (batch.pin_memory() if pinned else batch).to(device, non_blocking=True)
    if gpu and isinstance(batch, Batch) and batch.packed and batch.cuts is None:
        batch = batch._replace(cuts=cuts_of(batch.lengths, batch.prefixes, batch.part[1]))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    return batch
