"""How the records of a step are divided into micro-batches, and the settings that say so."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ta.command_line import SEED, Range
from ta.parallel import world


@dataclass(frozen=True)
class BatchConfig:
    steps: Annotated[int | None, Range(1)] = None
    """Optimizer steps; without it --epochs decides."""
    epochs: Annotated[float, Range(0, above=True)] = 1.0
    """Passes over the data, where --steps is not given."""
    batch_size: Annotated[int | None, Range(1)] = None
    """Records per optimizer step, over all devices together. Default: 64; 32 for grpo,
    distill and rag, fewer where the built-in model is trained."""
    max_tokens_per_micro: Annotated[int, Range(1)] = 8192
    """Tokens in one forward pass on one device: the memory knob. It changes no result but
    the draws of dropout."""
    seed: Annotated[int, SEED] = 0
    """Seed of data order, choices among records, new weights and dropout."""

    def check(self) -> None:
        """ValueError where --epochs is given and --steps decides."""
        if self.steps is not None and self.epochs != 1.0:
            raise ValueError(
                f"--epochs {self.epochs:g} has no effect beside --steps {self.steps}: leave one out"
            )


@dataclass(frozen=True)
class ContextConfig:
    """For sequences that do not fit on one device."""

    context_parallel: Annotated[int, Range(1)] = 1
    """Processes that share each row: each holds its part of the columns, and in attention its part
    of the heads (Ulysses). A micro-batch has this many times --max-tokens-per-micro."""


def row_parts(config: ContextConfig, model) -> int:
    """The number of processes that share each row of the model's batches.

    ValueError where the processes, the heads or the layout of batches cannot be divided so.
    """
    n = config.context_parallel
    if n == 1:
        return 1
    if world() % n:
        raise ValueError(
            f"--context-parallel {n} needs a multiple of {n} processes and there are {world()}: "
            f"start it by torchrun --nproc-per-node {n}"
        )
    if not model.packed:
        raise ValueError(
            f"--context-parallel {n} divides packed rows, which this model or adapter does not "
            "take: leave it out"
        )
    if model.heads % n:
        raise ValueError(
            f"--context-parallel {n} does not divide the model's {model.heads} attention heads: "
            "give a number that does"
        )
    return n


def steps_in(n: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over n records; a pass may end with a smaller batch."""
    return max(1, round(epochs * -(-n // batch_size)))


def split_micro(
    lengths: Sequence[int], max_tokens: int, world: int = 1, packed: bool = True
) -> list[list[list[int]]]:
    """Cut one step's sequences into micro-batches of at most `max_tokens` tokens.

    result[rank][micro] lists indices into `lengths`. Every rank gets the same number of
    micro-batches (some may be empty) and about the same number of tokens; padding counts when not
    packed. ValueError for a sequence that is longer than `max_tokens`.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise ValueError(
            f"a sequence of {longest} tokens cannot fit into --max-tokens-per-micro {max_tokens}: "
            "raise it or lower --max-tokens"
        )
    bins = (_pack if packed else group_padded)(lengths, max_tokens, world)
    return [bins[rank::world] for rank in range(world)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _pack(lengths: Sequence[int], max_tokens: int, world: int) -> list[list[int]]:
    """Each into the emptiest bin, with one more bin a rank until all fit.

    The fullest bin comes first.
    """
    longest_first = _longest_first(lengths)
    count = max(1, -(-sum(lengths) // (max_tokens * world))) * world
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        heap = [(0, b) for b in range(count)]
        for i in longest_first:
            load, b = heap[0]
            if load + lengths[i] > max_tokens:
                break
            heapq.heapreplace(heap, (load + lengths[i], b))
            bins[b].append(i)
        else:
            fullest_first = sorted(heap, key=lambda pair: (-pair[0], pair[1]))
            return [sorted(bins[b]) for _, b in fullest_first]
        count += world


def group_padded(lengths: Sequence[int], max_tokens: int, world: int = 1) -> list[list[int]]:
    """Sequences of similar length share a padded micro-batch of rows x longest <= max_tokens.

    Empty ones make their number a multiple of `world`, and one at least.
    """
    bins: list[list[int]] = []
    for i in _longest_first(lengths):
        if bins and (len(bins[-1]) + 1) * lengths[bins[-1][0]] <= max_tokens:
            bins[-1].append(i)
        else:
            bins.append([i])
    empty = -len(bins) % world if bins else world
    return bins + [[] for _ in range(empty)]
