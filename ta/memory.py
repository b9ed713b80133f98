"""What a run will hold in the memory of one device, by part, found before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ta.feed import Feed

STEPS_LOOKED_AT = 32


def estimate(model: nn.Module, feed: Feed, step, before_step=None) -> dict[str, float]:
    """GB of weights, gradients and AdamW moments of this process's share, and of what the largest of the first micro-batches keeps for its
    backward pass (measured by running its forward pass)."""
    import torch

    from ta.batch import batch_of, to_device

    weights = {id(t): _size(t) for t in (*model.parameters(), *model.buffers())}
    trained = sum(_size(p) for p in model.parameters() if p.requires_grad)
    firsts = [batch for number in range(min(STEPS_LOOKED_AT, feed.steps)) for batch in feed.batches(number)]
    largest = to_device(max(firsts, key=lambda batch: batch_of(batch).tokens.numel()), next(model.parameters()).device)
    if before_step:
        (largest,) = before_step(model, [largest])
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if not hasattr(t, "to_local")}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, *_ = step(model, largest)
        loss.detach()
    parts = {"weights": sum(weights.values()), "gradients": trained, "AdamW moments": 2 * trained, "activations": sum(kept.values())}
    return {name: size / 1e9 for name, size in (parts | {"in all": sum(parts.values())}).items()}


def report(model: nn.Module, feed: Feed, step, before_step=None) -> str:
    """Parameters, trained ones, steps and the estimate, for a person."""
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (True, False))
    parts = estimate(model, feed, step, before_step)
    lines = [f"{total:,} parameters, {trained:,} of them trained; {feed.steps:,} steps", "memory on this device (GB):"]
    return "\n".join(lines + [f"  {name:<14} {size:9.3f}" for name, size in parts.items()])


def _size(tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
