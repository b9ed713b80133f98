"""Process groups: rank and world, sums over processes, and sharding of a loaded model.

On one process every function answers at once, without torch.distributed.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from ta.printable import printable

if TYPE_CHECKING:
    import torch
    from torch import nn


# with which this process ends; empty until that is known
EXIT_CODES: list[int] = []


def one_thread() -> None:
    """Compute on one thread.

    A tiny model is no slower so, neighbours on the machine do not slow it down, and it gives the
    same bits on any number of cores.
    """
    import torch

    torch.set_num_threads(1)


def deterministic_operations() -> None:
    """Allow only torch operations that give the same bits each time; torch refuses the others."""
    import torch

    # cuBLAS reads it at the first matrix product
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system in every step.

    Otherwise each step gets its memory page by page again, which costs about 3 % of a step on CPU.
    It does nothing on other systems.
    """
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of malloc.h, in bytes
        options = ((-1, 1 << 30), (-2, 1 << 28), (-3, 1 << 25))
        for option, size in options if mallopt else ():
            mallopt(option, size)


def world() -> int:
    """The number of processes, as torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, 0 .. world - 1."""
    return int(os.environ.get("RANK", "0"))


def machine() -> dict[str, str | int]:
    """The hardware and threads that a run computes on, for its record."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "processes": world(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def pick_device() -> str:
    """This process's accelerator, from now on the current one, or the CPU where there is none.

    ValueError where the machine has fewer of them than processes.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    place, number = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= number:
        raise ValueError(
            f"process {place + 1} of this machine has no GPU, of which there are {number}: give "
            f"torchrun --nproc-per-node {number}"
        )
    # events, streams and graphs belong to the current device
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def init() -> str:
    """Join the process group where torchrun started this process; returns its device."""
    import torch

    # rows of other lengths in each step would leave holes; CUDA reads it when it starts
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = pick_device()
    cuda = device != "cpu"
    if not cuda:
        keep_freed_memory()
    if world() > 1 and not torch.distributed.is_initialized():
        # what one process does alone, such as reading a large model, may take half an hour
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=1)
        )
        atexit.register(_end_at_once)
    return device


def _end_at_once() -> None:
    """End this process, where its exit code is known, before Python takes itself apart.

    A thread of the process group that lets go of a tensor at that time would abort it.
    """
    if EXIT_CODES:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODES[-1])


def close() -> None:
    """Leave the process group, so that launchers see a clean end."""
    if world() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@cache
def row_group(parts: int):
    """The process group of the `parts` processes that share this one's rows; all must ask."""
    import torch

    ranks = [range(first, first + parts) for first in range(0, world(), parts)]
    return [torch.distributed.new_group(list(own)) for own in ranks][rank() // parts]


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum over all processes, in place; `values` has the same shape on each."""
    if world() > 1:
        import torch

        torch.distributed.all_reduce(values)
    return values


def of_rank_zero(values: torch.Tensor) -> torch.Tensor:
    """The values of rank 0 on every process; `values` has the same shape on each."""
    import torch

    values = values.contiguous()
    torch.distributed.broadcast(values, 0)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any process; all must ask."""
    return any(gather_objects(flag)) if world() > 1 else flag


def gather_objects(value) -> list:
    """[value of rank 0, value of rank 1, ...] on every process."""
    if world() == 1:
        return [value]
    import torch

    out = [None] * world()
    torch.distributed.all_gather_object(out, value)
    return out


def on_rank_zero(action: Callable):
    """Run `action` on rank 0 and return its result there, an empty context elsewhere.

    A ValueError or OSError of `action` is raised on every process.
    """
    result, error = nullcontext(), None
    if rank() == 0:
        try:
            result = action()
        except (ValueError, OSError) as raised:
            error = raised
    if (failure := gather_objects(error)[0]) is not None:
        raise failure
    return result


def say(text: str) -> None:
    """`tell`, once for all processes; nothing for no text."""
    if rank() == 0 and text:
        tell(text)


def tell(text: str) -> None:
    """Print on the screen (stderr), whatever process this is, as `printable` text."""
    bars = sys.modules.get("tqdm")
    if bars and sys.stderr.isatty():
        # above the bar, which else would stand in the same line
        bars.tqdm.write(printable(text), file=sys.stderr)
    else:
        print(printable(text), file=sys.stderr, flush=True)


def barrier() -> None:
    """Wait until every process has come here."""
    if world() > 1:
        import torch

        torch.distributed.barrier()


def seed_dropout(seed: int, number: int) -> None:
    """Seed the global generators for step `number`, as a function of (seed, step, rank).

    Dropout takes no generator argument, so the global one decides.
    """
    import torch

    mixed = ((seed * 1_000_003 + number) * 1_009 + rank()) % 2**64
    # torch.manual_seed costs a millisecond: it records the call for devices that start later
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(mixed)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: in each part of the model the modules of lists that transformers
    could checkpoint, else of the longest list of modules of one type.
    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer as Layer

    out = []
    for part in model.children():
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
        layers = [block for m in lists for block in m if all(isinstance(x, Layer) for x in m)]
        uniform = [m for m in lists if len({type(block) for block in m}) == 1]
        out += layers or max(uniform, key=len, default=[])
    return out


def checkpoint_activations(model: nn.Module, keep_products: bool = False) -> None:
    """Activation checkpointing of every block, in place.

    A block keeps its inputs, with `keep_products` also the results of matrix products and attention
    (selective checkpointing, Korthikanti et al. 2022); the backward pass computes the rest again.
    """
    from functools import partial

    import torch
    import torch.nn.attention.varlen  # it registers its operation
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]
    more = {"context_fn": partial(create_selective_checkpoint_contexts, kept)}
    for block in blocks(model):
        again = partial(checkpoint, block.forward, use_reentrant=False)
        block.forward = partial(again, **more) if keep_products else again


