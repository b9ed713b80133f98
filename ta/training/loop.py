"""The training loop: sums over micro-batches, one division by the global count, one optimizer step.

A method is one function, `step(model, batch) -> (loss_sum, count, metrics)`. A metric is a sum over
the records, which is divided like the loss, or a list of (sum, own count), whose quotients are
added and which gives no figure where a count is 0. The state is the model, the optimizer and the
step number; the learning rate, the order of records and dropout are functions of (seed, step).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ta.command_line import when_stopped
from ta.data.batch import Batch, batch_of, to_device
from ta.data.loader import Collate, TrainBatches, collate_chats, micro_batches
from ta.data.prepare import Prepared, summary, write_drops
from ta.files import append_line, json_text, read_json_lines
from ta.model.language_model import evaluating
from ta.parallel import gather_objects, on_rank_zero, rank, say, seed_dropout, sum_over_ranks, world
from ta.screen import fitted, progress
from ta.training import checkpoint, run_folder
from ta.training.memory import check_disk, memory_report
from ta.training.optim import update
from ta.training.progress import (
    Signals,
    StepSums,
    join_figures,
    leave_if_asked,
    line,
    means,
    memory,
)
from ta.training.report import before_and_after, write_report
from ta.training.run_folder import Run, best_step, evaluations
from ta.training.settings import ScheduleConfig
from ta.training.trackers import open_trackers

Step = Callable[[nn.Module, Any], tuple[Tensor, Tensor | float, dict[str, Any]]]


def train(
    run: Run,
    model: nn.Module,
    batches: TrainBatches,
    step: Step,
    optimizer: torch.optim.Optimizer,
    optim: ScheduleConfig,
    *,
    evaluate: Callable[[int], dict[str, float]] | None = None,
    before_step: Callable[[int, list], list] | None = None,
    more_state: dict[str, Tensor] | None = None,
    resume_key: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Train `model` in place for batches.steps steps; returns the figures of the last evaluation.

    step(model, batch) gives the sum of the loss over a micro-batch, its part of the weight by which
    the sum over the global batch is divided, and metrics. evaluate(done) gives figures for
    metrics.jsonl, before, during and after training, {} where there is nothing to evaluate.
    before_step(done, micro_batches) returns the micro-batches that the next step uses instead of
    these; it gets those of a step all at once, on all processes.

    A checkpoint holds the model, the state of any optimizer, and the tensors of `more_state`, which
    names everything else that changes in training. `resume_key` adds settings that must not differ
    on --resume. `optim` gives the schedule of the learning rate and the clipping. A step without
    tokens updates nothing, and a line says so. A signal ends the program after the running step, or
    at once in an evaluation, and a checkpoint: SystemExit(143 or 130).
    """
    loop, folder, device = run.loop, run.folder, run.device
    if loop.dry_run:
        say(memory_report(model, batches, optimizer))
        raise SystemExit(0)
    on_rank_zero(lambda: check_disk(folder, model, optimizer))
    key = run_folder.identity_of(run, batches, optimizer, optim, resume_key or {})
    saves = _Checkpoints(run, model, optimizer, more_state, key)
    kept = f"--resume goes on from the newest of {saves.folder}"
    with run.held():
        first = saves.resume()
        _write_settings(run, key, batches.prepared)
        trackers = open_trackers(loop.log, folder, first, run.settings()) if rank() == 0 else []
        model.train()
        with (
            when_stopped(lambda: kept),
            Signals() as stop,
            progress(batches.steps, "train", "step", done=first, show=rank() == 0) as bar,
        ):
            log = _Log(folder, trackers, bar, time.monotonic())
            held_out = _HeldOut(run, model, evaluate, batches.steps, log, saves, stop)
            held_out.start(first)
            ready = _on_device(batches, first, device)
            for number in range(first, batches.steps):
                if held_out.exhausted:
                    since = f"no better {loop.keep_best} since {saves.best}"
                    say(f"stopped at step {number}: {since}")
                    break
                seed_dropout(batches.seed, number)
                micro_batches = before_step(number, ready) if before_step else ready
                begun = time.perf_counter()
                sums: dict[str, Any] = {}
                for batch in micro_batches:
                    batch = to_device(batch, device)
                    loss, count, metrics = step(model, batch)
                    loss.backward()
                    add_sums(sums, loss, count, batch, metrics)
                sums["stop"] = float(stop.received > 0)  # as late as all processes can agree on
                totals = sum_over_ranks(_row(sums, device))
                named = dict(zip(sums, totals, strict=True))
                lr = optim.lr_at(number, batches.steps)
                # where this process has no token, perhaps none has
                if not sums["tokens"] and not named["count"].item():
                    say(f"step {number + 1} has no token to learn: no update")
                    norm = named["count"]
                else:
                    count = named["count"] / world()
                    norm = update(optimizer, lr, named["loss"], count, optim.clip)
                # the next batch is made while an accelerator still computes this step
                ready = _on_device(batches, number + 1, device)
                *values, norm = torch.cat([totals, norm.double()[None]]).tolist()
                total = dict(zip(sums, values, strict=True))
                if not math.isfinite(norm):
                    _refuse_step(run, number, total, model, batches, micro_batches)
                optimizer.zero_grad(set_to_none=True)
                if before_step:
                    total["update_seconds"] = time.perf_counter() - begun
                saves.window.add(total)
                done = number + 1
                last = done == batches.steps
                if last or done % loop.log_every == 0:
                    own = {"step": done, "lr": lr, "grad_norm": norm}
                    log.step(join_figures(saves.window.mean(), own, memory()))
                    saves.window = StepSums()
                bar.update()
                stopping = total["stop"] > 0 or (world() == 1 and stop.received > 0)
                if stopping or last or done % (loop.save_every or batches.steps) == 0:
                    saves.save(done)
                    if stop.asked():
                        log.end(done, stop)
                if held_out.due(done):
                    held_out.evaluate_at(done)
    figures = held_out.figures
    if saves.best is not None:
        figures = saves.load_best()
    if rank() == 0:
        write_report(folder)
        say(fitted(before_and_after(folder, figures)))
    return figures


