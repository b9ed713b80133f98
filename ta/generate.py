"""Answers to prompts given as token ids: the slot engine for most models, transformers' own generate for beams, prompt learning and unusual caches.

Letters: B rows, T columns, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GenerateConfig:
    max_new_tokens: int = 128
    """Tokens of an answer at most, its end token counted."""
    temperature: float = 0.0
    """0 takes the most probable token; above 0 samples."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Sample among this many most probable tokens; 0 is all."""
    num_answers: int = 1
    """Answers for each prompt."""
    beams: int = 1
    """Beam search of this width, through transformers' generate or vLLM's."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the answer so far less probable (CTRL, arXiv 1909.05858)."""
    stop_strings: tuple[str, ...] = ()
    """An answer ends where one of these is complete."""
    keep_stop: bool = False
    """Leave the stop string or end token in the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    seed: int = 0
    """Seed of the sampling; what a record gets does not depend on the records beside it."""
    slots: int = 64
    """Answers generated at the same time (a memory knob)."""


class Answer(NamedTuple):
    ids: list[int]  # all that was generated, the end token and the stop string's tokens included
    text: str  # without them, unless keep_stop
    finish: Literal["stop", "length"]
    logprobs: list[float]  # log p of each id in nats, before penalty and temperature


def check_settings(config: GenerateConfig) -> None:
    """ValueError for settings that are impossible, or impossible together."""
    c = config
    for name, fine, want in (
        ("max-new-tokens", c.max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= c.temperature < float("inf"), "0 (greedy) or a positive number"),
        ("top-p", 0 < c.top_p <= 1, "above 0 and at most 1"),
        ("top-k", c.top_k >= 0, "0 (all) or more"),
        ("num-answers", c.num_answers >= 1, "1 or more"),
        ("beams", c.beams >= 1, "1 (no beam search) or more"),
        ("repetition-penalty", 0 < c.repetition_penalty < float("inf"), "a positive number (1 is off)"),
        ("slots", c.slots >= 1, "1 or more"),
        ("seed", c.seed >= 0, "0 or more"),
        ("stop-strings", all(c.stop_strings), "strings that are not empty"),
    ):
        if not fine:
            raise ValueError(f"--{name} {getattr(c, name.replace('-', '_'))} cannot be: give {want}")
    if c.beams > 1 and c.temperature:
        raise ValueError(f"--beams {c.beams} searches and --temperature {c.temperature} samples: give one of them")
    if 1 < c.beams < c.num_answers:
        raise ValueError(f"--num-answers {c.num_answers} are more than --beams {c.beams} can give: raise beams")
    if c.beams == 1 and not c.temperature and c.num_answers > 1:
        raise ValueError(f"--num-answers {c.num_answers} would be the same answer: give a --temperature above 0, or beams")
    if not c.temperature and (c.top_p < 1 or c.top_k):
        raise ValueError(
            "--top-p and --top-k choose what is sampled, and --temperature 0 takes the most probable token: give a temperature"
        )


def check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int, context: int | None) -> None:
    """ValueError with the count and the first number of prompts that are empty, hold ids outside the embedding table, or leave no room to answer."""
    empty = [i for i, p in enumerate(prompts) if len(p) == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(prompts)} prompts are empty (the first is number {empty[0]}): a prompt needs at least one token"
        )
    outside = [i for i, p in enumerate(prompts) if min(p) < 0 or max(p) >= vocabulary]
    if outside:
        raise ValueError(
            f"{len(outside)} of {len(prompts)} prompts hold token ids outside the model's {vocabulary} embeddings "
            f"(the first is number {outside[0]}): give the tokenizer that belongs to the model"
        )
    long = [i for i, p in enumerate(prompts) if context is not None and len(p) >= context]
    if long:
        raise ValueError(
            f"{len(long)} of {len(prompts)} prompts leave no room for an answer in the model's context of {context} tokens "
            f"(number {long[0]} has {len(prompts[long[0]])}): cut them with a --max-tokens below {context}"
        )


def context_of(config) -> int | None:
    """Tokens a model of this transformers config can look at; None where it has no limit."""
    config = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(limit := getattr(config, name, None), int) and limit > 0:
            return limit
    return None


class Ending(NamedTuple):
    """What ends an answer, and how its text is cut there."""

    tokenizer: object
    stop_ids: frozenset[int]
    config: GenerateConfig

    def reached(self, ids: list[int]) -> bool:
        """Whether the last token ends the answer."""
        stops = self.config.stop_strings
        if ids[-1] in self.stop_ids or not stops:
            return ids[-1] in self.stop_ids
        tail = ids[-max(len(stop.encode()) for stop in stops) - 4 :]  # every token of a stop string has a byte of it
        return any(stop in self._decode(tail) for stop in stops) and any(stop in self._decode(ids) for stop in stops)

    def answer(self, ids: list[int], logprobs: list[float]) -> Answer:
        return Answer(ids, self.text(ids), "stop" if self.reached(ids) else "length", logprobs)

    def text(self, ids: list[int]) -> str:
        keep, skip = self.config.keep_stop, self.config.skip_special_tokens
        if ids and ids[-1] in self.stop_ids and not keep:
            ids = ids[:-1]
        whole = self._decode(ids)
        found = [(whole.find(stop), stop) for stop in self.config.stop_strings if stop in whole]
        if not found:
            return self._decode(ids, skip) if skip else whole
        at, stop = min(found)
        cut = at + len(stop) if keep else at
        for n in range(len(ids), -1, -1):  # whole tokens before the cut lose their special ones; the token cut through gives its characters
            before = self._decode(ids[:n])
            if len(before) <= cut and whole.startswith(before):
                return self._decode(ids[:n], skip) + whole[len(before) : cut]
        return whole[:cut]

    def _decode(self, ids: list[int], skip: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def generate(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
    stop_ids: Collection[int],
    on_answer: Callable[[int, list[Answer]], None] | None = None,
    embeds: Sequence[Tensor] | None = None,
    keys: Sequence[int] | None = None,
    on_token: Callable[[int, int, list[int]], None] | None = None,
) -> list[list[Answer]]:
    """`config.num_answers` answers to each prompt, in input order.

    model: a transformers or peft model, or ta's wrapper around one; its attention function, train mode and gradients are put back afterwards.
    prompts: token ids. embeds: for each prompt (L, D) in place of its tokens' embeddings. stop_ids: tokens that end an answer.
    keys: the number that each prompt's sampling is seeded with beside config.seed (its place in `prompts` by default).
    on_answer(i, answers) is called as soon as prompt i has all its answers; on_token(i, answer, ids) after each token (not in beam search).
    ValueError: settings that exclude each other; prompts that are empty, too long for the context, or of another vocabulary; broken logits.
    """
    import numpy as np

    from ta.slots import Job, plain_cache
    from ta.wrapper import base_model

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    table = base.get_input_embeddings().weight
    learned_prompt = getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False)
    context = context_of(base.config)
    if learned_prompt and context is not None:
        context -= inner.active_peft_config.num_virtual_tokens
    check_settings(config)
    check_prompts(prompts, len(table), context)
    jobs, place = [], []
    for i, prompt in enumerate(prompts):
        limit = config.max_new_tokens if context is None else min(config.max_new_tokens, context - len(prompt))
        for k in range(config.num_answers):
            seeded = np.random.default_rng([config.seed, i if keys is None else keys[i], k])
            jobs.append(Job(i, limit, seeded.random(limit, np.float32).tolist() if config.temperature else []))
            place.append((i, k))
    ending = Ending(tokenizer, frozenset(stop_ids), config)
    answers: list[list[Answer | None]] = [[None] * config.num_answers for _ in prompts]

    def advance(job: int, ids: list[int]) -> bool:
        if on_token is not None:
            on_token(*place[job], ids)
        return ending.reached(ids)

    def finished(job: int, ids: list[int], logprobs: list[float]) -> None:
        i, k = place[job]
        answers[i][k] = ending.answer(ids, logprobs)
        if on_answer is not None and all(answer is not None for answer in answers[i]):
            on_answer(i, answers[i])

    with _at_rest(model, inner, base):
        if config.beams > 1:
            _beams(inner, prompts, jobs, config, ending, finished, embeds)
        elif learned_prompt or not plain_cache(base):
            _driven(inner, prompts, jobs, config, advance, finished, embeds)
        else:
            _slots(inner, base, prompts, jobs, config, advance, finished, embeds)
    return answers


@contextlib.contextmanager
def _at_rest(model, inner, base) -> Iterator[None]:
    """Evaluation mode, no gradients, an attention function that knows masks and caches, and no generation settings of the model's own; undone after."""
    import torch
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    attention, settings = base.config._attn_implementation, base.generation_config
    device, autocast = base.get_input_embeddings().weight.device, getattr(model, "autocast", None)
    try:
        model.eval()
        base.generation_config = GenerationConfig()
        if attention == "ta":
            base.set_attn_implementation("sdpa" if getattr(base, "_supports_sdpa", False) else "eager")
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        base.generation_config = settings
        for module in training:
            module.training = True


