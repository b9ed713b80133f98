"""Answers to prompts given as token ids, by the engine that fits.

The slot engine for most models; transformers' own generate for beams, prefix tuning and unusual
caches; vLLM where it was started.
Letters: B rows, L prompt tokens, V vocabulary, D model width.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ta.command_line import check_config
from ta.generation.hf_generate import run_beams, run_driven, sees_padding, takes_positions
from ta.generation.settings import Answer, Ending, GenerateConfig, check_prompts, context_of
from ta.generation.slot_cache import attention_for, plain_cache
from ta.generation.slot_engine import SlotEngine, Work
from ta.generation.vllm_engine import VllmEngine, generate_vllm
from ta.model.adapters import is_prompt_learning, rows_in_tables
from ta.model.language_model import base_model, evaluating
from ta.model.new_rows import table_rows
from ta.parallel import of_rank_zero, unsharded


def generate(
    model,
    tokenizer: PreTrainedTokenizerBase,
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

    model: a transformers or peft model, a LanguageModel around one, or a started vLLM; a model's
    attention function, train mode and gradients are put back afterwards.
    tokenizer: that of transformers, such as `ChatTokenizer.fast`.
    prompts: token ids. embeds: for each prompt (L, D) in place of its tokens' embeddings.
    stop_ids: tokens that end an answer.
    keys: the number that each prompt's sampling is seeded with beside config.seed (its place in
    `prompts` by default).
    on_answer(i, answers) is called as soon as prompt i has all its answers; on_token(i, answer,
    ids) after each token (not in beam search, not by vLLM).
    fixed_shapes: whether decode steps come in few shapes and replay as CUDA graphs (None: on a
    GPU); the answers are the same.
    ValueError: settings that exclude each other; prompts that are empty, too long for the context,
    or of another vocabulary, or text; a model with a head of scores; broken logits.
    """
    check_config(config)
    if isinstance(model, VllmEngine):
        return generate_vllm(model, prompts, config, stop_ids, on_answer, embeds, keys)

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    virtual = is_prompt_learning(inner)
    vocabulary, context = limits_of(model)
    check_prompts(prompts, vocabulary, context)
    prompts = [[*map(int, prompt)] for prompt in prompts]
    if base.get_output_embeddings() is None:
        raise ValueError("a model with a head of scores writes no answers: give a language model")
    if embeds is not None and [*map(len, embeds)] != [*map(len, prompts)]:
        raise ValueError(
            "embeds and prompts differ in length: give one row of embeddings for every token "
            "of every prompt"
        )
    room = math.inf if context is None else context
    work = Work(
        prompts,
        embeds,
        [min(config.max_new_tokens, room - len(prompt)) for prompt in prompts],
        range(len(prompts)) if keys is None else keys,
        Ending(tokenizer, frozenset(stop_ids), config),
        on_answer,
        on_token,
        [[None] * config.num_answers for _ in prompts],
    )
    prefix = virtual and inner.active_peft_config.peft_type == "PREFIX_TUNING"
    driven = config.beams > 1 or prefix or not plain_cache(base)
    temperature = getattr(model, "temperature", 1.0)
    run = base if virtual else inner
    with (
        unsharded(model, root_only=True),
        _inference_mode(model, inner, base, attention_for(base, not driven)),
        contextlib.nullcontext() if hasattr(model, "unshard") else rows_in_tables(inner),
    ):
        if config.beams > 1:
            run_beams(inner, work, temperature, virtual)
        elif driven or (not takes_positions(base) and sees_padding(run, base)):
            run_driven(inner, work, temperature, virtual)
        else:
            if virtual:
                work = work._replace(embeds=_with_virtual_tokens(inner, base, prompts, embeds))
            _run_slots(model, run, base, work, temperature, fixed_shapes)
    return work.answers


def _run_slots(
    model, run: Callable, base, work: Work, temperature: float, fixed_shapes: bool | None
) -> None:
    """Do the work in the slot engine, as `generate` says of `fixed_shapes`."""
    device = base.device
    if fixed_shapes is None:
        fixed_shapes = device.type == "cuda"
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    held = all(getattr(module, "held", False) for module in sharded)
    # a graph holds the work of one device, on weights that stay where they are
    graphs = held and {p.device for p in base.parameters()} == {device}
    half = None if getattr(model, "reads_ids", False) else getattr(model, "autocast", None)
    forward = _forward(run, base, temperature, half)
    # else processes whose last bits differ would choose other tokens, and wait for ever
    alike = forward if held else lambda inputs: of_rank_zero(forward(inputs))
    answer = SlotEngine(alike, work, device, fixed_shapes and graphs).run
    model.inside(answer) if sharded and held else answer()


def limits_of(model) -> tuple[int, int | None]:
    """(Embeddings of a model or a started vLLM, tokens of prompt and answer at most or None).

    `check_prompts` takes them.
    """
    if isinstance(model, VllmEngine):
        return model.vocabulary, model.context

    inner = getattr(model, "inner", model)
    base = base_model(inner)
    context = context_of(base.config)
    if context is not None and is_prompt_learning(inner):
        context -= inner.active_peft_config.num_virtual_tokens
    return table_rows(base), context


@contextlib.contextmanager
def _inference_mode(model, inner, base, attention: str) -> Iterator[None]:
    """Evaluation mode, no gradients, `attention`, no generation settings of the model's own.

    All is put back after.
    """
    before, settings = base.config._attn_implementation, base.generation_config
    device, autocast = base.device, getattr(model, "autocast", None)
    # on a GPU without cuDNN's attention: it plans anew for each length of the keys
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    try:
        # peft keeps a second copy
        base.generation_config = inner.generation_config = GenerationConfig()
        if before in ("ta", "sdpa"):  # any other was chosen by the user
            base.set_attn_implementation(attention)
        with (
            evaluating(model),
            # graphs and events are those of the current device
            torch.accelerator.device_index(None if device.type == "cpu" else device.index),
            sdpa_kernel(kernels),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            yield
    finally:
        if base.config._attn_implementation != before:
            base.set_attn_implementation(before)
        base.generation_config = inner.generation_config = settings


def _with_virtual_tokens(inner, base, prompts, embeds) -> list[Tensor]:
    """Each prompt's embeddings behind those of the virtual tokens.

    Prompt tuning and p-tuning are no more than that.
    """
    table = base.get_input_embeddings()
    virtual = inner.get_prompt(batch_size=1)[0].to(table.weight.dtype)  # (virtual tokens, D)
    if embeds is None:
        embeds = [table(torch.tensor(prompt, device=table.weight.device)) for prompt in prompts]
    return [torch.cat([virtual, x.to(virtual.device)]) for x in embeds]


def _forward(
    run: Callable, base, temperature: float, half: torch.dtype | None
) -> Callable[[dict], Tensor]:
    """A function from keyword arguments of `run` to the last column's logits (B, V).

    In `half` precision embeddings are given, as in training, so that keys are held in it too.
    """
    # transformers' models differ in what they take
    taken, positions = inspect.signature(base.forward).parameters, takes_positions(base)
    extra = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in taken else {})
    table = base.get_input_embeddings()

    def forward(inputs: dict) -> Tensor:
        if not positions:
            inputs.pop("position_ids")  # such models (ALiBi) count real tokens in the mask
        if half is not None:
            embeds = inputs.get("inputs_embeds")
            embeds = table(inputs.pop("input_ids")) if embeds is None else embeds
            inputs["inputs_embeds"] = embeds.to(half)
        logits = run(**inputs, **extra).logits[:, -1]  # (B, V)
        return logits if temperature == 1.0 else logits / temperature

    return forward
