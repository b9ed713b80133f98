"""The progress of a long run: sums for the next log line, the progress bar, and stop signals."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ta.parallel import any_rank, world

Figures = dict[str, float]  # a value by the name of a figure


class StepSums:
    """Sums since the last logged step."""

    def __init__(self, state: dict[str, float | str] | None = None):
        """Nothing yet, or what `state` gave."""
        sums = {name: float(value) for name, value in (state or {}).items()}
        self.sums: Counter[str] = Counter(sums)
        self.start = time.perf_counter() - self.sums.pop("seconds", 0.0)

    def state(self) -> dict[str, float | str]:
        """All that a later process needs to go on, numbers that JSON has none of as text."""
        sums = {**self.sums, "seconds": time.perf_counter() - self.start}
        return {name: x if math.isfinite(x) else str(x) for name, x in sums.items()}

    def add(self, total: Figures) -> None:
        """Add the sums of one step."""
        self.sums.update(total)

    def mean(self) -> Figures:
        """Means over the steps since the last log line, with their tokens and seconds."""
        sizes = {
            "tokens": int(self.sums["tokens"]),
            "learned_tokens": int(self.sums["learned"]),
            "seconds": round(time.perf_counter() - self.start, 4),
        }
        if update := self.sums["update_seconds"]:
            sizes["update_seconds"] = round(update, 4)
            sizes["update_tokens_per_second"] = round(self.sums["tokens"] / update, 1)
        return join_figures(means(self.sums), sizes)


def means(sums: Figures) -> Figures:
    """{"loss": ..., metric: ...} of summed steps; a metric that is no number gives no figure."""
    figures = {}
    for key, value in sums.items():
        kind, _, part = key.partition(" ")
        if kind == "part":
            name = part.partition(" ")[2]
            figures[name] = figures.get(name, 0.0) + value / (sums[f"own {part}"] or math.nan)
    figures = {name: value for name, value in figures.items() if not math.isnan(value)}
    return join_figures({"loss": sums["loss"] / (sums["count"] or math.nan)}, figures)


def join_figures(*parts: Figures) -> Figures:
    """All figures in one dict; ValueError where two parts have one of the same name."""
    joined = {}
    for part in parts:
        if twice := sorted(joined.keys() & part):
            raise ValueError(
                f"two figures are called {twice[0]}, so one would replace the other: rename one"
            )
        joined |= part
    return joined


class Stopped(BaseException):
    """An evaluation ends here, because a signal has come."""


class Signals:
    """SIGTERM and SIGINT ask the loop to stop after its step; a second SIGINT stops at once.

    An evaluation, which changes nothing, is left where it is (`Stopped`): on one process at once,
    on several between two batches of `mean_over`.
    """

    now: Signals | None = None  # the one at work

    def __enter__(self):
        self.received, self.evaluating = 0, False
        self.before = {}
        Signals.now = self
        # outside the main thread signals belong to the caller
        with suppress(ValueError):
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.evaluating and world() == 1:
            raise Stopped

    def asked(self) -> bool:
        """Whether a signal has come to any process; all must ask."""
        return any_rank(self.received > 0)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is done in it may be left."""
        self.evaluating = True
        try:
            with suppress(Stopped):
                yield
        finally:
            self.evaluating = False

    def __exit__(self, *_):
        Signals.now = None
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_if_asked() -> None:
    """End the evaluation on all processes where a signal has come to one."""
    if Signals.now and Signals.now.evaluating and Signals.now.asked():
        raise Stopped


def line(record: Figures) -> str:
    """A logged step as one short line."""
    speed = record["learned_tokens"] / max(record["seconds"], 1e-9)
    figures = f"loss {record['loss']:.4f}, lr {record['lr']:.1e}, {speed:,.0f} tok/s"
    return f"{figures}, {record['memory_gb']:.1f} GB"


def memory() -> Figures:
    """{"memory_gb": peak memory so far in GB}, of the accelerator, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 4)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory_gb": round(peak / 1e9, 4)}
