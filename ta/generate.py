"""Answers to prompts given as token ids: the slot engine for most models, transformers' own generate for beams, prompt learning and unusual caches.

Letters: B rows, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ta.answers import Answer, Ending, GenerateConfig, check_prompts, check_settings, context_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answer", "GenerateConfig", "generate"]


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

    from ta.adapters import is_prompt_learning
    from ta.slot_cache import plain_cache
    from ta.slots import Job
    from ta.wrapper import base_model

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    table = base.get_input_embeddings().weight
    virtual = is_prompt_learning(inner)
    context = context_of(base.config)
    if virtual and context is not None:
        context -= inner.active_peft_config.num_virtual_tokens
    check_settings(config)
    check_prompts(prompts, len(table), context)
    if embeds is not None and [len(x) for x in embeds] != [len(prompt) for prompt in prompts]:
        raise ValueError("embeds and prompts differ in length: give one row of embeddings for every token of every prompt")
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
        elif not plain_cache(base) or (virtual and inner.active_peft_config.peft_type == "PREFIX_TUNING"):
            _driven(inner, prompts, jobs, config, advance, finished, embeds)
        elif virtual:
            _slots(base, base, prompts, jobs, config, advance, finished, _with_virtual_tokens(inner, base, prompts, embeds))
        else:
            _slots(inner, base, prompts, jobs, config, advance, finished, embeds)
    return answers


@contextlib.contextmanager
def _at_rest(model, inner, base) -> Iterator[None]:
    """Evaluation mode, no gradients, attention that knows masks and caches, no generation settings of the model's own; put back after."""
    import torch
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    attention, settings = base.config._attn_implementation, base.generation_config
    owners = {base} | ({inner} if hasattr(inner, "generation_config") else set())  # peft keeps a second copy
    device, autocast = base.get_input_embeddings().weight.device, getattr(model, "autocast", None)
    try:
        model.eval()
        for owner in owners:
            owner.generation_config = GenerationConfig()
        if attention == "ta":
            base.set_attn_implementation("sdpa" if getattr(base, "_supports_sdpa", False) else "eager")
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)
        for owner in owners:
            owner.generation_config = settings
        for module in training:
            module.training = True


def _with_virtual_tokens(inner, base, prompts, embeds) -> list[Tensor]:
    """Each prompt's embeddings behind those of the virtual tokens: prompt tuning and p-tuning are no more than that."""
    import torch

    from ta.adapters import virtual_embeddings

    table = base.get_input_embeddings()
    virtual = virtual_embeddings(inner).to(table.weight.dtype)  # (virtual tokens, D)
    own = embeds or [table(torch.tensor(prompt, device=table.weight.device)) for prompt in prompts]
    return [torch.cat([virtual, x.to(virtual.device)]) for x in own]


def _how(config: GenerateConfig):
    from ta.slots import Sampling

    return Sampling(config.temperature, config.top_p, config.top_k, config.repetition_penalty)


def _slots(inner, base, prompts, jobs, config, advance, finished, embeds) -> None:
    import inspect

    from transformers.cache_utils import DynamicCache

    from ta.slots import Caller, run_slots

    taken = inspect.signature(base.forward).parameters
    extra = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})

    def forward(inputs):
        if "position_ids" not in taken:
            inputs.pop("position_ids")  # such models (ALiBi) count real tokens in the mask
        return inner(**inputs, **extra).logits[:, -1]  # (B, V)

    table = base.get_input_embeddings().weight
    layers = len(DynamicCache(config=base.config).layers)
    vocabulary = base.get_output_embeddings().weight.shape[0]
    run_slots(Caller(forward, advance, finished), layers, prompts, jobs, _how(config), config.slots, embeds, vocabulary, table.device)


def _batches(inner, prompts, jobs, config, rows: int) -> Iterator[list[int]]:
    """Jobs in batches of like length; of one length where padding would be penalised, or stand behind virtual tokens, or where limits differ."""
    from ta.adapters import is_prompt_learning

    equal = config.repetition_penalty != 1 or is_prompt_learning(inner) or any(job.limit < config.max_new_tokens for job in jobs)
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
    padded = left_pad([prompts[i] for i in chosen], device)
    padded.pop("position_ids")  # generate makes its own of the mask
    if embeds is not None:
        padded["inputs_embeds"] = left_pad([embeds[i] for i in chosen], device)["inputs_embeds"]
    return padded


def _driven(inner, prompts, jobs, config, advance, finished, embeds) -> None:
    """transformers' generate runs the model and keeps its cache; our own function chooses every token."""
    import torch

    from ta.slots import choose

    device = next(inner.parameters()).device
    for batch in _batches(inner, prompts, jobs, config, config.slots):
        ids, logprobs, done = [[] for _ in batch], [[] for _ in batch], [False] * len(batch)

        def pick(_, logits, batch=batch, ids=ids, logprobs=logprobs, done=done):
            n = max(len(row) for row in ids)
            uniforms = torch.tensor([(*jobs[j].uniforms, 0.0)[min(n, jobs[j].limit)] for j in batch]) if config.temperature else None
            seen = None
            if config.repetition_penalty != 1:
                seen = torch.zeros_like(logits, dtype=torch.bool)
                for row, j in enumerate(batch):
                    seen[row, torch.tensor([*prompts[jobs[j].prompt], *ids[row]], dtype=torch.long)] = True
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
    for batch in _batches(inner, prompts, firsts, config, max(1, config.slots // config.beams)):
        inputs = _inputs(prompts, firsts, batch, embeds, device)
        width = inputs["input_ids"].shape[1]

        def stopped(rows, _, width=width):
            return torch.tensor([bool(row[width:]) and ending.reached(row[width:]) for row in rows.tolist()], device=device)

        out = inner.generate(
            **inputs,
            max_new_tokens=firsts[batch[0]].limit,
            num_beams=config.beams,
            num_return_sequences=config.num_answers,
            repetition_penalty=config.repetition_penalty,
            do_sample=False,
            eos_token_id=sorted(ending.stop_ids) or None,
            pad_token_id=min(ending.stop_ids, default=0),
            stopping_criteria=[stopped] if config.stop_strings else [],
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
