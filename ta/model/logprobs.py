"""Log-probabilities and cross-entropy from hidden states at chosen positions.

Logits are made in chunks of positions, so no (B, T, V) tensor ever exists. Letters: M chosen
positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Head(NamedTuple):
    """An output layer with its scale and soft cap.

    logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap), and without tanh and cap scale *
    (hidden @ weight.T + bias) where `cap` is None.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None
    # whether elementwise operations on logits are compiled into few kernels
    compiled: bool = False


def cross_entropy_sum(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor) -> Tensor:
    """sum_m weights[m] * -log p(targets[m] | hidden[m]), a float32 (or float64) scalar.

    Shapes: hidden (M, D), targets (M,), weights (M,). Gradients are made in the forward pass while
    the logits of a chunk exist: three matrix products in all, with `chunk_rows` rows of logits at
    a time.
    """
    return _CrossEntropySum.apply(hidden, head.weight, head.bias, head, targets, weights)


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(targets[m] | hidden[m]) -> (M,) float32 (or float64), for any loss on top.

    Shapes: hidden (M, D), targets (M,). The backward pass computes the logits of each chunk again.
    """
    # log sum exp of each row (chunk, 1), by the first row of its chunk
    norms = {}

    def values(logits: Tensor, here: slice) -> Tensor:
        target = targets[here, None]
        if head.compiled:
            norm, chosen = _compiled(_norms)(logits, target)
        else:
            chosen = logits.gather(1, target)
            norm, _ = _exponentiate(logits)
        norms[here.start] = norm
        return (chosen - norm)[:, 0]

    def grads(logits: Tensor, here: slice, share: Tensor, dtype: torch.dtype) -> Tensor:
        target, norm = targets[here, None], norms[here.start]
        if head.compiled and head.cap is None:
            return _compiled(_logit_grads)(logits, norm, target, -share, dtype)
        return logits.sub_(norm).exp_().mul_(-share).scatter_add_(1, target, share)

    return _PerPosition.apply(hidden, head.weight, head.bias, head, values, grads, 1)


Divergence = Literal["forward", "reverse", "js"]


def divergences(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    kind: Divergence,
    beta: float = 0.5,
) -> Tensor:
    """A divergence of student q from teacher p over the whole vocabulary at each position -> (M,).

    forward: KL(p || q). reverse: KL(q || p). js: beta KL(p || m) + (1 - beta) KL(q || m) with m =
    beta p + (1 - beta) q, the generalised Jensen-Shannon divergence of GKD, arXiv 2306.13649 eq. 1.

    hidden (M, D) and teacher_hidden (M, D_t). The teacher gets no gradient. The backward pass
    computes the logits of each chunk again. Where one head has more rows than the other, as tables
    are padded, those that both have count.
    """
    rows = min(len(head.weight), len(teacher_head.weight))
    head, teacher_head = _first_rows(head, rows), _first_rows(teacher_head, rows)
    teacher_hidden, teacher_head = _cast(teacher_hidden.detach(), teacher_head, hidden)

    def both(logits: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        teacher, _ = _logits(teacher_hidden[here], teacher_head)
        return _divergence(logits.log_softmax(1), teacher.log_softmax(1), kind, beta)

    def values(logits: Tensor, here: slice) -> Tensor:
        return both(logits, here)[0]

    def grads(logits: Tensor, here: slice, share: Tensor, dtype: torch.dtype) -> Tensor:
        return both(logits, here)[1] * share

    # nine tensors of the size of the logits are alive at a time
    return _PerPosition.apply(hidden, head.weight, head.bias, head, values, grads, 4)


def _first_rows(head: Head, rows: int) -> Head:
    bias = None if head.bias is None else head.bias[:rows]
    return head._replace(weight=head.weight[:rows], bias=bias)


def sequence_sums(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Sum the (M,) values of each of n sequences -> (n,).

    `owners` (M,) gives the sequence of each value.
    """
    return values.new_zeros(n).index_add(0, owners, values)


def chunk_rows(device: torch.device, parts: int = 1) -> int:
    """The number of rows of logits that a device holds at a time; a GPU so many parts fewer."""
    return 4096 // parts if device.type == "cuda" else 256


