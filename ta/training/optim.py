"""The optimizer, the learning rate as a pure function of the step, and one update."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from ta.command_line import Range
from ta.folders import ModelConfig, resolve
from ta.parallel import blocks, whole_tensor, world

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, lr_scales: dict[str, float] | None = None
) -> list[dict]:
    """The weights that train, in groups for an optimizer: matrices decay, other tensors do not.

    `lr_scales` maps a prefix of parameter names to a factor on the learning rate ("lr_scale" in a
    group, which `train` reads). ValueError where every weight is frozen.
    """
    import torch

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 and id(parameter) not in embeddings
            scales = (lr_scales or {}).items()
            scale = next((factor for prefix, factor in scales if name.startswith(prefix)), 1.0)
            groups.setdefault((weight_decay if matrix else 0.0, scale), []).append(parameter)
    if not groups:
        raise ValueError(
            "nothing to train: every weight is frozen; add an adapter or unfreeze a part"
        )
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def make_optimizer(
    model: nn.Module, config: OptimConfig, lr_scales: dict[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer over the weights that train (see `parameter_groups`).

    With --weights bfloat16 these weights are cast, in place. ValueError where torchao is not there
    or the weights are sharded, which its moments in 8 bits are not.
    """
    import torch

    rounded = config.weights == "bfloat16"
    if rounded and not (config.optimizer == "adamw8bit" and model.half_precision):
        raise ValueError("--weights bfloat16 needs --optimizer adamw8bit and --dtype bfloat16")
    groups = parameter_groups(model, config.weight_decay, lr_scales)
    betas = config.beta1, config.beta2
    if config.optimizer == "muon":
        from ta.training.muon import MuonAndAdamW

        return MuonAndAdamW(groups, _of_blocks(model), config.lr, betas)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    if world() > 1:
        raise ValueError(
            "--optimizer adamw8bit does not shard its moments over processes: give another, or "
            "train on one process"
        )
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"--optimizer adamw8bit needs torchao (pip install torchao): {error}"
        ) from error
    for group in groups if rounded else ():
        for parameter in group["params"]:
            parameter.data = parameter.data.to(torch.bfloat16)
    return AdamW8bit(groups, lr=config.lr, betas=betas, bf16_stochastic_round=rounded)


def _of_blocks(model: nn.Module) -> set[int]:
    """The ids of the parameters in transformer blocks."""
    return {id(parameter) for block in blocks(model) for parameter in block.parameters()}


def set_lr(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each group of parameters."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if hasattr(group["lr"], "fill_"):
            # torchao's compiled code reads it there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update(
    optimizer: torch.optim.Optimizer, lr: float, loss: Tensor, count: Tensor, clip: float
) -> Tensor:
    """Divide the summed gradients by `count`, clip them and take one optimizer step.

    Returns the gradient norm, nan where it or the loss is not finite: fused AdamW then moves
    nothing, other optimizers leave weights that must not be used. `loss`, `count` and the norm are
    () tensors on the device, which is not waited for. The gradients are left to the caller.
    ValueError where no weight has one.
    """
    import torch

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("the loss reaches no weight that the optimizer holds: nothing is learned")
    norm = torch.nn.utils.get_total_norm(grads)
    norm = whole_tensor(norm) / count
    finite = norm.isfinite() & loss.isfinite()
    divisor = count * ((norm + 1e-6) / clip).clamp(min=1) if clip else count
    # gradients that are not finite stay as they are, to be looked at
    divisor = divisor.where(finite, 1.0)
    set_lr(optimizer, [lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups])
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's own names for the divisor and for the sign to skip the step
        optimizer.grad_scale, optimizer.found_inf = divisor.float(), (~finite).float()
    else:
        torch._foreach_div_(grads, divisor.to(grads[0].dtype))
    optimizer.step()
    return norm.where(finite, math.nan)
