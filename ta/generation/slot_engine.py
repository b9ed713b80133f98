"""A generation engine in plain torch: a fixed number of slots over a model's public forward, where a finished row is replaced by the next prompt.

A new prompt is prefilled straight into the columns left of the buffer's common end, a decode step writes one column for every row, and a finished
row is overwritten by the last one: nothing is copied but that row, and no step computes an empty slot.
Letters: B rows (live slots), T columns, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ta.generation.slot_cache import SlotLayer, Window

PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill: bounds its activations
EFFICIENT = 1024  # from here on a prefill gains less from being larger than it loses to padding


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


def run_slots(
    caller: Caller,
    layers: int,
    prompts: Sequence[Sequence[int]],
    jobs: Sequence[Job],
    how: Sampling,
    slots: int = 64,
    embeds: Sequence[Tensor] | None = None,
    vocabulary: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Run all `jobs`, at most `slots` at a time.

    layers: how many layers hold a cache. embeds[i] (L, D) is fed in place of prompt i, whose tokens only a repetition penalty then looks at.
    vocabulary: V, read where a repetition penalty is on.
    """
    lengths = [len(x) for x in (prompts if embeds is None else embeds)]
    waiting = sorted(
        range(len(jobs)), key=lambda j: lengths[jobs[j].prompt]
    )  # taken from the end: longest prompts first
    if not waiting:
        return
    slots = min(slots, len(jobs))
    longest = lengths[jobs[waiting[-1]].prompt]
    window = Window(
        slots, longest + min(longest // 2 + 64, max(job.limit for job in jobs)), longest
    )
    cache = Cache(layers=[SlotLayer(window) for _ in range(layers)])
    seen = (
        torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)
        if how.repetition_penalty != 1
        else None
    )
    engine = Engine(
        caller, prompts, lengths, jobs, how, embeds, device, window, cache, seen, waiting
    )
    with torch.no_grad():
        while engine.rows or engine.waiting:
            # a prefill of one prompt costs about a whole step: wait until some slots are free
            while engine.waiting and slots - len(engine.rows) >= (
                max(1, slots // 8) if engine.rows else 1
            ):
                engine.prefill()
            if engine.rows:
                engine.step()


@dataclass
class Engine:
    caller: Caller
    prompts: Sequence[Sequence[int]]
    lengths: Sequence[int]  # of each prompt, in columns
    jobs: Sequence[Job]
    how: Sampling
    embeds: Sequence[Tensor] | None
    device: torch.device | str
    window: Window
    cache: Cache
    seen: Tensor | None  # (slots, V): tokens of each row so far
    waiting: list[int]  # jobs, the next at the end
    rows: list[Row] = field(default_factory=list)

    def next_length(self) -> int:
        """Tokens of the next waiting prompt, which is the longest that still waits."""
        return self.lengths[self.jobs[self.waiting[-1]].prompt] if self.waiting else 0

    def prefill(self) -> None:
        """Admit as many waiting jobs as fit, each prompt computed once however many answers it gets."""
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
            which = torch.tensor(
                [n for n, members in enumerate(group.values()) for _ in members], device=self.device
            )
            logits = logits[which]
            for layer in self.cache.layers:
                layer.copy(first + which, slice(first, first + taken), width)
        for i, members in group.items():
            for job in members:
                if self.seen is not None:
                    self.seen[len(self.rows)] = False
                    self.seen[len(self.rows), torch.tensor(self.prompts[i], device=self.device)] = (
                        True
                    )
                self.rows.append(Row(job, self.lengths[i], uniforms(self.jobs[job], self.how)))
        self._append(first, logits)

    def step(self) -> None:
        """One more token for every row."""
        window, width = self.window, max(row.length for row in self.rows)
        if window.end == window.capacity:
            end, window.end = window.end, max(width, self.next_length())
            window.capacity = window.end + window.end // 2 + 64
            for layer in self.cache.layers:
                layer.rebase(width, len(self.rows), end)
        lengths = torch.tensor([row.length for row in self.rows], device=self.device)
        window.rows, window.past = slice(0, len(self.rows)), width
        inputs = {
            "input_ids": torch.tensor([row.ids[-1:] for row in self.rows], device=self.device),
            "attention_mask": (
                torch.arange(width + 1, device=self.device) >= width - lengths[:, None]
            ).long(),
            "position_ids": lengths[:, None],
            "past_key_values": self.cache,
        }
        logits = self.caller.forward(inputs)  # (B, V)
        window.end += 1
        for row in self.rows:
            row.length += 1
        self._append(0, logits)

    def _append(self, first: int, logits: Tensor) -> None:
        """Give every row from `first` on its next token, and drop the rows that end with it."""
        rows, seen = self.rows, self.seen
        fresh = rows[first:]
        draws = (
            torch.tensor([row.uniforms[len(row.ids)] for row in fresh])
            if self.how.temperature
            else None
        )
        ids, logprobs = choose(
            logits, draws, None if seen is None else seen[first : len(rows)], self.how
        )
        if seen is not None:
            seen[torch.arange(first, len(rows), device=ids.device), ids] = True
        for row, token, logprob in zip(fresh, ids.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:
                raise ValueError(
                    "the model's logits are not numbers (NaN): its weights or the arithmetic (dtype) are broken"
                )
            row.ids.append(token)
            row.logprobs.append(logprob)
        for r in range(len(rows) - 1, first - 1, -1):
            if (
                not self.caller.advance(rows[r].job, rows[r].ids)
                and len(rows[r].ids) < self.jobs[rows[r].job].limit
            ):
                continue
            self.caller.finished(rows[r].job, rows[r].ids, rows[r].logprobs)
            last = rows.pop()
            if r < len(rows):
                rows[r] = last
                for layer in self.cache.layers:
                    layer.copy(len(rows), r, last.length)
                if seen is not None:
                    seen[r] = seen[len(rows)]


def uniforms(job: Job, how: Sampling) -> Sequence[float]:
    """The random numbers of one answer, made when its turn comes."""
    return (
        np.random.default_rng(job.seed).random(job.limit, np.float32).tolist()
        if how.temperature
        else ()
    )


def choose(
    logits: Tensor, uniforms: Tensor | None, seen: Tensor | None, how: Sampling
) -> tuple[Tensor, Tensor]:
    """Next tokens of `logits` (B, V): (ids (B,), log p (B,) in nats under the model's plain distribution, before penalty and temperature).

    `seen` (B, V) marks tokens of the prompt or answer for the repetition penalty (CTRL, arXiv 1909.05858: positive logits divided, negative
    multiplied). Sampling inverts the cumulative distribution at `uniforms` (B,), so that a row's draw depends on that row alone. Order as in
    transformers: penalty, temperature, top-k, top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits
    if seen is not None:
        scores = torch.where(
            seen,
            torch.where(
                scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty
            ),
            scores,
        )
    ids = scores.argmax(-1) if uniforms is None else _draw(scores, uniforms, how)
    return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def _draw(scores: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    scores = scores / how.temperature
    if 0 < how.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(how.top_k).values[:, -1:], -torch.inf)
    if how.top_p < 1:
        ordered, order = scores.sort(-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - how.top_p
        out[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    reached = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reached, uniforms.to(reached)[:, None] * reached[:, -1:], right=True)[
        :, 0
    ]


def left_pad(prompts: Sequence[Sequence[int] | Tensor], device="cpu") -> dict[str, Tensor]:
    """input_ids (or, of tensors (L, D), inputs_embeds), attention_mask and position_ids of prompts that all end in the last column."""
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
