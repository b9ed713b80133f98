"""AdamW and its learning rate, a pure function of the step; one update from summed gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ta.builtin.models import TINY_LR

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = None
    """Peak learning rate. Default: 2e-5, with an adapter 2e-4; for dpo and kto 1e-6 and 1e-5; more on the built-in model."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.03
    """Steps of linear warm-up: a share of all steps below 1, a count from 1 on."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this share of --lr."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only (not on biases, norms or embeddings)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    clip: float = 1.0
    """Greatest global gradient norm; 0 does not clip."""


USUAL_LR = (2e-5, 2e-4, TINY_LR)
SEEING_LR = (2e-5, 2e-4, 8e-4)
REWARD_LR = (2e-5, 2e-4, 7e-4)
PREFERENCE_LR = (1e-6, 1e-5, 1e-4)


def with_default_lr(
    config: OptimConfig, model_path: str, adapter: str, usual: tuple[float, float, float] = USUAL_LR
) -> OptimConfig:
    """The config with a learning rate: the one given, or the one of `usual` that fits what trains (all weights, an adapter, a built-in model)."""
    whole, adapted, builtin = usual
    lr = builtin if model_path.startswith("builtin") else whole if adapter == "none" else adapted
    return config if config.lr is not None else replace(config, lr=lr)


def check_optim(config: OptimConfig) -> None:
    """ValueError for a setting with which nothing can be trained."""
    limits = {
        "lr": (0, math.inf),
        "warmup": (0, math.inf),
        "min_lr_ratio": (0, 1),
        "weight_decay": (0, math.inf),
        "clip": (0, math.inf),
    }
    for name, (low, high) in (limits | {"beta1": (0, 1 - 1e-9), "beta2": (0, 1 - 1e-9)}).items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            upper = "up" if high == math.inf else f"to {high:g}" if high == 1 else "to below 1"
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: give a number from {low} {upper}"
            )


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then cosine or linear to min_lr_ratio * lr, or constant."""
    warmup = config.warmup if config.warmup >= 1 else math.ceil(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        config.schedule
    ]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def make_optimizer(
    model: nn.Module, config: OptimConfig, lr_scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW over what trains, in groups by decay and by `lr_scales` (parameter name prefix -> factor on the learning rate)."""
    import torch

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = (
                config.weight_decay
                if parameter.dim() >= 2 and id(parameter) not in embeddings
                else 0.0
            )
            scale = next(
                (factor for prefix, factor in (lr_scales or {}).items() if name.startswith(prefix)),
                1.0,
            )
            groups.setdefault((decay, scale), []).append(parameter)
    if not groups:
        raise ValueError(
            "nothing to train: every weight is frozen; add an adapter or unfreeze a part"
        )
    options = [
        {"params": p, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), p in groups.items()
    ]
    return torch.optim.AdamW(options, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def update(
    optimizer: torch.optim.Optimizer,
    parameters: list,
    lr: float,
    scale: float,
    clip: float,
    loss: float,
) -> float:
    """Divide the summed gradients, clip, step; the gradient norm, or nan (nothing updated) where loss or norm is not finite."""
    import torch

    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item() * scale
    if not (math.isfinite(norm) and math.isfinite(loss)):
        return math.nan
    factor = scale * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    torch._foreach_mul_(grads, factor)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