@dataclass
class _Checkpoints:
    """What a run goes on from and what it leaves: the state of its training at some steps."""

    run: Run
    model: nn.Module
    optimizer: torch.optim.Optimizer
    more_state: dict[str, Tensor] | None
    # settings that must not differ on a resume
    key: dict[str, Any]
    damaged: dict[str, str] = field(default_factory=dict)
    # the sums since the last logged step
    window: StepSums = field(default_factory=StepSums)
    # the step of the best evaluation, where that is asked for, and that of the newest checkpoint
    best: int | None = None
    last: int = 0

    @property
    def folder(self) -> Path:
        return self.run.folder / "checkpoints"

    def resume(self) -> int:
        """Load the newest complete checkpoint on --resume; the number of steps done.

        Where there is none the run starts anew, with empty logs. ValueError where checkpoint or run
        was made with other settings.
        """
        loop, folder = self.run.loop, self.run.folder
        if not loop.resume:
            return 0
        found = checkpoint.newest(self.folder)
        if found is None:
            before = gather_objects(run_folder.read_settings(folder) if rank() == 0 else None)[0]
            changed = _changes(loop, folder, before["identity"], self.key) if before else []
            say("; ".join([f"no checkpoint in {folder}: starting before step 1", *changed]))
            _truncate_logs(folder, -1)
            return 0
        changed = _changes(loop, found.path, found.manifest["identity"], self.key)
        step = checkpoint.load(found, self.model, self.optimizer, self.more_state)
        for name, reason in found.damaged.items():
            say(f"skipped damaged checkpoint {name}: {reason}")
        say("; ".join([f"resuming from {found.path} at step {step}", *changed]))
        _truncate_logs(folder, step)
        if rank() == 0:
            # a kill may have come between the last checkpoint and this
            best = best_step(folder, loop)[0] if loop.keep_best else None
            checkpoint.prune(self.folder, step, loop.keep, found.damaged, best)
        self.last, self.damaged = step, found.damaged
        self.window = StepSums(found.manifest.get("logged"))
        return step

    def save(self, step: int) -> None:
        """Publish a checkpoint; that of the best step stays whatever --keep says."""
        checkpoint.save(
            self.folder,
            step,
            self.model,
            self.optimizer,
            self.key,
            self.run.loop.keep,
            self.more_state,
            self.damaged,
            self.window.state(),
            self.best,
        )
        self.last = step

    def load_best(self) -> dict[str, float]:
        """Put the weights of the best evaluation in place; gives its figures."""
        step, name = self.best, self.run.loop.keep_best
        found = checkpoint.at_step(self.folder, step)
        if found is None:
            raise ValueError(
                f"the checkpoint of step {step}, the best by {name}, is gone or damaged: "
                "leave --keep-best out to export the last one"
            )
        checkpoint.load(found, self.model, self.optimizer, self.more_state)
        figures = _logged(self.run.folder, step)
        say(f"the best {name} is {figures[name]:.4g}, of step {step}: its weights are exported")
        return figures


