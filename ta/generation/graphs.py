"""CUDA graphs: work of fixed shapes and addresses, recorded once and replayed as one launch."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Launch = Callable[[], tuple[Tensor, ...]]
WARM_UPS = 2  # plain calls of a key before it is recorded: libraries settle what they do at first


class Graphs:
    """`work(*key)`: on a GPU recorded at the third call of a key and replayed from then on, on a
    CPU a plain call.

    work: reads and writes tensors that stay where they are, and neither waits for the device nor
    looks at its values; what it gives holds until the next call. RuntimeError: it does wait.
    """

    def __init__(self, work: Callable[..., tuple[Tensor, ...]], device: torch.device):
        self.work, self.device = work, device
        self.records = device.type == "cuda"
        self.calls: Counter = Counter()
        self.replays: dict[tuple, Launch] = {}
        self.pool = None  # memory that all graphs share, as only one runs at a time

    def __call__(self, *key) -> tuple[Tensor, ...]:
        if key in self.replays:
            return self.replays[key]()
        self.calls[key] += 1
        if not self.records:
            return self.work(*key)
        if self.calls[key] <= WARM_UPS:
            with refusing_to_wait(self.device):
                return self.work(*key)
        self.replays[key] = self.record(lambda: self.work(*key))
        return self.replays[key]()

    def record(self, work: Launch) -> Launch:
        """A function that replays what `work` launches, into the same tensors every time."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads may go on allocating meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = work()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return out

        return replay

    def forget(self) -> None:
        """Drop every graph, as the tensors that they know have moved."""
        if self.replays and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.calls, self.replays, self.pool = Counter(), {}, None


@contextlib.contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """RuntimeError inside for a call that makes the host wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
