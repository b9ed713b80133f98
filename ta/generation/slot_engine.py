"""A generation engine in plain torch: a fixed number of slots over a model's public forward, where
a finished row is replaced by the next prompt.

A new prompt is prefilled straight into the columns left of the buffer's common end, a decode step
writes one column for every row, and a finished row is overwritten by the last one: nothing is
copied but that row. A plain step computes the live rows and the columns they need. A step of fixed
shapes, which a GPU can replay as a graph, rounds both up, finds all that changes in tensors that
stay where they are, and its tokens are read one step late.
Letters: B rows (live slots), T columns, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ta.generation.graphs import Graphs
from ta.generation.slot_cache import CacheWindow, SlotLayer
from ta.parallel import say

PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill: bounds its activations
EFFICIENT = 1024  # from here on a prefill gains less from being larger than it loses to padding
NARROWEST = 128  # columns of the narrowest step of fixed shapes
AGREEMENT = 0.05  # of the spread of a row's logits: what arithmetic in 16 bits may differ by


class Job(NamedTuple):
    prompt: int  # which prompt
    limit: int  # new tokens at most
    seed: tuple[int, ...]  # of its sampling, which nothing else takes part in


class Sampling(NamedTuple):
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


class Caller(NamedTuple):
    """What the engine asks of its caller."""

    forward: Callable[
        [dict], Tensor
    ]  # the model's keyword arguments -> logits (B, V) of the last column
    advance: Callable[
        [int, list[int]], bool
    ]  # after each token: (job, ids so far) -> whether the answer has ended
    finished: Callable[
        [int, list[int], list[float]], None
    ]  # (job, ids, log-probabilities), as each ends


@dataclass
class Row:
    """One live slot: the job it works on and what it has written so far."""

    job: int
    length: int  # tokens in the cache
    uniforms: Sequence[
        float
    ]  # one number in [0, 1) for each new token; empty where decoding is greedy
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    asked: int = 0  # tokens computed, of which `ids` lacks those not read yet
    ended: bool = False


class Unread(NamedTuple):
    """Tokens that are on their way from the device."""

    rows: list[Row]
    ids: Tensor
    logprobs: Tensor
    arrived: torch.cuda.Event | None


def run_slots(
    caller: Caller,
    layers: int,
    prompts: Sequence[Sequence[int]],
    jobs: Sequence[Job],
    sampling: Sampling,
    slots: int = 64,
    embeds: Sequence[Tensor] | None = None,
    vocabulary: int = 0,
    device: torch.device | str = "cpu",
    fixed_shapes: bool = False,
) -> None:
    """Run all `jobs`, at most `slots` at a time.

    layers: how many layers hold a cache. embeds[i] (L, D) is fed in place of prompt i, whose tokens
    only a repetition penalty then looks at.
    vocabulary: V, read where a repetition penalty is on.
    fixed_shapes: steps of few different shapes, replayed as CUDA graphs on a GPU; said and given up
    where the model cannot.
    """
    device = torch.device(device)
    lengths = [len(x) for x in (prompts if embeds is None else embeds)]
    waiting = sorted(
        range(len(jobs)), key=lambda j: lengths[jobs[j].prompt]
    )  # taken from the end: longest prompts first
    if not waiting:
        return
    slots = min(slots, len(jobs))
    longest = lengths[jobs[waiting[-1]].prompt]
    capacity = longest + min(longest // 2 + 64, max(job.limit for job in jobs))
    window = CacheWindow(slots, bucket(capacity) if fixed_shapes else capacity, longest)
    cache = Cache(layers=[SlotLayer(window) for _ in range(layers)])
    seen = (
        torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        if sampling.repetition_penalty != 1
        else None
    )
    tokens = torch.zeros(slots, dtype=torch.long, device=device)
    engine = SlotEngine(
        caller,
        prompts,
        lengths,
        jobs,
        sampling,
        embeds,
        device,
        window,
        cache,
        seen,
        waiting,
        tokens,
    )
    if fixed_shapes:
        engine.fix_shapes()
    # a prefill costs about a whole step, and many replayed ones: wait until some slots are free
    some = max(1, slots // (4 if fixed_shapes and device.type == "cuda" else 8))
    with torch.no_grad():
        try:
            while engine.rows or engine.waiting or engine.unread:
                while engine.waiting and slots - len(engine.rows) >= (some if engine.rows else 1):
                    engine.prefill()
                if engine.rows:
                    engine.step()
                else:
                    engine.read(0)
        finally:
            engine.leave_shapes()


@dataclass
class SlotEngine:
    caller: Caller
    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]  # of each prompt, in columns
    jobs: Sequence[Job]
    sampling: Sampling
    embeds: Sequence[Tensor] | None
    device: torch.device
    window: CacheWindow
    cache: Cache
    seen: Tensor | None  # (slots, V): tokens of each row so far
    waiting: list[int]  # jobs, the next at the end
    tokens: Tensor  # (slots,): the last token of each row
    rows: list[Row] = field(default_factory=list)
    unread: deque[Unread] = field(default_factory=deque)
    # of steps of fixed shapes
    fixed: Graphs | None = None
    places: Tensor | None = None  # (1 + slots,): the column to write, then each row's length
    draws: Tensor | None = None  # (slots,): random numbers in [0, 1)
    checked: bool = False

    def fix_shapes(self) -> None:
        """Take steps of fixed shapes from now on."""
        slots = self.window.slots
        self.places = torch.zeros(1 + slots, dtype=torch.long, device=self.device)
        self.draws = torch.zeros(slots, device=self.device)
        self.fixed = Graphs(self._fixed, self.device)

    def leave_shapes(self) -> None:
        """Take plain steps from now on.

        The graphs, which hold the buffers in a circle, go at once.
        """
        if self.fixed:
            self.fixed.forget()
        self.fixed = None

    def next_length(self) -> int:
        """Tokens of the next waiting prompt, which is the longest that still waits."""
        return self.lengths[self.jobs[self.waiting[-1]].prompt] if self.waiting else 0

    def prefill(self) -> None:
        """Admit as many waiting jobs as fit, each prompt computed once however many answers it
        gets.
        """
        window, first, width = self.window, len(self.rows), self.next_length()
        group: dict[int, list[int]] = {}  # prompt -> its jobs
        taken = 0
        while self.waiting and first + taken < window.slots:
            prompt = self.jobs[self.waiting[-1]].prompt
            padded = (len(group) + 1) * width
            if (
                group
                and prompt not in group
                and (
                    padded > PREFILL_TOKENS
                    or (padded > EFFICIENT and self.lengths[prompt] < 0.85 * width)
                )
            ):
                break
            group.setdefault(prompt, []).append(self.waiting.pop())
            taken += 1
        window.rows, window.past = slice(first, first + len(group)), 0
        inputs = left_pad(
            [(self.prompts if self.embeds is None else self.embeds)[i] for i in group], self.device
        )
        logits = self.caller.forward(
            inputs | {"past_key_values": self.cache}
        )  # (prompts of the group, V)
        if taken > len(group):
            which = self._sent([n for n, members in enumerate(group.values()) for _ in members])
            logits = logits[which]
            for layer in self.cache.layers:
                layer.copy(first + which, slice(first, first + taken), width)
        for i, members in group.items():
            for job in members:
                if self.seen is not None:
                    self.seen[len(self.rows)] = False
                    self.seen[len(self.rows), self._sent(self.prompts[i])] = True
                self.rows.append(Row(job, self.lengths[i], uniforms(self.jobs[job], self.sampling)))
        seen = None if self.seen is None else self.seen[first : len(self.rows)]
        self._append(first, *choose(logits, self._sent(self._drawn(first)), seen, self.sampling))

    def step(self) -> None:
        """One more token for every row."""
        self._make_room()
        chosen = self._replayed() if self.fixed else None
        if chosen is None:
            n = len(self.rows)
            seen = None if self.seen is None else self.seen[:n]
            chosen = choose(self._logits(), self._sent(self._drawn(0)), seen, self.sampling)
        self.window.end += 1
        for row in self.rows:
            row.length += 1
        self._append(0, *chosen)

    def _make_room(self) -> None:
        """See that the next column is in the buffer, and near the live ones where widths are
        rounded.
        """
        window, width = self.window, max(row.length for row in self.rows)
        end, close = window.end, max(width, self.next_length())
        if self.fixed:
            needed, tight = bucket(end + 1), bucket(close + close // 8 + 1)
            crossing = bucket(end) < needed  # a wider step would begin
            full = needed > window.capacity
            if not full and not (tight < needed and (crossing or 2 * tight <= needed)):
                return
            if full:
                window.capacity = bucket(close + close // 2 + 64)
                self.fixed.forget()
        elif end < window.capacity:
            return
        else:
            window.capacity = close + close // 2 + 64
        window.end = close
        for layer in self.cache.layers:
            layer.rebase(width, len(self.rows), end)

    def _logits(self) -> Tensor:
        """(B, V) after each live row's last token."""
        window, width = self.window, max(row.length for row in self.rows)
        n = len(self.rows)
        lengths = torch.tensor([row.length for row in self.rows], device=self.device)
        window.rows, window.past = slice(0, n), width
        inputs = {
            "input_ids": self.tokens[:n, None],
            "attention_mask": (
                torch.arange(width + 1, device=self.device) >= width - lengths[:, None]
            ).long(),
            "position_ids": lengths[:, None],
            "past_key_values": self.cache,
        }
        return self.caller.forward(inputs)

    def _replayed(self) -> tuple[Tensor, Tensor] | None:
        """ids and log-probabilities of the live rows by the step of fixed shapes.

        None from where the model cannot take it.
        """
        n, slots = len(self.rows), self.window.slots
        key = rows_bucket(n, slots), bucket(self.window.end + 1)
        # an empty slot, of length 0, sees the column that it writes and no other
        places = [self.window.end, *(row.length for row in self.rows), *[0] * (key[0] - n)]
        self.places[: len(places)].copy_(self._pinned(places), non_blocking=True)
        if self.sampling.temperature:
            self.draws[:n].copy_(self._pinned(self._drawn(0)), non_blocking=True)
        known = key in self.fixed.replays
        try:
            if not self.checked:
                self._check(*key)
            ids, logprobs = self.fixed(*key)
            return ids[:n], logprobs[:n]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code does when shapes are fixed
            if known:
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            say_once(f"note: this model generates without CUDA graphs, more slowly ({reason})")
            self.leave_shapes()
            return None

    def _check(self, rows: int, width: int) -> None:
        """RuntimeError where a step of fixed shapes gives other logits than a plain one, for more
        rows than rounding may.
        """
        plain = self._logits().float()
        fixed = self._fixed_logits(rows, width)[: len(plain)].float()
        spread = (plain - plain.mean(1, keepdim=True)).norm(dim=1)
        alike = (fixed - plain).norm(dim=1) <= AGREEMENT * spread
        if alike.float().mean().item() < 7 / 8:
            raise RuntimeError("its step of fixed shapes gives other logits")
        self.checked = True

    def _fixed(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """ids (rows,) and log-probabilities (rows,), from tensors that stay where they are."""
        draws = self.draws[:rows] if self.sampling.temperature else None
        seen = None if self.seen is None else self.seen[:rows]
        return choose(self._fixed_logits(rows, width), draws, seen, self.sampling)

    def _fixed_logits(self, rows: int, width: int) -> Tensor:
        """(rows, V) after the last token of the first `rows` slots, of `width` columns of the
        cache.
        """
        window, end, lengths = self.window, self.places[:1], self.places[1 : 1 + rows, None]
        columns = torch.arange(width, device=self.device)
        inputs = {
            "input_ids": self.tokens[:rows, None],
            "attention_mask": ((columns <= end) & (columns >= end - lengths)).long(),
            "position_ids": lengths,
            "past_key_values": self.cache,
        }
        window.rows, window.column, window.width = slice(0, rows), end, width
        try:
            return self.caller.forward(inputs)
        finally:
            window.column = None

    def _drawn(self, first: int) -> list[float] | None:
        """The next random number of every row from `first` on; None where decoding is greedy."""
        if not self.sampling.temperature:
            return None
        return [row.uniforms[row.asked] for row in self.rows[first:]]

    def _append(self, first: int, ids: Tensor, logprobs: Tensor) -> None:
        """Give every row from `first` on its next token, read what is due, and drop the rows that
        have ended.
        """
        fresh = self.rows[first:]
        last = first + len(fresh)
        self.tokens[first:last] = ids
        if self.seen is not None:
            self.seen[first:last].scatter_(1, ids[:, None], True)
        for row in fresh:
            row.asked += 1
        arrived = None
        if self.fixed and self.device.type == "cuda":
            ids, logprobs = (x.to("cpu", non_blocking=True) for x in (ids, logprobs))
            arrived = torch.cuda.Event()
            arrived.record()
        self.unread.append(Unread(fresh, ids, logprobs, arrived))
        self.read(1 if self.fixed else 0)
        self._drop()

    def read(self, leave: int) -> None:
        """Take what was computed, but for the last `leave` steps.

        What a row got after its end is nothing.
        """
        while len(self.unread) > leave:
            rows, ids, logprobs, arrived = self.unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
                if row.ended:
                    continue
                if logprob != logprob:
                    raise ValueError(
                        "the model's logits are not numbers (NaN): its weights or the arithmetic "
                        "(dtype) are broken"
                    )
                row.ids.append(token)
                row.logprobs.append(logprob)
                full = len(row.ids) == self.jobs[row.job].limit
                if self.caller.advance(row.job, row.ids) or full:
                    row.ended = True
                    self.caller.finished(row.job, row.ids, row.logprobs)

    def _drop(self) -> None:
        """Fill the slots of rows that need no further step with the last rows."""
        rows = self.rows
        stays = [not row.ended and row.asked < self.jobs[row.job].limit for row in rows]
        left = sum(stays)
        holes = [r for r in range(left) if not stays[r]]
        if holes:
            moved = [r for r in range(left, len(rows)) if stays[r]]
            width = max(rows[r].length for r in moved)
            one = len(holes) == 1
            source, target = (x[0] if one else self._sent(x) for x in (moved, holes))
            for layer in self.cache.layers:
                layer.copy(source, target, width)
            for x in (self.tokens, self.seen):
                if x is not None:
                    x[target] = x[source]
            for r, hole in zip(moved, holes, strict=True):
                rows[hole] = rows[r]
        del rows[left:]

    def _pinned(self, values: Sequence) -> Tensor:
        return torch.tensor(values, pin_memory=self.device.type == "cuda")

    def _sent(self, values: Sequence | None) -> Tensor | None:
        """Numbers as a tensor on the device, without a wait."""
        return None if values is None else self._pinned(values).to(self.device, non_blocking=True)


def bucket(columns: int) -> int:
    """`columns` rounded up to NARROWEST times 1, 1.5, 2, 3, 4, 6, 8, ..."""
    width = NARROWEST
    while width < columns:
        width *= 2
    lower = width // 4 * 3
    return lower if lower >= columns and lower > NARROWEST else width


def rows_bucket(rows: int, slots: int) -> int:
    """`rows` rounded up to `slots`, a quarter of it, a sixteenth, ...: fewer rows save little, and
    each number is recorded anew.
    """
    while slots // 4 >= rows:
        slots //= 4
    return slots


@functools.cache
def say_once(text: str) -> None:
    """Say it once."""
    say(text)


def uniforms(job: Job, sampling: Sampling) -> Sequence[float]:
    """The random numbers of one answer, made when its turn comes."""
    return (
        np.random.default_rng(job.seed).random(job.limit, np.float32).tolist()
        if sampling.temperature
        else ()
    )


def choose(
    logits: Tensor, uniforms: Tensor | None, seen: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Next tokens of `logits` (B, V): (ids (B,), log p (B,) in nats under the model's plain
    distribution, before penalty and temperature).

    `seen` (B, V) marks tokens of the prompt or answer for the repetition penalty (CTRL, arXiv
    1909.05858: positive logits divided, negative multiplied). Sampling inverts the cumulative
    distribution at `uniforms` (B,), so that a row's draw depends on that row alone. Order as in
    transformers: penalty, temperature, top-k, top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits
    if seen is not None:
        scores = torch.where(
            seen,
            torch.where(
                scores < 0,
                scores * sampling.repetition_penalty,
                scores / sampling.repetition_penalty,
            ),
            scores,
        )
    ids = scores.argmax(-1) if uniforms is None else _draw(scores, uniforms, sampling)
    return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def _draw(scores: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores.sort(-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    reached = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, uniforms.to(reached)[:, None] * reached[:, -1:], right=True)[
        :, 0
    ]


def left_pad(prompts: Sequence[Sequence[int] | Tensor], device="cpu") -> dict[str, Tensor]:
    """input_ids (or, of tensors (L, D), inputs_embeds), attention_mask and position_ids of prompts
    that all end in the last column.
    """
    width = max(len(prompt) for prompt in prompts)
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    columns = torch.arange(width, device=device)
    out = {"attention_mask": (columns >= pad).long(), "position_ids": (columns - pad).clamp(min=0)}
    if isinstance(prompts[0], Tensor):
        padded = [
            torch.nn.functional.pad(prompt.to(device), (0, 0, width - len(prompt), 0))
            for prompt in prompts
        ]
        return out | {"inputs_embeds": torch.stack(padded)}
    return out | {
        "input_ids": torch.tensor(
            [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
    }
