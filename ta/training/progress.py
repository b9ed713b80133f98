"""The progress of a long run: sums for the next log line, the progress bar, and stop signals."""

from __future__ import annotations

import signal
import time


class StepSums:
    """Sums since the last logged step."""

    def __init__(self):
        self.start = time.perf_counter()
        self.loss = self.count = self.tokens = self.learned = 0.0
        self.metrics: dict[str, float] = {}

    def add(self, total: dict[str, float]) -> None:
        """Add the sums of one step; those of metrics are named "metric NAME"."""
        self.loss += total["loss"]
        self.count += total["count"]
        self.tokens += total["tokens"]
        self.learned += total["learned"]
        for key, value in total.items():
            if key.startswith("metric "):
                name = key.removeprefix("metric ")
                self.metrics[name] = self.metrics.get(name, 0.0) + value

    def mean(self) -> dict[str, float]:
        """Means over the steps since the last log line, with their tokens and seconds."""
        seconds = time.perf_counter() - self.start
        means = {key: value / self.count for key, value in self.metrics.items()}
        sizes = {
            "tokens": int(self.tokens),
            "learned_tokens": int(self.learned),
            "seconds": round(seconds, 4),
        }
        return {"loss": self.loss / self.count, **means, **sizes}


class Signals:
    """SIGTERM and SIGINT ask the loop to stop after its step; a second SIGINT stops at once."""

    def __enter__(self):
        self.received = 0
        self.before = {}
        try:
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            # outside the main thread signals belong to the caller
            pass
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def progress_bar(steps: int, first: int, show: bool):
    """A tqdm bar with the time left; nothing is shown where `show` is False."""
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=first,
        desc="train",
        unit="step",
        disable=not show,
        mininterval=0.5,
        dynamic_ncols=True,
    )


def line(record: dict[str, float]) -> str:
    """A logged step as one short line."""
    speed = record["learned_tokens"] / max(record["seconds"], 1e-9)
    figures = f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, {speed:,.0f} learned tok/s"
    return f"{figures}, {record['memory_gb']:.2f} GB"


def memory() -> dict[str, float]:
    """{"memory_gb": peak memory so far in GB}, of the accelerator, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return {"memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 4)}
    return {"memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 4)}
