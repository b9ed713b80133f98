"""What answers in rollouts: the model itself, or a vLLM that gets its weights after each update."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ta.chat.tokenizer import ChatTokenizer
from ta.files import hash_json
from ta.folders import ModelConfig, resolve
from ta.generation.vllm_engine import VllmConfig, VllmEngine, start_vllm
from ta.generation.vllm_server import VllmServer, open_server
from ta.model.adapters import merge_adapter
from ta.model.language_model import LanguageModel
from ta.parallel import rank, sum_over_ranks

Engine = VllmEngine | VllmServer


def start_engine(
    engine: str,
    vllm: VllmConfig,
    config: ModelConfig,
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    folder: Path,
) -> Engine | None:
    """A started vLLM for the rollouts of a model that was loaded from `config`; None for hf.

    `engine` may be the URL of a server, which reads weights from `folder`. ValueError where it
    could not get the weights.
    """
    if engine == "hf":
        return None
    if tokenizer.new_tokens or model.mode == "native":
        raise ValueError(
            f"--engine {engine} in rollouts takes whole weights, without added tokens and prompt "
            "learning: leave them or --engine out"
        )
    if engine != "vllm":
        return open_server(engine, "--engine", tokenizer, folder)
    base = dataclasses.replace(config, model_path=resolve(config).base, adapter_path=None)
    return start_vllm(base, tokenizer.fast, vllm, rollouts=True)


def merged_weights(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights of the base; a LoRA adapter is merged into a copy of it.

    A tensor that is tied comes under each of its names: vLLM keeps an old head otherwise.
    """
    inner = model.inner
    if hasattr(inner, "get_base_model"):
        inner = merge_adapter(copy.deepcopy(inner))
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        yield name, parameter.detach()


def weights_hash(model: LanguageModel) -> int:
    """A hash of the bits of all weights that train, the same on any number of processes."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sums = []
    for tensor in trained.values():
        sharded = hasattr(tensor, "to_local")
        local = tensor.to_local() if sharded else tensor
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        counted = local.contiguous().view(kind).sum(dtype=torch.int64)
        # what is not sharded is the same everywhere
        sums.append(counted * (sharded or rank() == 0))
    totals = sum_over_ranks(torch.stack(sums))
    return int(hash_json([list(trained), totals.tolist()])[:15], 16)