def _how(config: GenerateConfig):
    from ta.slots import Sampling

    return Sampling(config.temperature, config.top_p, config.top_k, config.repetition_penalty)


def _slots(inner, base, prompts, jobs, config, advance, finished, embeds) -> None:
    import inspect

    from transformers.cache_utils import DynamicCache

    from ta.slots import run_slots

    taken = inspect.signature(base.forward).parameters
    extra = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})

    def forward(inputs):
        if "position_ids" not in taken:
            inputs.pop("position_ids")  # such models (ALiBi) count real tokens in the mask
        return inner(**inputs, **extra).logits[:, -1]  # (B, V)

    table = base.get_input_embeddings().weight
    layers = len(DynamicCache(config=base.config).layers)
    vocabulary = base.get_output_embeddings().weight.shape[0]
    run_slots(forward, layers, prompts, jobs, _how(config), advance, finished, config.slots, embeds, vocabulary, table.device)


def _batches(prompts, jobs, config, rows: int) -> Iterator[list[int]]:
    """Jobs in batches of prompts of like length; of one length where padding would be penalised or limits differ."""
    equal = config.repetition_penalty != 1 or any(job.limit < config.max_new_tokens for job in jobs)
    order = sorted(range(len(jobs)), key=lambda j: len(prompts[jobs[j].prompt]))
    batch: list[int] = []
    for j in order:
        if batch and (len(batch) == rows or (equal and len(prompts[jobs[j].prompt]) != len(prompts[jobs[batch[0]].prompt]))):
            yield batch
            batch = []
        batch.append(j)
    if batch:
        yield batch


