"""The memory that a run will need on one device, by part: the report of --dry-run."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from ta.data.batch import batch_of
from ta.data.loader import TrainBatches
from ta.model.export import check_room, model_bytes
from ta.model.language_model import base_model
from ta.model.logprobs import chunk_rows

# steps whose micro-batches are searched for the largest
FIRST_STEPS = 32
# (T, D) tensors that a block keeps for its backward pass: norms, projections, residuals
KEPT_WIDTHS = 13
# (T, I) tensors that its feed-forward part keeps
KEPT_HIDDEN = 4


def moments_of(optimizer: Optimizer) -> float:
    """The bytes of an optimizer's moments for each byte of the weights that it moves."""
    weights = moments = 0
    # torchao's optimizers hold a moment in one byte
    eight_bits = hasattr(optimizer, "block_size")
    for group in optimizer.param_groups:
        count = 2 if "betas" in group else 1 if group.get("momentum") else 0
        for parameter in group["params"]:
            size = _size(parameter)
            weights += size
            moments += count * (size // parameter.element_size() if eight_bits else size)
    return moments / weights


def check_disk(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """ValueError where the disk of a run folder has no room for a checkpoint and the export."""
    trained = model_bytes(model, trained=True)
    # an adapter's export has no type of its own: it is what trains
    dtype = getattr(model, "export_dtype", None)
    exported = trained if dtype is None else model_bytes(model, dtype)
    check_room(folder, trained * (1 + moments_of(optimizer)) + exported)


def estimate(
    model: nn.Module,
    batches: TrainBatches,
    optimizer: Optimizer,
    tokens: int | None = None,
) -> dict[str, float]:
    """GB at the peak of a step, this process's share on its device, by arithmetic.

    `tokens` are those of the largest micro-batch, where `batches` do not show it.

    Weights, gradients and the optimizer's moments are counted from the tensors. Activations are the
    tensors that the blocks keep for the backward pass of the largest micro-batch of the first
    steps: for T tokens KEPT_WIDTHS tensors of the model's width and KEPT_HIDDEN of its feed-forward
    width, or one of its width where blocks are recomputed; and the logits of a chunk of tokens.
    """
    # shared tensors count once
    weights = sum(map(_size, {*model.parameters(), *model.buffers()}))
    trained = [p for p in model.parameters() if p.requires_grad]
    if tokens is None:
        first_steps = range(min(FIRST_STEPS, batches.steps))
        micro_batches = (batch for step in first_steps for batch in batches.at(step))
        tokens = max(batch_of(batch).tokens.numel() for batch in micro_batches)
    config = base_model(model.inner).config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    hidden = getattr(config, "intermediate_size", 4 * width)
    number = 2 if model.half_precision else 4  # bytes
    block = tokens * (KEPT_WIDTHS * width + KEPT_HIDDEN * hidden) * number
    inputs = layers * tokens * width * number
    kept = inputs + block if model.recomputed else layers * block
    logits = 2 * min(tokens, chunk_rows(trained[0].device)) * config.vocab_size * 4
    sizes = sum(map(_size, trained))
    parts = {
        "weights": weights,
        "gradients": sizes,
        "moments": moments_of(optimizer) * sizes,
        "activations": kept + logits,
    }
    parts["in all"] = sum(parts.values())
    return {name: size / 1e9 for name, size in parts.items()}


def memory_report(
    model: nn.Module,
    batches: TrainBatches,
    optimizer: Optimizer,
    tokens: int | None = None,
) -> str:
    """Numbers of parameters, of trained ones and of steps, and the estimate, for a person."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{total:,} parameters, {trained:,} of them trained; {batches.steps:,} steps\n"
    text += "memory on this device (GB), estimated:"
    for name, size in estimate(model, batches, optimizer, tokens).items():
        text += f"\n  {name:<14} {size:9.3f}"
    return text


def _size(tensor) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes
