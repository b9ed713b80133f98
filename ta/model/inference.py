"""Models opened for use instead of training: a base, or an adapter with its base, from the folders that a run leaves."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ta.generation.settings import context_of
from ta.model.adapter_base import labels_of
from ta.model.load import ModelConfig, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ta.chat.render import Tokens
    from ta.chat.tokenizer import ChatTokenizer
    from ta.generation.settings import Answer
    from ta.generation.vllm_engine import VllmConfig
    from ta.media.settings import Opened


@dataclass(frozen=True)
class InferenceConfig:
    model_path: str = "builtin"
    """Folder of a model, or of an adapter whose base is still where it was; a run's is RUN/final. "builtin" has learned nothing yet."""
    adapter_path: str | None = None
    """Folder of an adapter for the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic and weights; auto is bfloat16 on accelerators and float32 on CPU."""
    model_args: tuple[str, ...] = ()
    """Further key=value arguments of from_pretrained, such as attn_implementation=flash_attention_2."""
    hub: bool = False
    """Allow model names to be looked up on the Hugging Face hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders you trust."""


def resolve(config: InferenceConfig) -> tuple[ModelConfig, str | None]:
    """What to load: the base, and the adapter or None."""
    base, adapter = find_base(config.model_path, config.adapter_path)
    rest = {
        name: getattr(config, name) for name in ("dtype", "model_args", "hub", "trust_remote_code")
    }
    return ModelConfig(model_path=base, **rest), adapter


def stand_alone() -> tuple[int, int, str]:
    """(rank, world, device) where torchrun started several of us; from then on this process is one of its own and waits for nobody."""
    import torch

    rank, world = int(os.environ.pop("RANK", "0")), int(os.environ.pop("WORLD_SIZE", "1"))
    return (
        rank,
        world,
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu",
    )


def find_base(model_path: str, adapter_path: str | None) -> tuple[str, str | None]:
    """(base, adapter or None): an adapter's folder given as the model is that adapter on the base it names."""
    folder = Path(model_path)
    if (
        adapter_path is not None
        or (folder / "config.json").exists()
        or not (folder / "adapter_config.json").exists()
    ):
        return model_path, adapter_path
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise ValueError(
            f"{model_path} is an adapter of base {base!r}, which is not here: give the base in --model-path, this in --adapter-path"
        )
    return base, model_path


def open_for_inference(
    config: ModelConfig,
    adapter_path: str | None = None,
    device: str = "cpu",
    kind: Literal["causal", "seq_cls"] = "causal",
    num_labels: int = 1,
) -> PreTrainedModel:
    """The model in `config`, with the adapter merged into it (LoRA) or around it (prompt learning), in eval mode and in the arithmetic asked.

    Weights are held in that arithmetic: `auto` is bfloat16 on accelerators and float32 on CPU.
    """
    import torch

    model = load_model(config, kind, num_labels, device)
    if adapter_path is not None:
        from ta.model.adapters import is_prompt_learning, load_adapter, merge_adapter

        adapted = load_adapter(model, adapter_path)
        model = adapted if is_prompt_learning(adapted) else merge_adapter(adapted)
    if config.dtype == "bfloat16" or (config.dtype == "auto" and device.startswith("cuda")):
        for (
            parameter
        ) in model.parameters():  # not .to(dtype), which would round the rotary frequencies as well
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.requires_grad_(False).eval()


def labels_in(folder: str, adapter: str | None) -> int:
    """How many scores the head of a saved classifier gives. ValueError for a model without such a head."""
    if adapter:
        return labels_of(adapter)["num_labels"]
    settings = json.loads((Path(folder) / "config.json").read_text())
    if not any("SequenceClassification" in name for name in settings.get("architectures") or ()):
        raise ValueError(
            f"{folder} is no reward model or classifier ({settings.get('architectures')}): give what rm.py or classify.py exported"
        )
    return len(settings.get("id2label") or (0, 1))


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
    adapter_path: str | None,
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
            config, tokenizer.fast, adapter_path, vllm, seed, embeds=media is not None
        )
        run, model, sizes = (
            partial(generate_vllm, engine),
            None,
            (engine.vocabulary, engine.context),
        )
    else:
        from ta.generation.generate import generate, limits_of

        model = open_for_inference(config, adapter_path, device)
        run, sizes = partial(generate, model, tokenizer.fast), limits_of(model)
    if media is not None:
        from ta.media.multimodal import Table, answer_media, seeing

        inner = (
            Table(open_for_inference(config, adapter_path)) if model is None else model
        )  # vLLM holds the rest
        run = partial(answer_media, media, seeing(media, tokenizer, inner), run)
    return run, *sizes


def open_scorer(
    config: ModelConfig,
    adapter_path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int,
    device: str,
    max_tokens_per_micro: int,
    vllm: VllmConfig | None = None,
) -> tuple[Callable[[Sequence[Tokens]], list[list[float]]], int, int | None]:
    """(`scorer` of the classifier in `config`, on vLLM where its settings are given; embeddings; context)."""
    if vllm is not None:
        from ta.generation.vllm_engine import open_engine, score_vllm

        engine = open_engine(config, tokenizer, adapter_path, vllm, num_labels=num_labels)
        return partial(score_vllm, engine), engine.vocabulary, engine.context
    model = open_for_inference(config, adapter_path, device, "seq_cls", num_labels)
    return (
        scorer(model, max_tokens_per_micro),
        len(model.get_input_embeddings().weight),
        context_of(model.config),
    )


def scorer(
    model: PreTrainedModel, max_tokens_per_micro: int
) -> Callable[[Sequence[Tokens]], list[list[float]]]:
    """Function from token sequences to the C scores of each, read at its last token, whatever it is batched with."""
    import numpy as np
    import torch

    from ta.data.batch import lay_out, split_micro, to_device
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
