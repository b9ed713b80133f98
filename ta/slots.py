"""A generation engine in plain torch: a fixed number of slots over a model's public forward, where a finished row is replaced by the next prompt.

All rows end at the same column of one preallocated key-value buffer. A new prompt is prefilled straight into the columns left of that end, a decode
step writes one column for every row, and a finished row is overwritten by the last one: nothing is copied but that row.
Letters: B rows (live slots), T columns, V vocabulary, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill: bounds its activations


class Job(NamedTuple):
    prompt: int  # which prompt
    limit: int  # new tokens at most
    uniforms: Sequence[float]  # one number in [0, 1) for each new token; empty where decoding is greedy


class Sampling(NamedTuple):
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass
class Row:
    """One live slot: the job it works on and what it has written so far."""

    job: int
    length: int  # tokens in the cache
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Window:
    """Which rows and columns of the buffer the forward pass under way reads and writes; shared by all layers."""

    def __init__(self, slots: int, capacity: int, end: int):
        self.slots, self.capacity, self.end = slots, capacity, end
        self.rows, self.past = slice(0, 0), 0


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, (slots, H, capacity, D) each; every layer keeps all columns, sliding windows are left to the mask."""

    is_sliding = False

    def __init__(self, window: Window):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._buffer(x) for x in (key_states, value_states))
        self.is_initialized = True

    def _buffer(self, like: Tensor) -> Tensor:
        # zeros, because a masked column still takes part in a product with probability 0
        return like.new_zeros(self.window.slots, like.shape[1], self.window.capacity, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        w = self.window
        new = slice(w.end, w.end + 1) if w.past else slice(w.end - key_states.shape[2], w.end)
        self.keys[w.rows, :, new] = key_states
        self.values[w.rows, :, new] = value_states
        if not w.past:
            return key_states, value_states
        seen = slice(w.end - w.past, w.end + 1)
        return self.keys[w.rows, :, seen], self.values[w.rows, :, seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.past + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.past

    def get_max_length(self) -> int:
        return -1

    def write(self, rows: slice, columns: slice, source) -> None:
        """Rows `source` (an index or index tensor) become rows `rows`, in the given columns."""
        for x in (self.keys, self.values):
            x[rows, :, columns] = x[source, :, columns]

    def rebase(self, width: int, live: int, old_end: int) -> None:
        """Move the last `width` columns of the live rows to the window's new end, in a buffer of its new capacity."""
        new, old = slice(self.window.end - width, self.window.end), slice(old_end - width, old_end)
        for name in ("keys", "values"):
            before = getattr(self, name)
            after = self._buffer(before)
            after[:live, :, new] = before[:live, :, old]
            setattr(self, name, after)


def plain_cache(model) -> bool:
    """Whether the model's past is keys and values of every layer and nothing else, so that the slot engine can hold it."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False) or model.config.is_encoder_decoder or not model._supports_default_dynamic_cache():
        return False
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "num_kv_shared_layers", 0):
        return False
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, TypeError, AttributeError):
        return False  # a cache that only the model's own file knows
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def choose(logits: Tensor, uniforms: Tensor | None, seen: Tensor | None, how: Sampling) -> tuple[Tensor, Tensor]:
    """Next tokens of `logits` (B, V): (ids (B,), log p (B,) in nats under the model's plain distribution, before penalty and temperature).

    `seen` (B, V) marks tokens of the prompt or answer for the repetition penalty (CTRL, arXiv 1909.05858: positive logits divided, negative
    multiplied). Sampling inverts the cumulative distribution at `uniforms` (B,), so that a row's draw depends on that row alone. Order as in
    transformers: penalty, temperature, top-k, top-p.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits
    if seen is not None:
        scores = torch.where(seen, torch.where(scores < 0, scores * how.repetition_penalty, scores / how.repetition_penalty), scores)
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
    return torch.searchsorted(reached, uniforms.to(reached)[:, None] * reached[:, -1:], right=True)[:, 0]


@torch.no_grad()
def run_slots(
    forward: Callable[[dict], Tensor],
    layers: int,
    prompts: Sequence[Sequence[int]],
    jobs: Sequence[Job],
    how: Sampling,
    advance: Callable[[int, list[int]], bool],
    finished: Callable[[int, list[int], list[float]], None],
    slots: int = 64,
    embeds: Sequence[Tensor] | None = None,
    vocabulary: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Run all `jobs` and hand each to `finished(job, ids, log-probabilities)` as it ends.

    forward(inputs) gives the logits (B, V) of the last column; `layers` is how many layers hold a cache. `advance(job, ids)` is asked after every new
    token whether the answer has ended. `embeds[i]` (L, D) stands in for the tokens of prompt i. `vocabulary` is V, read where a repetition penalty is on.
    """
    waiting = sorted(range(len(jobs)), key=lambda j: len(prompts[jobs[j].prompt]))  # the end of the list comes first: longest prompts
    if not waiting:
        return
    longest = len(prompts[jobs[waiting[-1]].prompt])
    slots = min(slots, len(jobs))
    window = Window(slots, longest + min(longest // 2 + 64, max(job.limit for job in jobs)), longest)
    cache = Cache(layers=[SlotLayer(window) for _ in range(layers)])
    seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device) if how.repetition_penalty != 1 else None
    rows: list[Row] = []

    def append(first: int, logits: Tensor) -> None:
        """Give every row from `first` on its next token, and drop the rows that end with it."""
        fresh = rows[first:]
        uniforms = torch.tensor([jobs[row.job].uniforms[len(row.ids)] for row in fresh]) if how.temperature else None
        ids, logprobs = choose(logits, uniforms, None if seen is None else seen[first : len(rows)], how)
        if seen is not None:
            seen[torch.arange(first, len(rows), device=device), ids] = True
        for row, token, logprob in zip(fresh, ids.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:
                raise ValueError("the model's logits are not numbers (NaN): its weights or the arithmetic (dtype) are broken")
            row.ids.append(token)
            row.logprobs.append(logprob)
        for r in range(len(rows) - 1, first - 1, -1):
            row = rows[r]
            if advance(row.job, row.ids) or len(row.ids) >= jobs[row.job].limit:
                finished(row.job, row.ids, row.logprobs)
                last = rows.pop()
                if r < len(rows):
                    rows[r] = last
                    for layer in cache.layers:
                        layer.write(r, slice(window.end - last.length, window.end), len(rows))
                    if seen is not None:
                        seen[r] = seen[len(rows)]

    def prefill() -> None:
        """Admit as many waiting jobs as fit, each prompt computed once however many answers it gets."""
        width = len(prompts[jobs[waiting[-1]].prompt])
        group: dict[int, list[int]] = {}
        taken = 0
        while (
            waiting
            and len(rows) + taken < slots
            and (jobs[waiting[-1]].prompt in group or (len(group) + 1) * width <= max(PREFILL_TOKENS, width))
        ):
            group.setdefault(jobs[waiting[-1]].prompt, []).append(waiting.pop())
            taken += 1
        inputs = left_pad([prompts[i] for i in group], None if embeds is None else [embeds[i] for i in group], device)
        first = len(rows)
        window.rows, window.past = slice(first, first + len(group)), 0
        logits = forward(inputs | {"past_key_values": cache})  # (prompts of the group, V)
        if taken > len(group):
            which = torch.tensor([n for n, members in enumerate(group.values()) for _ in members], device=device)
            logits = logits[which]
            for layer in cache.layers:
                layer.write(slice(first, first + taken), slice(window.end - width, window.end), first + which)
        for i, members in group.items():
            for job in members:
                if seen is not None:
                    seen[len(rows)] = False
                    seen[len(rows), torch.tensor(prompts[i] if embeds is None else [], dtype=torch.long, device=device)] = True
                rows.append(Row(job, len(prompts[i])))
        append(first, logits)

    def step() -> None:
        width = max(row.length for row in rows)
        if window.end == window.capacity:
            old_end, window.end = window.end, max(width, len(prompts[jobs[waiting[-1]].prompt]) if waiting else 0)
            window.capacity = window.end + window.end // 2 + 64
            for layer in cache.layers:
                layer.rebase(width, len(rows), old_end)
        lengths = torch.tensor([row.length for row in rows], device=device)
        window.rows, window.past = slice(0, len(rows)), width
        logits = forward(
            {
                "input_ids": torch.tensor([row.ids[-1:] for row in rows], device=device),
                "attention_mask": (torch.arange(width + 1, device=device) >= width - lengths[:, None]).long(),
                "position_ids": lengths[:, None],
                "past_key_values": cache,
            }
        )  # (B, V)
        window.end += 1
        for row in rows:
            row.length += 1
        append(0, logits)

    while rows or waiting:
        while waiting and slots - len(rows) >= (max(1, slots // 8) if rows else 1):
            prefill()
        if rows:
            step()


def left_pad(prompts: Sequence[Sequence[int]], embeds: Sequence[Tensor] | None = None, device="cpu") -> dict[str, Tensor]:
    """input_ids (or inputs_embeds), attention_mask and position_ids of prompts that all end in the last column."""
    width = max(len(prompt) for prompt in prompts)
    pad = torch.tensor([width - len(prompt) for prompt in prompts], device=device)[:, None]
    columns = torch.arange(width, device=device)
    out = {"attention_mask": (columns >= pad).long(), "position_ids": (columns - pad).clamp(min=0)}
    if embeds is None:
        return out | {"input_ids": torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)}
    filled = [torch.nn.functional.pad(x.to(device), (0, 0, width - len(x), 0)) for x in embeds]
    return out | {"inputs_embeds": torch.stack(filled)}