def _truncate_logs(folder: Path, step: int) -> None:
    if rank() == 0:
        for name in ("metrics.jsonl", "samples.jsonl"):
            run_folder.truncate_log(folder / name, step)


def _write_settings(run: Run, key: dict[str, Any], prepared: Prepared) -> None:
    """Write config.json, and drops.jsonl where the records were read from files."""
    known = "folder" in prepared.info
    run.record(key, summary(prepared) if known else {})
    if known and rank() == 0:
        write_drops(prepared, str(run.folder / "drops.jsonl"))


@dataclass
class _Log:
    """What a run tells of its steps: metrics.jsonl, the services of --log, the bar, the report."""

    folder: Path
    trackers: list
    bar: Any
    # when the report was last written
    reported: float

    def write(self, record: dict[str, float], samples: list = ()) -> None:
        """Write one line, here and to the services."""
        append_line(self.folder / "metrics.jsonl", record)
        for write in self.trackers:
            figures = {key: value for key, value in record.items() if key != "step"}
            write(record["step"], figures, samples)

    def step(self, record: dict[str, float]) -> None:
        """Write the figures of the steps since the last line, and the report now and then."""
        if rank():
            return
        self.write(record)
        self.bar.set_postfix_str(line(record), refresh=False)
        if time.monotonic() > self.reported + 30:
            write_report(self.folder, live=True)
            self.reported = time.monotonic()

    def end(self, step: int, stop: Signals) -> None:
        """End the program after a signal, with a word on how to go on."""
        self.bar.close()
        if rank() == 0:
            write_report(self.folder)
        kept = checkpoint.folder_of(self.folder / "checkpoints", step)
        at = f"after step {step}, which is in {kept}" if step else "before step 1"
        say(f"stopped {at}: the same command with --resume goes on")
        raise SystemExit(128 + (stop.received or signal.SIGTERM))


