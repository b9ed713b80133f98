"""What a run will hold in the memory of one device, by part, found before its first step."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ta.data.loader import Feed

STEPS_LOOKED_AT = 32


def estimate(model: nn.Module, feed: Feed, step, before_step=None) -> dict[str, float]:
    """GB at the peak of a step on this device: weights, gradients and AdamW moments of this process's share, and activations: all that the
    largest of the first micro-batches needs besides, measured by running it forward and backward. Leaves no gradients behind."""
    import torch

    from ta.data.batch import batch_of, to_device

    weights = sum({id(t): _size(t) for t in (*model.parameters(), *model.buffers())}.values())
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    firsts = [
        batch
        for number in range(min(STEPS_LOOKED_AT, feed.steps))
        for batch in feed.batches(number)
    ]
    device = next(model.parameters()).device
    largest = to_device(max(firsts, key=lambda batch: batch_of(batch).tokens.numel()), device)
    if before_step:
        largest = max(
            before_step(model, [largest]), key=lambda batch: batch_of(batch).tokens.numel()
        )
    for (
        parameter
    ) in model.parameters():  # they are there from the second micro-batch on, while activations are
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(model, largest)[0].backward()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = _peak_of(lambda: step(model, largest)[0].backward())
    model.zero_grad(set_to_none=True)
    parts = {
        "weights": weights,
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "activations": peak,
    }
    return {name: size / 1e9 for name, size in (parts | {"in all": sum(parts.values())}).items()}


def report(model: nn.Module, feed: Feed, step, before_step=None) -> str:
    """Parameters, trained ones, steps and the estimate, for a person."""
    total, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or every)
        for every in (True, False)
    )
    parts = estimate(model, feed, step, before_step)
    lines = [
        f"{total:,} parameters, {trained:,} of them trained; {feed.steps:,} steps",
        "memory on this device (GB):",
    ]
    return "\n".join(lines + [f"  {name:<14} {size:9.3f}" for name, size in parts.items()])


def _size(tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _peak_of(action) -> int:
    """Most bytes that tensors made by `action` hold at one time: every storage is counted where it is born and where it dies."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    live, peak, seen = 0, 0, set()

    def died(key: int, size: int) -> None:
        nonlocal live
        live -= size
        seen.discard(key)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            nonlocal live, peak
            old = {
                t.untyped_storage().data_ptr()
                for t in torch.utils._pytree.tree_leaves((arguments, named))
                if _plain(t)
            }
            result = function(*arguments, **(named or {}))
            for tensor in filter(_plain, torch.utils._pytree.tree_leaves(result)):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if storage.data_ptr() not in old and key not in seen:
                    seen.add(key)
                    weakref.finalize(storage, died, key, size)
                    live, peak = live + size, max(peak, live + size)
            return result

    def _plain(value) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.layout == torch.strided
            and value.device.type != "meta"
        )

    with Count():
        action()
    return peak
