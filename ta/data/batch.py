"""Which sequences meet in which forward pass, and how they are laid out: the plan of an epoch and the tensors of one micro-batch.

Letters: B rows, T columns, N sequences, M learned targets, P pairs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ta.model.attention import Cuts, cuts_of, leads


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


def steps_in(n: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over n records; a pass ends with a smaller batch where they do not divide."""
    return max(1, round(epochs * -(-n // batch_size)))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(
        n
    )


def records_of_step(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The records of optimizer step `step` (from 0): a pure function of (n, batch_size, seed, step), the same on any number of devices."""
    epoch, place = divmod(step, -(-n // batch_size))
    return _order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def heaviest_step(sizes: np.ndarray, batch_size: int, seed: int, steps: int) -> int:
    """The step of the first pass, and of the first `steps`, whose records have the most tokens in all; sizes (n,) are theirs."""
    totals = np.add.reduceat(
        sizes[_order(len(sizes), seed, 0)], np.arange(0, len(sizes), batch_size)
    )
    return int(totals[:steps].argmax())


def split_micro(
    lengths: Sequence[int], max_tokens: int, world: int = 1, packed: bool = True
) -> list[list[list[int]]]:
    """Cut one step's sequences into micro-batches of at most `max_tokens` tokens: result[rank][micro] lists places in `lengths`.

    Every rank gets the same number of micro-batches (some may be empty) and about the same number of tokens; padding counts when not packed.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ValueError(
            f"a sequence of {longest} tokens cannot fit into --max-tokens-per-micro {max_tokens}: raise it or lower --max-tokens"
        )
    bins = _pack(lengths, max_tokens, world) if packed else _group(lengths, max_tokens, world)
    return [bins[rank::world] for rank in range(world)]


def _pack(lengths: Sequence[int], max_tokens: int, world: int) -> list[list[int]]:
    """Longest first into the emptiest bin; one more bin a rank until all fit. The fullest bin comes first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rounds = max(1, -(-sum(lengths) // (max_tokens * world)))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * world)]
        heap = [(0, b) for b in range(len(bins))]
        for i in order:
            load, b = heap[0]
            if load + lengths[i] > max_tokens:
                break
            heapq.heapreplace(heap, (load + lengths[i], b))
            bins[b].append(i)
        else:
            return [sorted(bins[b]) for _, b in sorted(heap, key=lambda pair: (-pair[0], pair[1]))]
        rounds += 1


def _group(lengths: Sequence[int], max_tokens: int, world: int) -> list[list[int]]:
    """Neighbours in length share a padded micro-batch of rows x longest <= max_tokens; empty ones fill the last round."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= max_tokens:
            bins[-1].append(i)
        else:
            bins.append([i])
    return bins + [[] for _ in range(-len(bins) % world or (world if not bins else 0))]