@dataclass
class _HeldOut:
    """The evaluations of a run: when they are due, the last figures, whether they get better."""

    run: Run
    model: nn.Module
    evaluate: Callable[[int], dict[str, float]] | None
    steps: int
    log: _Log
    saves: _Checkpoints
    stop: Signals
    figures: dict[str, float] = field(default_factory=dict)
    # evaluations since the best one
    since: int = 0

    def due(self, step: int) -> bool:
        """Whether the step is one of those after which there is an evaluation."""
        every = self.run.loop.eval_every
        every = max(20, self.steps // 10) if every is None else every or self.steps
        return bool(self.evaluate) and (step == self.steps or step % every == 0)

    @property
    def exhausted(self) -> bool:
        """Whether --patience evaluations brought nothing better."""
        return 0 < self.run.loop.patience <= self.since

    def start(self, step: int) -> None:
        """Take the figures that were logged at the step, or make them; as evaluate_at()."""
        folder = self.run.folder
        if self.due(step):
            self.figures = _logged(folder, step)
            if not self.figures:
                if rank() == 0:
                    # what an evaluation has left that was not finished
                    run_folder.truncate_log(folder / "samples.jsonl", step, evaluated=False)
                self.evaluate_at(step)
        self._find_best()
        if self.saves.best == step == 0:
            self.saves.save(0)

    def evaluate_at(self, step: int) -> None:
        """Make, log and print the figures of a step; a signal ends the program.

        A checkpoint is made where a resume needs one.
        """
        folder, self.figures = self.run.folder, {}
        with self.stop.evaluation():
            self.figures = self.evaluate(step)
        self.model.train()
        # a signal leaves the evaluation without figures, and there may be nothing to evaluate
        if self.figures and rank() == 0:
            samples = read_json_lines(folder / "samples.jsonl") if self.log.trackers else []
            samples = [sample for sample in samples if sample["step"] == step]
            named = {f"val_{name}": value for name, value in self.figures.items()}
            self.log.write({"step": step, **named}, samples)
            write_report(folder, live=True)
            text = ", ".join(f"{key} {value:.4g}" for key, value in self.figures.items())
            say(fitted(f"step {step}: {text}" if step else f"before training: {text}"))
        stopping = self.stop.asked()
        if not stopping:
            self._find_best()
        wanted = stopping or self.exhausted or self.saves.best == step
        if wanted and step > self.saves.last:
            self.saves.save(step)
        if stopping:
            self.log.end(step, self.stop)

    def _find_best(self) -> None:
        if self.run.loop.keep_best and self.evaluate:
            found = on_rank_zero(lambda: best_step(self.run.folder, self.run.loop))
            self.saves.best, self.since = gather_objects(found)[0]


def _on_device(batches: TrainBatches, number: int, device) -> list:
    """This process's micro-batches of a step, on the device; [] after the last step."""
    if number >= batches.steps:
        return []
    return [to_device(batch, device) for batch in batches.at(number)]


def add_sums(sums: dict[str, Any], loss, count, batch, metrics: dict[str, Any]) -> None:
    """Add one micro-batch to the sums, without waiting for values on a device."""
    inner = batch_of(batch)
    # the first of the processes that share a row counts its tokens
    tokens = 0 if inner.part[0] else sum(inner.lengths)
    sizes = {"tokens": tokens, "learned": len(inner.learned)}
    values = {"loss": loss, "count": count, **sizes}
    for name in sorted(metrics):
        given = metrics[name]
        for i, (part, own) in enumerate(given if isinstance(given, list) else [(given, count)]):
            values |= {f"part {i} {name}": part, f"own {i} {name}": own}
    for name, value in values.items():
        value = value.detach().double() if torch.is_tensor(value) else value
        sums[name] = sums.get(name, 0.0) + value


def _row(sums: dict[str, Any], device) -> Tensor:
    """(n,) float64 of the sums in their order, on the device."""
    values = [0.0 if torch.is_tensor(value) else value for value in sums.values()]
    row = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
    for place, value in enumerate(sums.values()):
        if torch.is_tensor(value):
            row[place] = value
    return row


def mean_over(model: nn.Module, batches: Iterable, step: Step) -> dict[str, float]:
    """{"loss": ..., metric: ...} of `step` over the batches of all processes, without gradients.

    Where the batches are of several sources, each figure also stands there as NAME/SOURCE. {} where
    there are no batches.
    """
    device = next(model.parameters()).device
    sums: dict[str, dict[str, Any]] = {}
    with evaluating(model):
        for batch in progress(
            None, "evaluate", "part", iterable=batches, show=rank() == 0, delay=2, leave=False
        ):
            leave_if_asked()
            batch = to_device(batch, device)
            loss, count, metrics = step(model, batch)
            own = sums.setdefault(batch_of(batch).source, {})
            add_sums(own, loss, count, batch, metrics)
    if not sums:
        return {}
    rows = torch.cat([_row(own, device) for own in sums.values()])
    values = iter(sum_over_ranks(rows).tolist())
    totals = {source: {name: next(values) for name in own} for source, own in sums.items()}
    whole: Counter[str] = Counter()
    for own in totals.values():
        whole.update(own)
    figures = [means(whole)]
    if len(totals) > 1:
        for source, own in totals.items():
            figures.append({f"{name}/{source}": value for name, value in means(own).items()})
    return join_figures(*figures)


def scores_of(model: nn.Module, prepared: Prepared, n: int, max_tokens: int) -> Tensor:
    """(n, k, C) scores of each sequence of the first n records, on the CPU of every process.

    All processes take part; a forward pass has at most `max_tokens` tokens.
    """

    def scores(batch: Batch) -> Tensor:
        return model.scores(batch).unflatten(0, (-1, prepared.k))

    device, records = next(model.parameters()).device, np.arange(min(n, len(prepared.origin)))
    with evaluating(model):
        return by_record(scores, prepared, records, max_tokens, model.packed, device)


def by_record(
    values: Callable[[Any], Tensor],
    prepared: Prepared,
    records: np.ndarray,
    max_tokens: int,
    packed: bool,
    device: Any,
    collate: Collate = collate_chats,
) -> Tensor:
    """(n, ...) what `values` gives of each of n records, on the CPU of every process.

    It gets a batch and gives a row for each of its records; all processes take part.
    """
    both = lambda data, chosen, packed: (collate(data, chosen, packed), chosen)
    found = []
    for batch, chosen in micro_batches(prepared, records, max_tokens, packed, both):
        found.append((chosen, values(to_device(batch, device))))
    # a GPU is waited for once
    found = [(chosen, rows.cpu()) for chosen, rows in found]
    shares = [part for share in gather_objects(found) for part in share]
    order = np.argsort(np.concatenate([chosen for chosen, _ in shares]))
    return torch.cat([rows for _, rows in shares])[order]


def _logged(folder: Path, step: int) -> dict[str, float]:
    """The figures of the evaluation that was logged at `step`; none where it was not finished."""

    return gather_objects(evaluations(folder).get(step, {}) if rank() == 0 else None)[0]


def _changes(loop, where: Path, before: dict, key: dict[str, Any]) -> list[str]:
    """What differs of what was allowed to change; ValueError for any other change."""
    now = json.loads(json_text(key))
    if unknown := set(loop.allow_change) - now.keys():
        raise ValueError(f"--allow-change {min(unknown)}: give one of {', '.join(now)}")
    names = [*now, *(name for name in before if name not in now and before[name] is not None)]
    changed = {
        name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    }
    refused = [text for name, text in changed.items() if name not in loop.allow_change]
    if refused:
        raise ValueError(
            f"{where} was made with other settings: {'; '.join(refused)}. "
            f"Give the same ones, or --allow-change {' '.join(changed)}"
        )
    return list(changed.values())


def _refuse_step(run: Run, number: int, total, model, batches, micro_batches) -> NoReturn:
    """ValueError for a step with nothing to learn, or whose loss or gradient is not finite.

    The token ids of the latter are written into the run folder.
    """
    if not total["count"]:
        raise ValueError(f"step {number + 1} has nothing to learn in {_where(batches, number)}")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    first = bad[0] if bad else "none (the loss itself)"
    path = run.folder / "non_finite.jsonl"
    for i, batch in enumerate(micro_batches):
        tokens = batch_of(batch).tokens.tolist()
        record = {"step": number + 1, "rank": rank(), "micro_batch": i, "tokens": tokens}
        append_line(path, record)
    raise ValueError(
        f"loss {total['loss'] / total['count']} or its gradient is not finite at step "
        f"{number + 1}; first bad gradient: {first}; records: {_where(batches, number)}. "
        f"No checkpoint holds this step; token ids are in {path}. Lower --lr or look at these "
        "records"
    )


def _where(batches: TrainBatches, number: int) -> str:
    names = batches.names(number)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
