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
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper
from transformers.cache_utils import Cache

from ta.data.batch import to_device
from ta.generation.graphs import Graphs
from ta.generation.settings import BROKEN, Answer, Ending, GenerateConfig
from ta.generation.slot_cache import CacheWindow, SlotLayer
from ta.parallel import say

PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill: bounds its activations
EFFICIENT = 1024  # from here on a prefill gains less from being larger than it loses to padding
NARROWEST = 128  # columns of the narrowest step of fixed shapes
AGREEMENT = 0.05  # of the spread of a row's logits: what arithmetic in 16 bits may differ by


@dataclass
class Row:
    """An answer under way: to which prompt, the how many-th, and what is written so far."""

    prompt: int
    answer: int
    limit: int  # new tokens at most
    # one number in [0, 1) for each new token; empty where decoding is greedy
    uniforms: Sequence[float]
    length: int = 0  # tokens in the cache
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    asked: int = 0  # tokens computed, of which `ids` lacks those not read yet
    ended: bool = False


class Work(NamedTuple):
    """What is asked of an engine, and its answers, of which it tells as they are made."""

    prompts: Sequence[Sequence[int]]
    embeds: Sequence[Tensor] | None  # (L, D) in place of each prompt
    limits: Sequence[int]  # new tokens at most, for each prompt
    keys: Sequence[int]  # of each prompt's sampling, which nothing beside it takes part in
    ending: Ending
    on_answer: Callable[[int, list[Answer]], None] | None
    on_token: Callable[[int, int, list[int]], None] | None
    answers: list[list[Answer | None]]  # num_answers to each prompt

    def by_length(self, n: int) -> list[tuple[int, int]]:
        """(prompt, answer) of `n` answers to each prompt, the shortest prompts first."""
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        return [(i, k) for i in order for k in range(n)]

    def row(self, prompt: int, answer: int) -> Row:
        """The row of an answer; its random numbers are made when its turn comes."""
        config, limit, uniforms = self.ending.config, self.limits[prompt], ()
        if config.temperature:
            random = np.random.default_rng((config.seed, self.keys[prompt], answer))
            uniforms = random.random(limit, np.float32).tolist()
        return Row(prompt, answer, limit, uniforms)

    def take(self, rows: Sequence[Row], ids: Tensor, logprobs: Tensor) -> None:
        """Give each row its next token. What a row gets after its end is nothing.

        ValueError for a log-probability that is no number.
        """
        for row, token, logprob in zip(rows, ids.tolist(), logprobs.tolist(), strict=True):
            if row.ended:
                continue
            if logprob != logprob:
                raise ValueError(BROKEN)
            row.ids.append(token)
            row.logprobs.append(logprob)
            if self.on_token is not None:
                self.on_token(row.prompt, row.answer, row.ids)
            row.ended = self.ending.reached(row.ids) or len(row.ids) == row.limit
            if row.ended:
                self.finish(row.prompt, row.answer, row.ids, row.logprobs)

    def finish(self, prompt: int, answer: int, ids: list[int], logprobs: list[float]) -> None:
        """Keep an answer of all its ids."""
        answers = self.answers[prompt]
        answers[answer] = self.ending.answer(ids, logprobs)
        if self.on_answer is not None and all(answers):
            self.on_answer(prompt, answers)


