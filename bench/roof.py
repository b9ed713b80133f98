"""What step time, share of the matrix rate and memory should training on one GPU have?

    python bench/roof.py                     # no GPU: some seconds a line on one CPU core
    python bench/roof.py --only "1B full" "1B full, compiled" --products 650 --memory 3.3

The passes run on fake tensors, which have shapes and no values. Every operation of forward and
backward takes the longest of three times: its multiplications over the rate of products (or of
attention), the bytes that it reads and writes over the memory's rate, and FLOOR. `compiled` counts
all operations between two products as one kernel that reads and writes only what others have made
or need: a lower bound of what a compiler can reach. The device waits where the host needs longer
to launch the kernels: a step takes the longer of the two times. AdamW moves 40 bytes a trained
weight (gradient norm, scaling and update); with moments in 8 bits and all else in bfloat16 16.

The rates are ceilings that `bench/gpu.py` measured apart from training on one H200. `share` is of
989 TFLOP/s, for the FLOPs that the documents ask for (`bench/mfu.py` counts the same).
"""

import contextlib
import json
import weakref
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

try:
    from harness import Figures, parser, read
except ImportError:
    from bench.harness import Figures, parser, read

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import mfu
from bench.work import lora

FLOOR = 2e-6  # seconds of the shortest kernel
HEAD_ROWS = 4096  # rows of logits that a GPU holds at a time
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # name: place of the first factor
READ_AS_WRITTEN = ("embedding", "index_select", "gather", "index")  # only the rows that are taken
FREE = {
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
}


class Operation(NamedTuple):
    """One operation of a pass."""

    kind: str  # "products", "attention" or "rest"
    flops: float
    reads: dict[int, int]  # storage: bytes
    writes: dict[int, int]


class Trace(TorchDispatchMode):
    """Notes every operation on fake tensors, and the bytes that are alive.

    `attention` is the number of FLOPs of one forward call of the attention kernel.
    """

    def __init__(self, attention: float):
        super().__init__()
        self.attention = attention
        self.operations: list[Operation] = []
        self.numbers: dict[int, int] = {}  # of storages that are alive
        self.made = self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space == "prim" or name in ("device", "is_same_size"):
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        reads = {self._number(t, new=False): size(t) for t in given}
        writes = {self._number(t, new=True): size(t) for t in made}
        returns = [r.alias_info for r in func._schema.returns]
        view = func.is_view or any(alias is not None and not alias.is_write for alias in returns)
        if view or name in FREE:
            return out
        if name in READ_AS_WRITTEN:
            reads = dict(writes)
        elif name in ("scatter_add_", "scatter"):  # a few places of a large tensor
            reads = writes = {number: min(reads.values()) for number in writes}
        kind, flops = "rest", 0.0
        if "flash" in name or "varlen" in name:
            kind = "attention"
            flops = self.attention * (2.5 if "backward" in name else 1)
        elif name in PRODUCTS:
            kind = "products"
            flops = 2 * made[0].numel() * args[PRODUCTS[name]].shape[-1]
        self.operations.append(Operation(kind, flops, reads, writes))
        return out

    def _number(self, tensor, new: bool) -> int:
        """The number of a tensor's storage; storages made during the trace count as alive."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.numbers:
            self.made += 1
            self.numbers[key] = self.made
            held = storage.nbytes() if new else 0
            self.live += held
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._died, key, held)
        return self.numbers[key]

    def _died(self, key: int, held: int) -> None:
        self.numbers.pop(key, None)
        self.live -= held


def size(tensor) -> int:
    """Bytes of a tensor, of repeated ones once."""
    count = tensor.numel()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count //= length if stride == 0 and length > 1 else 1
    return count * tensor.element_size()


def fused(operations: list[Operation]) -> list[Operation]:
    """Everything between two products (or attention) as one operation.

    It reads what came from outside, once, and writes what is read later.
    """
    last = {number: i for i, op in enumerate(operations) for number in op.reads}
    out, group = [], []

    def close(end: int) -> None:
        if not group:
            return
        reads, writes = {}, {}
        for op in group:
            new = {n: b for n, b in op.reads.items() if n not in writes}
            reads |= {n: max(b, reads.get(n, 0)) for n, b in new.items()}
            writes |= op.writes
        # what nothing reads later is gone, but gradients of weights, which no operation reads, stay
        gone = {n for n in writes if n in last and last[n] < end}
        kept = {n: b for n, b in writes.items() if n not in gone}
        out.append(Operation("rest", 0.0, reads, kept))
        group.clear()

    for i, op in enumerate(operations):
        if op.kind == "rest":
            group.append(op)
        else:
            close(i)
            out.append(op)
    close(len(operations))
    return out


@torch.library.custom_op("bench::norm", mutates_args=())
def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A root-mean-square norm as one kernel, for its shape and traffic alone."""
    return torch.empty_like(x)


