"""One process or many: who am I, sums over all, and sharding applied from outside to a loaded model.

Nothing here is needed on one process: every function then answers at once without touching torch.distributed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def world() -> int:
    """Number of processes, as torchrun tells it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 .. world - 1."""
    return int(os.environ.get("RANK", "0"))


def init() -> str:
    """Join the process group where torchrun started us and return this process's device."""
    import torch

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if world() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def close() -> None:
    """Leave the process group, so that launchers see a clean end."""
    if world() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all processes, in place; `values` is the same shape everywhere."""
    if world() > 1:
        import torch

        torch.distributed.all_reduce(values)
    return values


def gather_objects(value) -> list:
    """[value of rank 0, value of rank 1, ...] on every process."""
    if world() == 1:
        return [value]
    import torch

    out = [None] * world()
    torch.distributed.all_gather_object(out, value)
    return out


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        import torch

        torch.distributed.barrier()
