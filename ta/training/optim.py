"""The optimizer over the weights that train, and one update."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ta.parallel import blocks, local_rows, rank, whole_tensor, world
from ta.training.settings import OptimConfig


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, lr_scales: dict[str, float] | None = None
) -> list[dict]:
    """The weights that train, in groups for an optimizer: matrices decay, other tensors do not.

    `lr_scales` maps a prefix of parameter names to a factor on the learning rate ("lr_scale" in a
    group, which `train` reads). ValueError where every weight is frozen.
    """
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
    rounded = config.weights == "bfloat16"
    if rounded and not (config.optimizer == "adamw8bit" and model.half_precision):
        raise ValueError("--weights bfloat16 needs --optimizer adamw8bit and --dtype bfloat16")
    groups = parameter_groups(model, config.weight_decay, lr_scales)
    betas = config.beta1, config.beta2
    if config.optimizer == "muon":
        matrices = {id(p) for block in blocks(model) for p in block.parameters()}
        return MuonAndAdamW(groups, matrices, config.lr, betas)
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


class Muon(torch.optim.Muon):
    """torch's; a sharded matrix is made orthogonal whole, by one of the processes.

    The result is that of one process, also where a matrix has fewer rows than there are processes.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step; `closure` is not taken."""
        if world() == 1:
            return super().step()
        matrices = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        own: dict[int, Tensor] = {}
        for place, (matrix, group) in enumerate(matrices):
            moment = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix.grad))
            moment.lerp_(matrix.grad, 1 - group["momentum"])
            ahead = whole_tensor(matrix.grad.lerp(moment, group["momentum"]))
            if place % world() == rank():
                own[place] = torch.zeros_like(ahead)
                own[place].grad = ahead
        plain = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False}
        for place, change in own.items():
            group = matrices[place][1]
            kind = {"lr": group["lr"], "adjust_lr_fn": group["adjust_lr_fn"]}
            torch.optim.Muon([change], **kind, **plain).step()
            change.grad = None
        for place, (matrix, group) in enumerate(matrices):
            change = own.pop(place, None)
            if change is None:
                change = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
            torch.distributed.broadcast(change, place % world())
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            first, rows = local_rows(matrix)
            matrix.to_local().add_(change[first : first + rows])


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW, with one state and one list of groups.

    `groups` are those of AdamW; the (I, O) parameters among them whose ids are `matrices` go to
    Muon, with updates as large as AdamW's (Liu et al. 2025).
    """

    def __init__(
        self,
        groups: list[dict],
        matrices: Collection[int],
        lr: float,
        betas: tuple[float, float],
    ):
        turned, others = [], []
        for group in groups:
            for chosen, goes in ((turned, True), (others, False)):
                own = [p for p in group["params"] if (p.dim() == 2 and id(p) in matrices) == goes]
                if own:
                    chosen.append({**group, "params": own})
        self.parts: list[torch.optim.Optimizer] = []
        if turned:
            self.parts.append(Muon(turned, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.defaults = {"betas": betas, "momentum": 0.95}
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step of both; `closure` is not taken."""
        for part in self.parts:
            part.step()


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
