"""Answers to prompts given as token ids: the slot engine for most models, transformers' own generate for beams, prompt learning and unusual caches.

Letters: B rows, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from ta.generation.settings import (
    Answer,
    Ending,
    GenerateConfig,
    check_prompts,
    check_settings,
    context_of,
)

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
    fixed_shapes: bool | None = None,
) -> list[list[Answer]]:
    """`config.num_answers` answers to each prompt, in input order.

    model: a transformers or peft model, or ta's wrapper around one; its attention function, train mode and gradients are put back afterwards.
    prompts: token ids. embeds: for each prompt (L, D) in place of its tokens' embeddings. stop_ids: tokens that end an answer.
    keys: the number that each prompt's sampling is seeded with beside config.seed (its place in `prompts` by default).
    fixed_shapes: whether decode steps come in few shapes and replay as CUDA graphs (None: on a GPU); the answers are the same.
    on_answer(i, answers) is called as soon as prompt i has all its answers; on_token(i, answer, ids) after each token (not in beam search).
    ValueError: settings that exclude each other; prompts that are empty, too long for the context, or of another vocabulary; broken logits.
    """
    from ta.generation.hf_generate import run_beams, run_driven
    from ta.generation.slot_cache import attention_for, plain_cache
    from ta.generation.slot_engine import Caller, Job, Sampling, run_slots
    from ta.model.adapters import is_prompt_learning
    from ta.model.language_model import base_model

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    virtual = is_prompt_learning(inner)
    vocabulary, context = limits_of(model)
    check_settings(config)
    check_prompts(prompts, vocabulary, context)
    if embeds is not None and [len(x) for x in embeds] != [len(prompt) for prompt in prompts]:
        raise ValueError(
            "embeds and prompts differ in length: give one row of embeddings for every token of every prompt"
        )
    n = config.num_answers
    limits = [
        config.max_new_tokens
        if context is None
        else min(config.max_new_tokens, context - len(prompt))
        for prompt in prompts
    ]
    jobs = [
        Job(i, limits[i], (config.seed, i if keys is None else keys[i], k))
        for i in range(len(prompts))
        for k in range(n)
    ]
    ending = Ending(tokenizer, frozenset(stop_ids), config)
    answers: list[list[Answer | None]] = [[None] * n for _ in prompts]

    def advance(job: int, ids: list[int]) -> bool:
        if on_token is not None:
            on_token(*divmod(job, n), ids)
        return ending.reached(ids)

    def finished(job: int, ids: list[int], logprobs: list[float]) -> None:
        i, k = divmod(job, n)
        answers[i][k] = ending.answer(ids, logprobs)
        if on_answer is not None and all(answer is not None for answer in answers[i]):
            on_answer(i, answers[i])

    how = Sampling(config.temperature, config.top_p, config.top_k, config.repetition_penalty)
    driven = (
        config.beams > 1
        or not plain_cache(base)
        or (virtual and inner.active_peft_config.peft_type == "PREFIX_TUNING")
    )
    with _at_rest(model, inner, base, attention_for(base, not driven)):
        if config.beams > 1:
            run_beams(inner, prompts, jobs, config, ending, finished, embeds, virtual)
        elif driven:
            run_driven(inner, prompts, jobs, config, how, advance, finished, embeds, virtual)
        else:
            run, layers, width = _forward(base if virtual else model, base)
            fed = _with_virtual_tokens(inner, base, prompts, embeds) if virtual else embeds
            device = base.get_input_embeddings().weight.device
            fixed = device.type == "cuda" if fixed_shapes is None else fixed_shapes
            if hasattr(model, "unshard") or {p.device for p in base.parameters()} != {device}:
                fixed = False  # a graph holds the work of one device
            run_slots(
                Caller(run, advance, finished),
                layers,
                prompts,
                jobs,
                how,
                config.slots,
                fed,
                width,
                device,
                fixed,
            )
    return answers


def limits_of(model) -> tuple[int, int | None]:
    """(number of embeddings, tokens of prompt and answer at most or None), as `check_prompts` takes them."""
    from ta.model.adapters import is_prompt_learning
    from ta.model.language_model import base_model

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    context = context_of(base.config)
    if context is not None and is_prompt_learning(inner):
        context -= inner.active_peft_config.num_virtual_tokens
    return len(base.get_input_embeddings().weight), context


@contextlib.contextmanager
def _at_rest(model, inner, base, attention: str) -> Iterator[None]:
    """Evaluation mode, no gradients, attention that knows masks and caches, no generation settings of the model's own; put back after."""
    import torch
    from transformers import GenerationConfig

    training = [module for module in model.modules() if module.training]
    before, settings = base.config._attn_implementation, base.generation_config
    owners = {base} | (
        {inner} if hasattr(inner, "generation_config") else set()
    )  # peft keeps a second copy
    device, autocast = base.get_input_embeddings().weight.device, getattr(model, "autocast", None)
    try:
        model.eval()
        for owner in owners:
            owner.generation_config = GenerationConfig()
        if before in ("ta", "sdpa"):  # any other was chosen by the user
            base.set_attn_implementation(attention)
        with (
            torch.no_grad(),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            yield
    finally:
        if base.config._attn_implementation != before:
            base.set_attn_implementation(before)
        for owner in owners:
            owner.generation_config = settings
        for module in training:
            module.training = True


def _with_virtual_tokens(inner, base, prompts, embeds) -> list[Tensor]:
    """Each prompt's embeddings behind those of the virtual tokens: prompt tuning and p-tuning are no more than that."""
    import torch

    from ta.model.adapters import virtual_embeddings

    table = base.get_input_embeddings()
    virtual = virtual_embeddings(inner).to(table.weight.dtype)  # (virtual tokens, D)
    own = embeds or [table(torch.tensor(prompt, device=table.weight.device)) for prompt in prompts]
    return [torch.cat([virtual, x.to(virtual.device)]) for x in own]


def _forward(model, base) -> tuple[Callable[[dict], Tensor], int, int]:
    """The one place where the slot engine runs a model: (function from keyword arguments to the last column's logits (B, V), cached layers, V)."""
    import inspect

    from transformers.cache_utils import DynamicCache

    inner = getattr(model, "inner", model)
    if hasattr(model, "unshard"):  # a sharded root gathers its weights around its own methods only
        from torch.distributed.fsdp import register_fsdp_forward_method

        if not hasattr(model, "run_inner"):
            model.run_inner = model.inner.__call__
            register_fsdp_forward_method(model, "run_inner")
        inner = model.run_inner
    taken = inspect.signature(base.forward).parameters
    extra = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})

    def forward(inputs: dict) -> Tensor:
        if "position_ids" not in taken:
            inputs.pop("position_ids")  # such models (ALiBi) count real tokens in the mask
        return inner(**inputs, **extra).logits[:, -1]  # (B, V)

    return (
        forward,
        len(DynamicCache(config=base.config).layers),
        base.get_output_embeddings().weight.shape[0],
    )