class SlotEngine:
    """Does all the work, at most `config.slots` answers at a time.

    forward: the model's keyword arguments -> logits (B, V) of the last column.
    fixed_shapes: steps of few different shapes, replayed as CUDA graphs on a GPU; said and given up
    where the model cannot.
    """

    def __init__(
        self,
        forward: Callable[[dict], Tensor],
        work: Work,
        device: torch.device,
        fixed_shapes: bool = False,
    ):
        self.forward, self.work, self.device = forward, work, device
        self.config = config = work.ending.config
        # a repetition penalty looks at the tokens, whatever is fed in their place
        self.inputs = work.prompts if work.embeds is None else work.embeds
        self.lengths = [len(x) for x in self.inputs]  # of each prompt, in columns
        # taken from the end: the longest first
        self.waiting = work.by_length(config.num_answers)
        slots, longest = min(config.slots, len(self.waiting)), self.next_length()
        capacity = longest + min(longest // 2 + 64, max(work.limits, default=0))
        self.window = CacheWindow(slots, bucket(capacity) if fixed_shapes else capacity, longest)
        self.cache = Cache(layer_class_to_replicate=functools.partial(SlotLayer, self.window))
        self.rows: list[Row] = []
        # (rows, ids, log-probabilities, event): tokens that are on their way from the device
        self.unread: deque[tuple] = deque()
        self.seen: Tensor | None = None  # (slots, V): tokens of each row so far
        # (slots,): the last token of each row
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.draws = torch.zeros(slots, device=device)  # a random number in [0, 1) for each row
        # (1 + slots,): the column that a step writes, then each row's length
        self.places = torch.zeros(1 + slots, dtype=torch.long, device=device)
        self.fixed = Graphs(self._fixed, device) if fixed_shapes else None
        self.checked = False

    def run(self) -> None:
        """Answer everything; where it ends, the graphs are dropped."""
        # a prefill costs about a whole step, and many replayed ones: wait until some slots are free
        slots, replayed = self.window.slots, self.fixed and self.device.type == "cuda"
        some = max(1, slots // (4 if replayed else 8))
        with torch.no_grad():
            try:
                while self.rows or self.waiting or self.unread:
                    while self.waiting and slots - len(self.rows) >= (some if self.rows else 1):
                        self.prefill()
                    if self.rows:
                        self.step()
                    else:
                        self.read(0)
            finally:
                self.leave_shapes()

    def leave_shapes(self) -> None:
        """Take plain steps from now on.

        The graphs, which hold the buffers in a circle, go at once.
        """
        if self.fixed:
            self.fixed.forget()
        self.fixed = None

    def next_length(self) -> int:
        """Tokens of the next waiting prompt, which is the longest that still waits."""
        return self.lengths[self.waiting[-1][0]] if self.waiting else 0

    def prefill(self) -> None:
        """Admit as many waiting answers as fit, each prompt computed once however many answers it
        gets.
        """
        window, first, width = self.window, len(self.rows), self.next_length()
        group: list[int] = []  # prompts
        which: list[int] = []  # for each row its place in the group
        while self.waiting and first + len(which) < window.slots:
            prompt = self.waiting[-1][0]
            if prompt not in group[-1:]:
                padded = (len(group) + 1) * width
                uneven = padded > EFFICIENT and self.lengths[prompt] < 0.85 * width
                if group and (uneven or padded > PREFILL_TOKENS):
                    break
                group.append(prompt)
            which.append(len(group) - 1)
            self.rows.append(self.work.row(*self.waiting.pop()))
            self.rows[-1].length = self.lengths[prompt]
        window.rows, window.past = slice(first, first + len(group)), 0
        window.column = None
        inputs = left_pad([self.inputs[i] for i in group], self.device)
        # (prompts of the group, V)
        logits = self.forward(inputs | {"past_key_values": self.cache})
        fresh = slice(first, len(self.rows))
        if len(which) > len(group):
            source = self._sent(which)
            logits = logits[source]
            for layer in self.cache.layers:
                layer.copy(first + source, fresh, width)
        if self.config.repetition_penalty != 1:
            if self.seen is None:
                self.seen = logits.new_zeros(window.slots, logits.shape[1], dtype=torch.bool)
            self.seen[fresh] = False
            for row, n in enumerate(which, first):
                self.seen[row, self._sent(self.work.prompts[group[n]])] = True
        self._renew_draws(fresh)
        self._append(fresh, *self._chosen(logits, fresh))

    def step(self) -> None:
        """One more token for every row."""
        self._make_room()
        live, slots = slice(0, len(self.rows)), self.window.slots
        lengths = [row.length for row in self.rows]
        # an empty slot, of length 0, sees the column that it writes and no other
        places = [self.window.end, *lengths, *[0] * (slots - len(lengths))]
        self.places.copy_(self._pinned(places), non_blocking=True)
        self._renew_draws(live)
        chosen = self._replayed() if self.fixed else None
        if chosen is None:
            chosen = self._chosen(self._plain_logits(), live)
        self.window.end += 1
        for row in self.rows:
            row.length += 1
        self._append(live, *chosen)

    def _make_room(self) -> None:
        """See that the next column is in the buffer, and near the live ones where widths are
        rounded.
        """
        window, width = self.window, max(row.length for row in self.rows)
        end, close = window.end, max(width, self.next_length())
        rounded = bucket if self.fixed else int
        needed, tight = rounded(end + 1), rounded(close + close // 8 + 1)
        crossing = rounded(end) < needed  # a wider step would begin
        nearer = tight < needed and (crossing or 2 * tight <= needed)
        if needed > window.capacity:
            window.capacity = rounded(close + close // 2 + 64)
            if self.fixed:
                self.fixed.forget()
        elif not (self.fixed and nearer):
            return
        window.end = close
        for layer in self.cache.layers:
            layer.rebase(width, len(self.rows), end)

    def _plain_logits(self) -> Tensor:
        """(B, V) after each live row's last token."""
        return self._logits(len(self.rows), max(row.length for row in self.rows) + 1)

    def _logits(self, rows: int, width: int, fixed: bool = False) -> Tensor:
        """(rows, V) after the last token of the first `rows` slots.

        They look at the last `width` columns, the new one included; in a step of fixed shapes at
        the first `width` columns of the buffer.
        """
        window, end, lengths = self.window, self.places[:1], self.places[1 : 1 + rows, None]
        columns = torch.arange(width, device=self.device)
        mask = columns >= (end if fixed else width - 1) - lengths
        if fixed:
            mask = mask & (columns <= end)
        window.rows, window.past = slice(0, rows), width - 1
        window.column = end if fixed else None
        inputs = {"input_ids": self.tokens[:rows, None], "attention_mask": mask.long()}
        return self.forward(inputs | {"position_ids": lengths, "past_key_values": self.cache})

    def _replayed(self) -> tuple[Tensor, Tensor] | None:
        """ids and log-probabilities of the live rows by the step of fixed shapes.

        None from where the model cannot take it.
        """
        n, slots = len(self.rows), self.window.slots
        key = rows_bucket(n, slots), bucket(self.window.end + 1)
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
        plain = self._plain_logits().float()
        fixed = self._logits(rows, width, fixed=True)[: len(plain)].float()
        spread = (plain - plain.mean(1, keepdim=True)).norm(dim=1)
        alike = (fixed - plain).norm(dim=1) <= AGREEMENT * spread
        if alike.float().mean().item() < 7 / 8:
            raise RuntimeError("its step of fixed shapes gives other logits")
        self.checked = True

    def _fixed(self, rows: int, width: int) -> tuple[Tensor, Tensor]:
        """ids (rows,) and log-probabilities (rows,), from tensors that stay where they are."""
        return self._chosen(self._logits(rows, width, fixed=True), slice(0, rows))

    def _chosen(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The next ids and their log-probabilities of some rows."""
        draws = self.draws[rows] if self.config.temperature else None
        seen = None if self.seen is None else self.seen[rows]
        return choose(logits, draws, seen, self.config)

    def _renew_draws(self, rows: slice) -> None:
        """Put down the next random number of some rows."""
        if self.config.temperature:
            drawn = [row.uniforms[row.asked] for row in self.rows[rows]]
            self.draws[rows].copy_(self._pinned(drawn), non_blocking=True)

    def _append(self, rows: slice, ids: Tensor, logprobs: Tensor) -> None:
        """Give rows their next tokens, read what is due, and drop the rows that have ended."""
        fresh = self.rows[rows]
        self.tokens[rows] = ids
        if self.seen is not None:
            self.seen[rows].scatter_(1, ids[:, None], True)
        for row in fresh:
            row.asked += 1
        arrived = None
        if self.fixed and self.device.type == "cuda":
            ids, logprobs = (x.to("cpu", non_blocking=True) for x in (ids, logprobs))
            arrived = torch.cuda.Event()
            arrived.record()
        self.unread.append((fresh, ids, logprobs, arrived))
        self.read(1 if self.fixed else 0)
        self._drop()

    def read(self, leave: int) -> None:
        """Take what was computed, but for the last `leave` steps."""
        while len(self.unread) > leave:
            *tokens, arrived = self.unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            self.work.take(*tokens)

    def _drop(self) -> None:
        """Fill the slots of rows that need no further step with the last rows."""
        rows = self.rows
        stays = [not row.ended and row.asked < row.limit for row in rows]
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

    def _sent(self, values: Sequence[int]) -> Tensor:
        """Numbers as a tensor on the device, without a wait."""
        return to_device(torch.tensor(values), self.device)


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


say_once = functools.cache(say)


def choose(
    logits: Tensor, uniforms: Tensor | None, seen: Tensor | None, config: GenerateConfig
) -> tuple[Tensor, Tensor]:
    """Next tokens of `logits` (B, V): (ids (B,), log p (B,) in nats under the model's plain
    distribution, before penalty and temperature).

    `seen` (B, V) marks tokens of the prompt or answer for the repetition penalty (CTRL, arXiv
    1909.05858: positive logits divided, negative multiplied). Sampling inverts the cumulative
    distribution at `uniforms` (B,), so that a row's draw depends on that row alone. Order as in
    transformers: penalty, temperature, top-k, top-p.
    """
    scores = logits = logits if logits.dtype == torch.float64 else logits.float()
    if seen is not None:
        penalty = config.repetition_penalty
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(seen, lowered, scores)
    ids = scores.argmax(-1) if uniforms is None else _draw(scores, uniforms, config)
    chosen = logits.gather(1, ids[:, None])[:, 0]
    return ids, chosen - logits.logsumexp(-1)


def _draw(scores: Tensor, uniforms: Tensor, config: GenerateConfig) -> Tensor:
    scores = scores / config.temperature
    if config.top_k:
        scores = TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        # of equal scores the later ones, as transformers takes them
        ordered, places = scores.sort(-1)
        reached = _reached(ordered)
        dropped = reached <= (1 - config.top_p) * reached[:, -1:].double()
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(1, places, dropped), -torch.inf)
    reached = _reached(scores)
    wanted = uniforms.to(reached.device, torch.float64)[:, None] * reached[:, -1:]
    places = torch.searchsorted(reached, wanted.long(), right=True)[:, 0]
    # of scores that are no numbers
    return places.clamp(max=scores.shape[1] - 1)


def _reached(scores: Tensor) -> Tensor:
    """(B, V) cumulative probabilities, times 2^40.

    They are whole numbers, whose sums are the same in any order: a GPU adds others as they come.
    """
    return (scores.softmax(-1) * 2**40).long().cumsum(-1)


def left_pad(prompts: Sequence[Sequence[int] | Tensor], device="cpu") -> dict[str, Tensor]:
    """input_ids (or, of tensors (L, D), inputs_embeds), attention_mask and position_ids of prompts
    that all end in the last column.
    """
    name = "inputs_embeds" if isinstance(prompts[0], Tensor) else "input_ids"
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    padded = to_device(pad_sequence(rows, batch_first=True, padding_side="left"), device)
    columns = torch.arange(padded.shape[1], device=device)
    lengths = to_device(torch.tensor([[len(prompt)] for prompt in prompts]), device)
    places = columns - (padded.shape[1] - lengths)
    mask = (places >= 0).long()
    return {name: padded, "attention_mask": mask, "position_ids": places.clamp(min=0)}