def _inputs(prompts, jobs, batch, embeds, device) -> dict:
    from ta.slots import left_pad

    chosen = [jobs[j].prompt for j in batch]
    padded = left_pad([prompts[i] for i in chosen], None if embeds is None else [embeds[i] for i in chosen], device)
    padded.pop("position_ids")  # generate makes its own of the mask
    return padded


def _driven(inner, prompts, jobs, config, advance, finished, embeds) -> None:
    """transformers' generate runs the model and keeps its cache; our own function chooses every token."""
    import torch

    from ta.slots import choose

    device = next(inner.parameters()).device
    for batch in _batches(prompts, jobs, config, config.slots):
        ids, logprobs, done = [[] for _ in batch], [[] for _ in batch], [False] * len(batch)

        def pick(_, logits, batch=batch, ids=ids, logprobs=logprobs, done=done):
            n = max(len(row) for row in ids)
            uniforms = torch.tensor([(*jobs[j].uniforms, 0.0)[min(n, jobs[j].limit)] for j in batch]) if config.temperature else None
            seen = None
            if config.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, j in enumerate(batch):
                    seen[row, torch.tensor([*(prompts[jobs[j].prompt] if embeds is None else ()), *ids[row]], dtype=torch.long)] = True
            tokens, logps = choose(logits, uniforms, seen, _how(config))
            for row, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
                if not done[row]:
                    ids[row].append(token)
                    logprobs[row].append(logp)
                    done[row] = advance(batch[row], ids[row]) or len(ids[row]) == jobs[batch[row]].limit
            return torch.full_like(logits, -torch.inf).scatter(1, tokens[:, None], 0.0)

        inner.generate(
            **_inputs(prompts, jobs, batch, embeds, device),
            max_new_tokens=max(jobs[j].limit for j in batch),
            do_sample=False,
            logits_processor=[pick],
            stopping_criteria=[lambda _, __, done=done: torch.tensor(done, device=device)],
        )
        for row, j in enumerate(batch):
            finished(j, ids[row], logprobs[row])


def _beams(inner, prompts, jobs, config, ending, finished, embeds) -> None:
    """transformers' beam search; log-probabilities from one more forward over each answer."""
    import torch

    device = next(inner.parameters()).device
    firsts = jobs[:: config.num_answers]
    for batch in _batches(prompts, firsts, config, max(1, config.slots // config.beams)):
        inputs = _inputs(prompts, firsts, batch, embeds, device)
        width = 0 if embeds is not None else inputs["input_ids"].shape[1]
        stopped = [
            lambda rows, _: torch.tensor([bool(row[width:]) and ending.reached(row[width:]) for row in rows.tolist()], device=device)
        ]
        out = inner.generate(
            **inputs,
            max_new_tokens=firsts[batch[0]].limit,
            num_beams=config.beams,
            num_return_sequences=config.num_answers,
            repetition_penalty=config.repetition_penalty,
            do_sample=False,
            eos_token_id=sorted(ending.stop_ids) or None,
            pad_token_id=min(ending.stop_ids, default=0),
            stopping_criteria=stopped if config.stop_strings else [],
        )
        for n, row in enumerate(out[:, width:].tolist()):
            prompt = batch[n // config.num_answers]
            ids = row[: next((k for k in range(1, len(row) + 1) if ending.reached(row[:k])), len(row))]
            before = {"input_ids": torch.tensor([[*prompts[prompt], *ids]], device=device)}
            if embeds is not None:
                table = inner.get_input_embeddings()
                before = {"inputs_embeds": torch.cat([embeds[prompt].to(device), table(torch.tensor(ids, device=device))])[None]}
            logits = inner(**before, use_cache=False).logits[0, -len(ids) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids, device=device)[:, None])[:, 0]
            finished(prompt * config.num_answers + n % config.num_answers, ids, chosen.tolist())