@lru_cache
def _widens(device: str) -> bool:
    """Whether products of bfloat16 matrices can be written and summed in float32: on CUDA."""
    total = torch.ones(16, 16, device=device)
    x = torch.full((16, 16), 0.5, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
        summed = bool((total == 5).all())
        return summed and torch.mm(x, x, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):
        return False


@lru_cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _norms(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row and the logit of its target, (chunk, 1) each."""
    return logits.logsumexp(1, keepdim=True), logits.gather(1, target)


def _logit_grads(
    logits: Tensor, norm: Tensor, target: Tensor, share: Tensor, dtype: torch.dtype
) -> Tensor:
    """share * (softmax - 1 at the target), (chunk, V) in `dtype`.

    This is the gradient of -share * log p(target) by the logits.
    """
    at_target = torch.arange(logits.shape[1], device=logits.device) == target
    return (((logits - norm).exp() - at_target.to(logits.dtype)) * share).to(dtype)


def _logits(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Logits in at least float32, and d logits / d raw where it is not the constant `scale`."""
    weight = head.weight.t()
    if hidden.dtype in (torch.float16, torch.bfloat16) and _widens(hidden.device.type):
        raw = torch.mm(hidden, weight, out_dtype=torch.float32)
    else:
        raw = hidden @ weight
        raw = raw.to(_wide(raw))
    if head.bias is not None:
        raw += head.bias
    if head.scale != 1.0:
        raw *= head.scale
    if head.cap is None:
        return raw, None
    squashed = torch.tanh(raw / head.cap)
    return head.cap * squashed, 1 - squashed**2


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (chunk, V), in place, by exp(logits - greatest of the row).

    Returns log sum exp of each row and the sum of the new row, (chunk, 1) each.
    """
    greatest = logits.amax(1, keepdim=True)
    mass = logits.sub_(greatest).exp_().sum(1, keepdim=True)
    return greatest + mass.log(), mass


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(hidden: Tensor, head: Head, like: Tensor) -> tuple[Tensor, Head]:
    """Both in the type of the products, which is that of `like`, under autocast its type."""
    dtype, device = like.dtype, like.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head._replace(weight=head.weight.to(dtype))


def _chunks(hidden: Tensor, parts: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Where each chunk of positions, in so many parts on a GPU, is, and its hidden states."""
    size = chunk_rows(hidden.device, parts)
    for start in range(0, len(hidden), size):
        here = slice(start, start + size)
        yield here, hidden[here]


class _Gradients:
    """Gradients of hidden states, and of weight and bias where they are `needed`, in sums."""

    def __init__(self, hidden: Tensor, head: Head, needed: Sequence[bool]):
        self.head, wide = head, _wide(hidden)
        _, of_weight, of_bias = needed
        kind = {"dtype": wide, "device": hidden.device}
        self.hidden = torch.empty_like(hidden)
        self.weight = torch.zeros(head.weight.shape, **kind) if of_weight else None
        self.bias = torch.zeros(len(head.weight), **kind) if of_bias else None
        # in which the gradients of a chunk are best given
        self.dtype = wide if of_bias else hidden.dtype

    def add(self, here: slice, hidden: Tensor, rows: Tensor, slope: Tensor | None) -> None:
        """Add those of one chunk, given d loss / d logits (chunk, V) in `rows`.

        The gradient of the weight is summed in float32.
        """
        rows = rows if slope is None else rows * slope
        low, total = rows.to(hidden.dtype), self.weight
        torch.mm(low, self.head.weight, out=self.hidden[here])
        if total is not None:
            if total.dtype == low.dtype:
                total.addmm_(low.t(), hidden)
            elif _widens(low.device.type):
                torch.addmm(total, low.t(), hidden, out_dtype=total.dtype, out=total)
            else:
                total += low.t() @ hidden
        if self.bias is not None:
            self.bias += rows.sum(0)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, weights):
        """The sum; the gradients of each chunk are made while its logits exist."""
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        hidden, head = _cast(hidden, head, hidden)
        needed, wide = ctx.needs_input_grad[:3], _wide(hidden)
        gradients = _Gradients(hidden, head, needed) if any(needed) else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        compiled = head.compiled and head.cap is None
        for here, h in _chunks(hidden):
            target, share = targets[here, None], weights[here, None].to(wide)
            logits, slope = _logits(h, head)
            if compiled:
                norm, chosen = _compiled(_norms)(logits, target)
            else:
                chosen = logits.gather(1, target)
                norm, mass = _exponentiate(logits)
            total += ((norm - chosen) * share).sum()
            if gradients is None:
                continue
            share = share * head.scale
            if compiled:
                rows = _compiled(_logit_grads)(logits, norm, target, share, gradients.dtype)
            else:
                rows = logits.mul_(share / mass).scatter_add_(1, target, -share)
            gradients.add(here, h, rows, slope)
            # the next chunk takes their place in memory
            del logits, rows
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of the forward pass times the gradient of the sum, in place.

        Autograd therefore refuses a second backward pass.
        """
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        parts = [None if d is None else d.mul_(grad).to(dtype) for d, dtype in saved]
        return *parts, None, None, None


class _PerPosition(torch.autograd.Function):
    """One value a position of its logits; the backward pass makes these again.

    For the logits (chunk, V) of the positions `here`, `values(logits, here)` are (chunk,), and
    `grads(logits, here, share, dtype)` is `share` times their gradient by the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, values, grads, parts):
        """The values, chunk by chunk."""
        ctx.save_for_backward(hidden, weight, bias)
        ctx.plan = head, grads, parts
        hidden, head = _cast(hidden, head, hidden)
        ctx.dtype = hidden.dtype
        out = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        for here, h in _chunks(hidden, parts):
            out[here] = values(_logits(h, head)[0], here)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients of any loss of the values, chunk by chunk."""
        inputs, (head, grads, parts) = ctx.saved_tensors, ctx.plan
        hidden, weight = (x.to(ctx.dtype) for x in inputs[:2])
        head = head._replace(weight=weight)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[:3])
        for here, h in _chunks(hidden, parts):
            logits, slope = _logits(h, head)
            rows = grads(logits, here, grad[here, None] * head.scale, gradients.dtype)
            gradients.add(here, h, rows, slope)
            del logits, rows
        sums = gradients.hidden, gradients.weight, gradients.bias
        pairs = zip(sums, inputs, strict=True)
        cast = [d.to(x.dtype) if d is not None else None for d, x in pairs]
        return *cast, None, None, None, None


def _divergence(
    log_q: Tensor, log_p: Tensor, kind: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """(chunk,) values, and (chunk, V) their gradients by the student's logits."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward":
        return (p * (log_p - log_q)).sum(1), q - p
    if kind == "reverse":
        # d value / d q, up to a constant
        grads = log_q - log_p
        values = (q * grads).sum(1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        grads = (1 - beta) * (log_q - log_m)
        values = beta * (p * (log_p - log_m)).sum(1) + (q * grads).sum(1)
    return values, q * (grads - (q * grads).sum(1, keepdim=True))
