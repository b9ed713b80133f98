"""What answers in rollouts: the model itself, or a vLLM that gets its weights after each update."""

from __future__ import annotations

import copy
import dataclasses
import math
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
from ta.parallel import local_rows, rank, sum_over_ranks, world

Engine = VllmEngine | VllmServer
# weights whose bits are multiplied at once
WEIGHTS_AT_ONCE = 1 << 22


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
    if world() > 1 and hasattr(model.inner, "get_base_model"):
        raise ValueError(
            f"--engine {engine}: an adapter is merged on one process alone: run it without "
            "torchrun, or leave --adapter out"
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
    """A hash of the bits of all weights that train and of their places in each tensor.

    It is the same on any number of processes.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    totals = sum_over_ranks(torch.stack([_sum_of_bits(p) for p in trained.values()]))
    return int(hash_json([list(trained), totals.tolist()])[:15], 16)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, each times the factors of its row and column, of this process."""
    first, rows, width = 0, len(tensor) if tensor.dim() else 1, math.prod(tensor.shape[1:])
    if sharded := hasattr(tensor, "to_local"):
        first, rows = local_rows(tensor)
        tensor = tensor.to_local()
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(kind).reshape(rows, width)
    across, down = _factors(-width, width, bits.device), _factors(first, rows, bits.device)
    # products are as wide as the sum: a few rows at a time
    some = bits.split(max(1, WEIGHTS_AT_ONCE // width))
    sums = torch.cat([(part * across).sum(1) for part in some])
    # what is not sharded is the same everywhere
    return (sums * down).sum() * (sharded or rank() == 0)


def _factors(first: int, number: int, device: torch.device) -> Tensor:
    """(number,) odd numbers that look random, from the one of place `first` on; products wrap."""
    mixed = torch.arange(first, first + number, device=device) * 0x1E3779B97F4A7C15
    return mixed ^ (mixed >> 32) | 1