def frozen_to_bfloat16(model: nn.Module) -> None:
    """Hold every frozen float32 weight in bfloat16, in place.

    This halves their memory, and no pass has to cast them.
    """
    import torch

    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every block, and on CUDA the head, in place, for passes over documents.

    Apply it before `checkpoint_activations` and `shard`. All blocks share their code, which is
    compiled once for rows of any length: one variant for training (two where an adapter's first
    block needs no gradient of its input) and one for passes without gradients. Generation gives its
    blocks no documents; it runs uncompiled and uses none of the variants that torch allows.
    """
    from functools import partial

    import torch

    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if hasattr(module, "compiled"):
            module.compiled = torch.cuda.is_available()
    for block in blocks(model):
        block.forward = partial(
            _on_documents, block.forward, torch.compile(block.forward, dynamic=True)
        )


def _on_documents(plain: Callable, compiled: Callable, *args, **kwargs):
    """A block's forward, compiled in passes over documents only."""
    return (compiled if kwargs.get("documents") is not None else plain)(*args, **kwargs)


def shard(root: nn.Module, device: str, half: bool) -> None:
    """Shard a model over all processes, in place: each block, then the root (FSDP2).

    Rank 0 holds the model and the others hold it on the meta device. Weights are whole inside the
    methods that `root.METHODS` names. Master weights keep their type; with `half` blocks compute in
    bfloat16 and gradients are summed in float32. On one process nothing changes: a plain module is
    faster there (33-44 % of a step on CPU).
    """
    if world() == 1:
        return
    import torch
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    full = {name: tensor.detach() if rank() == 0 else None for name, tensor in _tensors(root)}
    policy = MixedPrecisionPolicy(
        torch.bfloat16 if half else None, torch.float32 if half else None, cast_forward_inputs=False
    )
    mesh = torch.distributed.device_mesh.init_device_mesh(device.split(":")[0], (world(),))
    # id of a tensor -> (the tensor, its replacement)
    made: dict[int, tuple] = {}
    # only one block at a time is whole on the device
    for module in (*blocks(root), root):
        _empty_like(module, device, made)
        # the root too, which FSDP would leave whole after a pass without a backward pass
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name in root.METHODS:
        register_fsdp_forward_method(root, name)
    for name, tensor in _tensors(root):
        whole = (
            full[name].to(device).contiguous()
            if rank() == 0
            else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        )
        torch.distributed.broadcast(whole, 0)
        with torch.no_grad():
            if hasattr(tensor, "to_local"):
                start, rows = local_rows(tensor)
                tensor.to_local().copy_(whole[start : start + rows])
            else:
                tensor.copy_(whole)
        full[name] = None
    # the first pass may be one of a block alone, or without the adapter, whose weights decide the
    # type of gradients
    root._get_fsdp_state()._lazy_init()


@contextmanager
def unsharded(model: nn.Module, root_only: bool = False) -> Iterator[None]:
    """Inside, every process holds the whole weights and runs passes of its own, for generation.

    With `root_only` blocks stay sharded: passes may go through a part of the root, the same ones on
    all processes. What is held already stays so.
    """
    parts = [model] if root_only else model.modules()
    parts = [m for m in parts if hasattr(m, "unshard") and not getattr(m, "held", False)]
    for module in parts:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
        module.held = True
    try:
        yield
    finally:
        for module in parts:
            module.held = False
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
        if parts:
            # FSDP would gather ahead in the order of passes that not every process has run
            model._get_fsdp_state()._comm_ctx.post_forward_order.clear()


def _empty_like(root: nn.Module, device: str, made: dict[int, tuple]) -> None:
    """Replace tensors that are not sharded yet by empty ones on `device`, in place.

    A tensor that two modules share stays shared.
    """
    import torch

    for module in root.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is None or hasattr(old, "to_local"):
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, old.requires_grad)
                    made |= {id(old): (old, new), id(new): (new, new)}
                table[name] = made[id(old)][1]


def _tensors(model: nn.Module):
    """(name, tensor) of every parameter and buffer once, also of buffers that are not saved."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; where it is sharded, all processes must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_rows(tensor) -> tuple[int, int]:
    """(first row, number of rows) that this process holds of a tensor sharded by rows."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[0], shape[0]
