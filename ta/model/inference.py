"""Models opened for use instead of training: a base, or an adapter with its base, from the folders that a run leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from ta.folders import ModelConfig, read_folder, resolve
from ta.generation.settings import context_of
from ta.model.adapters import labels_of
from ta.model.load import load_for_inference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ta.chat.render import Tokens
    from ta.chat.tokenizer import ChatTokenizer
    from ta.generation.settings import Answer
    from ta.generation.vllm_engine import VllmConfig
    from ta.media.settings import Opened


def labels_in(config: ModelConfig) -> int:
    """How many scores the head of a saved classifier gives. ValueError for a model without one."""
    sources = resolve(config)
    if sources.adapter:
        return labels_of(sources.adapter)["num_labels"]
    found = read_folder(sources.base, config.hub)
    if found.kind != "classifier":
        raise ValueError(
            f"{found.path} is no reward model or classifier ({found.config.get('architectures')}): give what rm.py or classify.py exported"
        )
    return len(found.config.get("id2label") or (0, 1))


def vllm_settings(
    engine: Literal["hf", "vllm"], given: VllmConfig, world: int
) -> VllmConfig | None:
    """vLLM's settings where it is the engine; ValueError where they are given to the other one, or where torchrun started several of us."""
    from ta.generation.vllm_engine import VllmConfig

    if engine == "vllm" and world > 1:
        raise ValueError(
            "vLLM starts its own processes: run it without torchrun, with --tensor-parallel-size"
        )
    changed = [
        f.name.replace("_", "-")
        for f in dataclasses.fields(given)
        if getattr(given, f.name) != getattr(VllmConfig(), f.name)
    ]
    if engine == "hf" and changed:
        raise ValueError(f"--{changed[0]} is a setting of vLLM: add --engine vllm, or leave it out")
    return given if engine == "vllm" else None


def open_generator(
    config: ModelConfig,
    tokenizer: ChatTokenizer,
    device: str,
    vllm: VllmConfig | None = None,
    seed: int = 0,
    media: Opened | None = None,
) -> tuple[Callable[..., list[list[Answer]]], int, int | None]:
    """(`generate` or, with vLLM's settings, `generate_vllm` with its model: (prompts, settings, stop ids, ...) -> answers; embeddings; context).

    With `media` the function also takes the prompts' pictures and sounds, as `answer_media` does.
    """
    if vllm is not None:
        from ta.generation.vllm_engine import generate_vllm, open_engine

        engine = open_engine(
            *_sources(config, tokenizer.fast), vllm, seed, embeds=media is not None
        )
        run, model, sizes = (
            partial(generate_vllm, engine),
            None,
            (engine.vocabulary, engine.context),
        )
    else:
        from ta.generation.generate import generate, limits_of

        model = load_for_inference(config, device)
        run, sizes = partial(generate, model, tokenizer.fast), limits_of(model)
    if media is not None:
        from ta.media.multimodal import Table, answer_media, media_model_for_inference

        inner = Table(load_for_inference(config)) if model is None else model  # vLLM holds the rest
        run = partial(answer_media, media, media_model_for_inference(media, tokenizer, inner), run)
    return run, *sizes


def open_scorer(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int,
    device: str,
    max_tokens_per_micro: int,
    vllm: VllmConfig | None = None,
) -> tuple[Callable[[Sequence[Tokens]], list[list[float]]], int, int | None]:
    """(`scorer` of the classifier in `config`, on vLLM where its settings are given; embeddings; context)."""
    if vllm is not None:
        from ta.generation.vllm_engine import open_engine, score_vllm

        engine = open_engine(*_sources(config, tokenizer), vllm, num_labels=num_labels)
        return partial(score_vllm, engine), engine.vocabulary, engine.context
    model = load_for_inference(config, device, num_labels)
    return (
        scorer(model, max_tokens_per_micro),
        len(model.get_input_embeddings().weight),
        context_of(model.config),
    )


def _sources(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelConfig, PreTrainedTokenizerBase, str | None]:
    """What `open_engine` takes first: the base, its tokenizer, and the adapter's folder."""
    sources = resolve(config)
    base = dataclasses.replace(config, model_path=sources.base, adapter_path=None)
    return base, tokenizer, sources.adapter


def scorer(
    model: PreTrainedModel, max_tokens_per_micro: int
) -> Callable[[Sequence[Tokens]], list[list[float]]]:
    """Function from token sequences to the C scores of each, read at its last token, whatever it is batched with."""
    import numpy as np
    import torch

    from ta.data.batch import lay_out, to_device
    from ta.data.loader import split_micro
    from ta.model.language_model import wrap

    wrapper, _ = wrap(model)
    packed, device = wrapper.mode == "packed", next(model.parameters()).device

    def score(sequences: Sequence[Tokens]) -> list[list[float]]:
        """A row of scores for each sequence."""
        results: list = [None] * len(sequences)
        for places in split_micro(
            [len(s.ids) for s in sequences], max_tokens_per_micro, packed=packed
        )[0]:
            if places:
                ids = [np.array(sequences[i].ids) for i in places]
                with torch.no_grad():
                    rows = wrapper.scores(
                        to_device(lay_out(ids, [np.zeros(len(x)) for x in ids], packed), device)
                    )  # (N, C)
                for i, row in zip(places, rows.double().cpu().tolist(), strict=True):
                    results[i] = row
        return results

    return score
