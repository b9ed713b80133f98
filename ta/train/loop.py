"""The training loop: sums from each micro-batch, one division by the global count, one optimizer step.

`step(model, batch) -> (loss_sum, count, metric_sums)` is all that a method brings. The state is the model, the optimizer and the step number;
the learning rate, the order of records and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ta.data.loader import Feed
from ta.parallel import rank, say, seed_dropout, sum_over_ranks, world
from ta.train import checkpoint, run_folder
from ta.train.optim import OptimConfig, lr_at, make_optimizer, update
from ta.train.progress import Signals, Window, bar, line, memory
from ta.train.report import write_report
from ta.train.trackers import open_sinks

if TYPE_CHECKING:
    from torch import Tensor, nn

    Step = Callable[[nn.Module, Any], tuple[Tensor, Tensor | float, dict[str, Tensor]]]


@dataclass(frozen=True)
class LoopConfig:
    out: str = "runs/sft"
    """Run folder: settings, metrics, samples, checkpoints and the export in OUT/final."""
    steps: int | None = None
    """Optimizer steps; without it --epochs decides."""
    epochs: float = 1.0
    """Passes over the data, where --steps is not given."""
    batch_size: int | None = None
    """Records per optimizer step, over all devices together. Default: 64; fewer where the built-in model is trained."""
    max_tokens_per_micro: int = 8192
    """Tokens in one forward pass on one device: the memory knob. It never changes results."""
    seed: int = 0
    """Seed of data order, choices among records, new weights and dropout."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at a stop and at the end only."""
    keep: int = 2
    """Checkpoints to keep; 0 keeps all."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates before and after training only."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    resume: bool = False
    """Go on from the newest whole checkpoint in --out."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's on --resume, such as lr; any other difference is refused."""
    overwrite: bool = False
    """Delete the run that --out holds and start anew."""
    dry_run: bool = False
    """Open data and model, print parameters, steps and memory by part, write nothing and end."""
    log: tuple[Literal["tensorboard", "wandb", "trackio", "clearml"], ...] = ()
    """Services that get the figures of metrics.jsonl too."""


def check_loop(config: LoopConfig) -> None:
    """ValueError for a number that counts nothing."""
    for name, least in (
        ("log_every", 1),
        ("save_every", 0),
        ("keep", 0),
        ("eval_every", 0),
        ("seed", 0),
    ):
        if getattr(config, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: give a number from {least} up"
            )


def train(
    model: nn.Module,
    feed: Feed,
    step: Step,
    config: LoopConfig,
    optim: OptimConfig,
    *,
    identity: dict[str, Any] | None = None,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    before_step: Callable[[nn.Module, list], list] | None = None,
    after_step: Callable[[int], None] | None = None,
    extra: dict[str, Tensor] | None = None,
    lr_scales: dict[str, float] | None = None,
) -> None:
    """Train `model` in place for feed.steps steps. A signal ends the program after the step and a checkpoint: SystemExit(143 or 130).

    `identity` names what must not differ on resume. `evaluate(step)` gives figures for metrics.jsonl, before, during and after training.
    `before_step(model, micro_batches)` gives the micro-batches with what needs all of them, on all processes, first. `extra` names tensors
    besides the model's that `after_step` changes and that a checkpoint must hold.
    """
    folder = Path(config.out)
    if config.dry_run:
        from ta.train.memory import report

        say(report(model, feed, step, before_step))
        raise SystemExit(0)
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, optim, lr_scales)
    first = _resume(folder, model, optimizer, identity or {}, config, extra) if config.resume else 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    sinks = open_sinks(config.log, folder) if rank() == 0 else []
    model.train()
    if evaluate and first == 0:
        _evaluate(evaluate, model, folder, 0, sinks)
    window, laid_out = Window(), _laid_out(feed, first, device)
    with Signals() as stop, bar(feed.steps, first, rank() == 0) as progress:
        for number in range(first, feed.steps):
            seed_dropout(config.seed, number)
            micro_batches = before_step(model, laid_out) if before_step else laid_out
            sums, keys = _accumulate(model, micro_batches, step, stop.received)
            sums = sum_over_ranks(sums)
            laid_out = _laid_out(
                feed, number + 1, device
            )  # while an accelerator is still at work on this step: the next line waits for it
            loss, count, stopping, tokens, learned, *metrics = sums.tolist()
            if not count:
                raise ValueError(
                    f"step {number + 1} has nothing to learn in {_where(feed, number)}"
                )
            norm = update(
                optimizer,
                parameters,
                lr_at(number, feed.steps, optim),
                world() / count,
                optim.clip,
                loss,
            )
            if not math.isfinite(norm):
                _stop_non_finite(
                    folder, number, loss / count, parameters, names, feed, micro_batches
                )
            if after_step:
                after_step(number + 1)
            window.add(loss, count, tokens, learned, dict(zip(keys, metrics, strict=True)))
            done = number + 1
            last = done == feed.steps
            if done % config.log_every == 0 or last:
                record = {
                    "step": done,
                    **window.mean(),
                    "lr": lr_at(number, feed.steps, optim),
                    "grad_norm": norm,
                    **memory(),
                }
                if rank() == 0:
                    _write(folder, record, sinks)
                    progress.set_postfix_str(line(record), refresh=False)
                window = Window()
            progress.update()
            if stopping or last or (config.save_every and done % config.save_every == 0):
                checkpoint.save(
                    folder / "checkpoints",
                    done,
                    model,
                    optimizer,
                    identity or {},
                    config.keep,
                    extra,
                )
            if stopping:
                if rank() == 0:
                    write_report(folder)
                raise SystemExit(128 + (stop.received or 15))
            if evaluate and (last or (config.eval_every and done % config.eval_every == 0)):
                _evaluate(evaluate, model, folder, done, sinks)


