"""Settings of the optimizer; the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

from ta.command_line import Range
from ta.folders import ModelConfig, resolve
from ta.model.settings import AdapterConfig


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate at each step and the clipping, for any optimizer."""

    lr: Annotated[float | None, Range(0)] = None
    """Peak learning rate. Default: 2e-5, with an adapter 2e-4; for dpo, kto and grpo 1e-6 and 1e-5,
    for distill 1e-5 and 1e-4; more on the built-in model."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Range(0)] = 0.03
    """Steps of linear warm-up: a share of all steps below 1, a count from 1 on."""
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.0
    """The schedule ends at this share of --lr."""
    clip: Annotated[float, Range(0)] = 1.0
    """Greatest global gradient norm; 0 does not clip."""

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `steps`.

        A linear warm-up comes first, then cosine or linear decay to min_lr_ratio * lr, or a
        constant.
        """
        warmup = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left[self.schedule])


@dataclass(frozen=True)
class OptimConfig(ScheduleConfig):
    """The optimizer, and its learning rate at each step."""

    weight_decay: Annotated[float, Range(0)] = 0.0
    """AdamW's decoupled decay, on matrices only (not on biases, norms or embeddings)."""
    beta1: Annotated[float, Range(0, below=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Range(0, below=1)] = 0.95
    """AdamW's decay of the second moment."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw8bit holds its moments in 8 bits (needs torchao). muon makes the updates of the blocks'
    matrices orthogonal (Jordan et al. 2024) and as large as AdamW's, which moves the rest."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Type in which trained weights and gradients are held. bfloat16 takes half the memory: updates
    are rounded up or down at random, right on average (needs adamw8bit and --dtype bfloat16)."""


Optim = TypeVar("Optim", bound=ScheduleConfig)


def with_default_lr(
    config: Optim,
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    full: float,
    adapted: float,
    builtin: float,
) -> Optim:
    """The config with a learning rate: the one given, or the default for what trains.

    `full` is for all weights, `adapted` for an adapter, `builtin` for a built-in tiny model.
    """
    if config.lr is not None:
        return config
    has_adapter = adapter.adapter != "none" or resolve(model).adapter is not None
    lr = adapted if has_adapter else full
    return replace(config, lr=builtin if model.model_path.startswith("builtin") else lr)