@torch.library.custom_op("bench::norm_backward", mutates_args=())
def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Its gradients, likewise."""
    return torch.empty_like(x), torch.empty_like(weight)


norm.register_fake(lambda x, weight: torch.empty_like(x))
norm_backward.register_fake(lambda grad, x, weight: (torch.empty_like(x), torch.empty_like(weight)))
norm.register_autograd(
    lambda ctx, grad: norm_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Norm(torch.nn.Module):
    """A norm that keeps its input's type, as `keep_input_dtype` leaves it."""

    def __init__(self, weight: torch.nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        """x (..., D)."""
        return norm(x, self.weight.to(x.dtype))


def without_casts(model: torch.nn.Module) -> None:
    """What `keep_input_dtype` does where weights have values, which it must see."""
    from ta.model.language_model import OutsideAutocast

    for parent in list(model.modules()):
        if hasattr(parent, "cast_input_dtype_enabled"):
            parent.cast_input_dtype_enabled = OutsideAutocast()
        for name, module in parent.named_children():
            if hasattr(module, "variance_epsilon"):
                setattr(parent, name, Norm(module.weight))


@contextlib.contextmanager
def as_on_a_gpu():
    """Fake tensors and the head's choices of a GPU, on a machine without one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ta.model import logprobs

    with (
        patch.object(logprobs, "chunk_rows", lambda device, parts: HEAD_ROWS // parts),
        patch.object(logprobs, "_widens", lambda device: True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def on_device(batch):
    """The batch cut for one attention kernel, as it is on a GPU, of fake tensors."""
    from ta.data.batch import cuts_of

    cuts = cuts_of(batch.lengths, batch.prefixes)
    fake = lambda part: torch.empty_like(part) if torch.is_tensor(part) else part
    return type(batch)(*map(fake, batch))._replace(cuts=type(cuts)(*map(fake, cuts)))


def meta_model(size: str, adapted: bool = False):
    """The transformers model of `bench/mfu.py` in this shape, with or without adapter, no values."""
    from ta.model.attention import register

    with patch.object(mfu, "device", lambda: "meta"):
        model = mfu.build(None, size, register())
    return lora(model) if adapted else model


def fake_model(inner: torch.nn.Module, casts: bool, checkpointing: bool, kept: bool):
    """A LanguageModel of fake weights as it is trained on a GPU; inside `as_on_a_gpu`."""
    from ta import parallel
    from ta.model.language_model import LanguageModel

    parallel._empty_like(inner, "cpu", {})
    model = LanguageModel(inner, "packed", torch.bfloat16)
    if not casts:
        without_casts(model)
    parallel.frozen_to_bfloat16(model)
    if checkpointing:
        parallel.checkpoint_activations(model, kept)
    return model.train()


def pairs(count: int, prompt: int, answer: int, shared: bool):
    """A Batch of pairs of answers to a prompt."""
    import numpy as np

    from ta.data.batch import lay_out

    ids = [np.ones(prompt + answer, np.int64)] * (2 * count)
    weights = [(np.arange(prompt + answer) >= prompt).astype(np.float32)] * (2 * count)
    return lay_out(ids, weights, True, [0, prompt] * count if shared else ())


def times(flags, operations: list[Operation], compiled: bool, trained: int = 0) -> Figures:
    """Milliseconds of the device by kind of operation, of AdamW, and of the host to launch them."""
    operations = fused(operations) if compiled else operations
    spent = dict.fromkeys(("products_ms", "attention_ms", "rest_ms"), 0.0)
    for op in operations:
        rate = flags.attention if op.kind == "attention" else flags.products
        moved = sum(op.reads.values()) + sum(op.writes.values())
        seconds = max(op.flops / rate / 1e12, moved / flags.memory / 1e12, FLOOR)
        spent[f"{op.kind}_ms"] += 1000 * seconds
    spent["adamw_ms"] = 1000 * 40 * trained / flags.memory / 1e12
    return spent | {"host_ms": 1e-3 * flags.launch * len(operations)}


def figures(spent: Figures, wanted: float, tokens: int, held: int) -> Figures:
    """The line of a step that wants so many FLOPs for so many tokens and holds so many bytes."""
    device = sum(spent.values()) - spent["host_ms"]
    ms = max(device, spent["host_ms"])
    share, rate = 1000 * wanted / ms / mfu.PEAK, 1000 * tokens / ms
    return {"ms": ms, "share": share, "tokens_a_s": rate, "gib": held / 2**30, **spent}


def step(
    flags,
    size: str,
    tokens: int = 16_384,
    *,
    adapted: bool = False,
    compiled: bool = False,
    casts: bool = False,
    checkpointing: bool = False,
    kept: bool = False,
    small: bool = False,
    dpo: str = "",
) -> Figures:
    """Milliseconds, share and GiB of one step of --tokens of chats, or of 12 pairs for DPO.

    `dpo` says how prompts lie: "shared" or "twice". `casts` leaves norms and adapters as they come.
    `kept` is --keep-products, `small` --optimizer adamw8bit --weights bfloat16.
    """
    from ta.data.batch import lay_out

    size, tokens = ("tiny", 256) if flags.tiny else (size, tokens)
    real = meta_model(size)
    config = real.config
    body = sum(p.numel() for n, p in real.named_parameters() if ".layers." in n and p.dim() == 2)
    if dpo:
        shape = (2, 40, 20) if flags.tiny else (12, 400, 150)
        batch = pairs(*shape, shared=dpo == "shared")
    else:
        documents = mfu.chats(SimpleNamespace(steps=1, tokens=tokens), config.vocab_size)[0]
        batch = lay_out([ids for ids, _ in documents], [weights for _, weights in documents])
    wanted = mfu.wanted(config, body, batch, adapted, reference=bool(dpo))

    inner = meta_model(size, adapted)
    with as_on_a_gpu():
        model = fake_model(inner, casts, checkpointing, kept)
        for parameter in model.parameters() if small else ():
            parameter.data = parameter.data.to(torch.bfloat16)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        batch = on_device(batch)
        with Trace(mfu.attention_of(config, batch)) as trace:
            if dpo:
                with torch.no_grad(), model.inner.disable_adapter():
                    model.logprobs(batch)
                model.logprobs(batch).sum().backward()
            else:
                model.loss(batch).backward()
    spent = times(flags, trace.operations, compiled, trained)
    if small:
        spent["adamw_ms"] *= 16 / 40
    moments = (2 if small else 8) * trained
    return figures(spent, wanted, sum(batch.lengths), weights + trace.peak + moments)


def head(flags, compiled: bool = False) -> Figures:
    """The head of `bench/mfu.py`: cross-entropy and both gradients at 8,192 x 4096 x 152k."""
    from ta.model.logprobs import Head, cross_entropy_sum

    tokens, width, vocabulary = (64, 32, 512) if flags.tiny else (8192, 4096, 152_064)
    with as_on_a_gpu():
        hidden, weight = (
            torch.empty(n, width, dtype=torch.bfloat16, requires_grad=True)
            for n in (tokens, vocabulary)
        )
        targets, weights = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        with Trace(0.0) as trace:
            cross_entropy_sum(hidden, Head(weight), targets, weights).backward()
    spent = times(flags, trace.operations, compiled)
    return figures(spent, 6 * tokens * width * vocabulary, tokens, trace.peak)


LINES = {
    "1B full": partial(step, size="1B", tokens=16_384),
    "1B full, casts left": partial(step, size="1B", tokens=16_384, casts=True),
    "1B full, compiled": partial(step, size="1B", tokens=16_384, compiled=True),
    "8B LoRA 4k": partial(step, size="8B", tokens=4096, adapted=True),
    "8B LoRA 4k, casts left": partial(step, size="8B", tokens=4096, adapted=True, casts=True),
    "8B LoRA 4k, compiled": partial(step, size="8B", tokens=4096, adapted=True, compiled=True),
    "8B LoRA 16k": partial(step, size="8B", tokens=16_384, adapted=True),
    "8B LoRA 16k, compiled": partial(step, size="8B", tokens=16_384, adapted=True, compiled=True),
    "8B full, checkpointing": partial(step, size="8B", tokens=8192, checkpointing=True),
    "8B full, checkpointing, casts left": partial(
        step, size="8B", tokens=8192, checkpointing=True, casts=True
    ),
    "8B full, checkpointing, compiled": partial(
        step, size="8B", tokens=8192, checkpointing=True, compiled=True
    ),
    "8B full, checkpointing, small": partial(
        step, size="8B", tokens=8192, checkpointing=True, small=True
    ),
    "8B full, checkpointing, small, compiled": partial(
        step, size="8B", tokens=8192, checkpointing=True, small=True, compiled=True
    ),
    "8B full, products kept, small": partial(
        step, size="8B", tokens=8192, checkpointing=True, kept=True, small=True
    ),
    "1B LoRA 8k, compiled": partial(step, size="1B", tokens=8192, adapted=True, compiled=True),
    "8B full, small, not checkpointed, compiled": partial(
        step, size="8B", tokens=8192, small=True, compiled=True
    ),
    "DPO 1B LoRA": partial(step, size="1B", tokens=0, adapted=True, dpo="shared"),
    "DPO 1B LoRA, prompts twice": partial(step, size="1B", tokens=0, adapted=True, dpo="twice"),
    "DPO 1B LoRA, compiled": partial(
        step, size="1B", tokens=0, adapted=True, dpo="shared", compiled=True
    ),
    "head": head,
    "head, compiled": partial(head, compiled=True),
}


def main(flags) -> None:
    """Print one line of the table after the other, or the figures of one as JSON."""
    torch.set_num_threads(1)
    if flags.one:
        print(json.dumps(LINES[flags.one](flags)))
        return
    names = [name for name in LINES if not flags.only or name in flags.only]
    for name in names:
        told = LINES[name](flags)
        if name == names[0]:
            print("".join([" " * 36, *(key.rjust(13) for key in told)]))
        cells = [f"{value:13,.4g}" for value in told.values()]
        print("".join([name.ljust(36), *cells]), flush=True)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--products", type=float, default=750, help="TFLOP/s of large products")
    flags.add_argument("--attention", type=float, default=70, help="TFLOP/s of short documents")
    flags.add_argument("--memory", type=float, default=4.1, help="TB/s that kernels move")
    flags.add_argument(
        "--launch", type=float, default=6.2, help="microseconds of the host a kernel"
    )
    main(read(flags))