def _laid_out(feed: Feed, number: int, device) -> list:
    from ta.data.batch import to_device

    return (
        [to_device(batch, device) for batch in feed.batches(number)] if number < feed.steps else []
    )


def _accumulate(model, micro_batches, step: Step, stopping: bool):
    """Backward through every micro-batch's loss sum; ([loss, count, stop, tokens, learned, *metrics] float64, metric names)."""
    total, keys = None, []
    for batch in micro_batches:
        loss, count, metrics = step(model, batch)
        loss.backward()
        keys = sorted(metrics)
        row = _row([loss, count, 0.0, *_sizes(batch), *(metrics[key] for key in keys)], loss.device)
        total = row if total is None else total + row
    total[2] = float(stopping)
    return total, keys


def _row(values: list, device) -> Tensor:
    """(n,) float64 of numbers and of tensors on the device, which is not waited for."""
    import torch

    row = torch.tensor(
        [0.0 if torch.is_tensor(value) else value for value in values], dtype=torch.float64
    ).to(device, non_blocking=True)
    for place, value in enumerate(values):
        if torch.is_tensor(value):
            row[place] = value.detach()
    return row


def mean_over(model: nn.Module, batches: list, step: Step) -> dict[str, float]:
    """Loss and metrics of `step` over this process's batches and all others', without gradients: {"loss": ..., ...}."""
    import torch

    was_training = model.training
    model.eval()
    total, keys = None, []
    with torch.no_grad():
        for batch in batches:
            loss, count, metrics = step(model, batch)
            keys = sorted(metrics)
            row = _row([loss, count, *(metrics[key] for key in keys)], loss.device)
            total = row if total is None else total + row
    model.train(was_training)
    loss, count, *values = sum_over_ranks(total).tolist()
    return {
        key: value / (count or math.nan)
        for key, value in zip(["loss", *keys], [loss, *values], strict=True)
    }


def _evaluate(evaluate, model, folder: Path, step: int, sinks: list) -> None:
    figures = evaluate(step)
    model.train()
    if rank() == 0:
        _write(
            folder, {"step": step, **{f"val_{key}": value for key, value in figures.items()}}, sinks
        )
        write_report(folder)
        text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        say(f"step {step}: {text}" if step else f"before training: {text}")


def _write(folder: Path, record: dict[str, float], sinks: list) -> None:
    run_folder.append(folder / "metrics.jsonl", record)
    for write in sinks:
        write(record["step"], {key: value for key, value in record.items() if key != "step"})


def _resume(
    folder: Path,
    model,
    optimizer,
    identity: dict[str, Any],
    config: LoopConfig,
    extra: dict[str, Tensor] | None,
) -> int:
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        return 0
    now = json.loads(json.dumps(identity))
    if odd := set(config.allow_change) - now.keys():
        raise ValueError(f"--allow-change {min(odd)}: give one of {', '.join(now)}")
    before = found.manifest["identity"]
    changed = {
        key: f"{key} was {before.get(key)!r} and is {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    }
    if refused := [text for key, text in changed.items() if key not in config.allow_change]:
        raise ValueError(
            f"{found.path} was made with other settings: {'; '.join(refused)}. Give the same ones, or --allow-change NAME"
        )
    step = checkpoint.load(found, model, optimizer, extra)
    for text in found.damaged:
        say(f"skipped damaged checkpoint {text}")
    say("; ".join([f"resuming from {found.path} at step {step}", *changed.values()]))
    if rank() == 0:
        run_folder.cut_back(folder / "metrics.jsonl", step)
        run_folder.cut_back(folder / "samples.jsonl", step)
    return step


def _stop_non_finite(
    folder: Path, number: int, loss: float, parameters, names, feed: Feed, micro_batches
) -> None:
    from ta.data.batch import batch_of

    bad = next(
        (names[id(p)] for p in parameters if p.grad is not None and not p.grad.isfinite().all()),
        "none (the loss itself)",
    )
    for i, batch in enumerate(micro_batches):
        tokens = batch_of(batch).tokens.tolist()
        run_folder.append(
            folder / "non_finite.jsonl",
            {"step": number + 1, "rank": rank(), "micro_batch": i, "tokens": tokens},
        )
    raise ValueError(
        f"loss {loss} or its gradient is not finite at step {number + 1}; first bad gradient: {bad}; records: {_where(feed, number)}. "
        f"Nothing was updated; token ids are in {folder / 'non_finite.jsonl'}. Lower --lr or look at these records"
    )


def _where(feed: Feed, number: int) -> str:
    records = feed.records(number)
    return ", ".join(records[:8]) + (f" and {len(records) - 8} more" if len(records) > 8 else "")


def _sizes(batch) -> tuple[int, int]:
    from ta.data.batch import batch_of

    inner = batch_of(batch)
    return sum(inner.lengths), len(inner.learned)
