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
    prefixes: tuple[int, ...] = ()  # tokens at the start of the sequence before that a sequence also sees (shared prompts); empty: none

    @property
    def packed(self) -> bool:
        """Whether sequences stand one after another in one row."""
        return len(self.tokens) == 1


def lay_out(ids: Sequence[np.ndarray], weights: Sequence[np.ndarray], packed: bool = True, shared: Sequence[int] = ()) -> Batch:
    """Lay N token sequences into one Batch: one packed row, or N right-padded rows.

    `shared[i]` says how many leading tokens sequence i has in common with sequence i - 1: they are laid down once (packed only) and seen by both.
    No sequence at all gives one lone token that nothing learns, so that every process runs the same number of passes.
    """
    if not ids:
        zero = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), zero, zero, torch.zeros(0), zero, zero, ())
    shared = tuple(shared) if shared else (0,) * len(ids)
    lengths = tuple(len(x) - s for x, s in zip(ids, shared, strict=True))
    width = sum(lengths) if packed else max(lengths)
    tokens = np.zeros((1 if packed else len(ids), width), np.int64)
    positions = np.zeros_like(tokens)
    learned, targets, target_weights, owners, ends = [], [], [], [], []
    start = 0
    for n, (x, w, skip) in enumerate(zip(ids, weights, shared, strict=True)):
        here = start if packed else n * width
        row, column = (0, start) if packed else (n, 0)
        tokens[row, column : column + lengths[n]] = x[skip:]
        positions[row, column : column + lengths[n]] = np.arange(skip, len(x))
        hit = np.flatnonzero(w[1:])  # token hit + 1 is a target, predicted at hit
        place = np.where(hit < skip, start - lengths[n - 1] + hit, here + hit - skip) if skip else here + hit
        learned.append(place)
        targets.append(np.asarray(x)[hit + 1])
        target_weights.append(np.asarray(w)[hit + 1])
        owners.append(np.full(len(hit), n))
        ends.append(here + lengths[n] - 1)
        start += lengths[n]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        *(torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (learned, targets)),
        torch.from_numpy(np.concatenate(target_weights).astype(np.float32)),
        torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        torch.tensor(ends),
        lengths,
        shared if any(shared) else (),
    )


def batch_of(batch):
    """The Batch inside a method's own batch (the first field that leads to one)."""
    return batch if hasattr(batch, "learned") else batch_of(batch[0])


def to_device(batch, device):
    """The same nest of NamedTuples with every tensor on `device` (copied without waiting where memory is pinned)."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(part, device) for part in batch))
    return batch


def steps_in(n: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over n records; a pass ends with a smaller batch where they do not divide."""
    return max(1, round(epochs * -(-n // batch_size)))


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(n)


def records_of_step(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The records of optimizer step `step` (from 0): a pure function of (n, batch_size, seed, step), the same on any number of devices."""
    epoch, place = divmod(step, -(-n // batch_size))
    return _order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def heaviest_step(sizes: np.ndarray, batch_size: int, seed: int, steps: int) -> int:
    """The step of the first pass, and of the first `steps`, whose records have the most tokens in all; sizes (n,) are theirs."""
    totals = np.add.reduceat(sizes[_order(len(sizes), seed, 0)], np.arange(0, len(sizes), batch_size))
    return int(totals[:steps].argmax())


def split_micro(lengths: Sequence[int], max_tokens: int, world: int = 1, packed: bool = True) -> list[list[list[int]]]:
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
