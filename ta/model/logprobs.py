"""Log-probabilities and cross-entropy from hidden states at chosen positions.

Logits are made in chunks of positions, so no (B, T, V) tensor ever exists. Letters: M chosen
positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def cross_entropy_sum(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, chunk: int | None = None
) -> Tensor:
    """sum_m weights[m] * -log p(targets[m] | hidden[m]), a float32 (or float64) scalar.

    Shapes: hidden (M, D), targets (M,), weights (M,). Gradients are made in the forward pass while
    the logits of a chunk exist: three matrix products in all, with `chunk` rows of logits at a
    time.
    """
    return _CrossEntropySum.apply(
        hidden,
        head.weight,
        head.bias,
        targets,
        weights,
        head.scale,
        head.cap,
        chunk or chunk_rows(hidden.device),
        head.compiled,
    )


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log p(targets[m] | hidden[m]) -> (M,) float32 (or float64), for any loss on top.

    Shapes: hidden (M, D), targets (M,). The backward pass computes the logits of each chunk again.
    """
    return _TokenLogprobs.apply(
        hidden,
        head.weight,
        head.bias,
        targets,
        head.scale,
        head.cap,
        chunk or chunk_rows(hidden.device),
        head.compiled,
    )


Divergence = Literal["forward", "reverse", "js"]


def divergences(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    kind: Divergence,
    beta: float = 0.5,
    chunk: int | None = None,
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
    return _Divergences.apply(
        hidden,
        head.weight,
        head.bias,
        teacher_hidden.detach(),
        teacher_head,
        (head.scale, head.cap),
        kind,
        beta,
        chunk or chunk_rows(hidden.device),
    )


def _first_rows(head: Head, rows: int) -> Head:
    bias = None if head.bias is None else head.bias[:rows]
    return head._replace(weight=head.weight[:rows], bias=bias)


def sequence_sums(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Sum the (M,) values of each of n sequences -> (n,).

    `owners` (M,) gives the sequence of each value.
    """
    return values.new_zeros(n).index_add(0, owners, values)


def chunk_rows(device: torch.device) -> int:
    """The number of rows of logits that a device holds at a time."""
    return 4096 if device.type == "cuda" else 256


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


def _slopes(
    logits: Tensor, norm: Tensor, target: Tensor, share: Tensor, dtype: torch.dtype
) -> Tensor:
    """share * (softmax - 1 at the target), (chunk, V) in `dtype`.

    This is the gradient of -share * log p(target) by the logits.
    """
    at_target = torch.arange(logits.shape[1], device=logits.device) == target
    return (((logits - norm).exp() - at_target.to(logits.dtype)) * share).to(dtype)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least float32, and d logits / d raw where it is not the constant `scale`."""
    if hidden.dtype in (torch.float16, torch.bfloat16) and _widens(hidden.device.type):
        raw = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        raw = hidden @ weight.t()
        raw = raw if raw.dtype == torch.float64 else raw.float()
    if bias is not None:
        raw += bias
    if scale != 1.0:
        raw *= scale
    if cap is None:
        return raw, None
    squashed = torch.tanh(raw / cap)
    return cap * squashed, 1 - squashed**2


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits (chunk, V), in place, by exp(logits - greatest of the row).

    Returns log sum exp of each row and the sum of the new row, (chunk, 1) each.
    """
    greatest = logits.amax(1, keepdim=True)
    mass = logits.sub_(greatest).exp_().sum(1, keepdim=True)
    return greatest + mass.log(), mass


def _gradients(rows: Tensor, h: Tensor, weight: Tensor, d_hidden: Tensor, d_weight, d_bias) -> None:
    """Add the gradients of one chunk, given d loss / d raw logits (chunk, V) in `rows`.

    The gradient of the weight is summed in float32.
    """
    low = rows.to(h.dtype)
    torch.mm(low, weight, out=d_hidden)
    if d_weight is not None:
        if d_weight.dtype == low.dtype:
            d_weight.addmm_(low.t(), h)
        elif _widens(low.device.type):
            torch.addmm(d_weight, low.t(), h, out_dtype=d_weight.dtype, out=d_weight)
        else:
            d_weight += low.t() @ h
    if d_bias is not None:
        d_bias += rows.sum(0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The type of the products: under autocast its type, as in every other layer."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, scale, cap, chunk, compiled):
        """The sum; the gradients of each chunk are made while its logits exist."""
        dtype = _compute_dtype(hidden)
        h_all, w = hidden.to(dtype), weight.to(dtype)
        wide = _wide(h_all)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(h_all) if needs_hidden or needs_weight or needs_bias else None
        d_weight = torch.zeros(w.shape, dtype=wide, device=w.device) if needs_weight else None
        d_bias = torch.zeros(len(w), dtype=wide, device=w.device) if needs_bias else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            h, target, share = h_all[here], targets[here, None], weights[here, None].to(wide)
            logits, slope = _logits(h, w, bias, scale, cap)
            if compiled and slope is None:
                norm, chosen = _compiled(_norms)(logits, target)
            else:
                chosen = logits.gather(1, target)
                norm, mass = _exponentiate(logits)
            total += ((norm - chosen) * share).sum()
            if d_hidden is None:
                continue
            share = share * scale
            if compiled and slope is None:
                out_dtype = wide if needs_bias else dtype
                rows = _compiled(_slopes)(logits, norm, target, share, out_dtype)
            else:
                rows = logits.mul_(share / mass).scatter_add_(1, target, -share)
                rows = rows if slope is None else rows * slope
            _gradients(rows, h, w, d_hidden[here], d_weight, d_bias)
            # the next chunk takes their place in memory
            del logits, rows
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradients of the forward pass times the gradient of the sum, in place.

        Autograd therefore refuses a second backward pass.
        """
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        parts = [None if d is None else d.mul_(grad).to(dtype) for d, dtype in saved]
        needed = zip(parts, ctx.needs_input_grad[:3], strict=True)
        return *(d if need else None for d, need in needed), None, None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, chunk, compiled):
        """Log-probabilities; the backward pass makes each softmax again from the kept log-norms."""
        dtype = _compute_dtype(hidden)
        h_all, w = hidden.to(dtype), weight.to(dtype)
        out = torch.empty(len(h_all), dtype=_wide(h_all), device=hidden.device)
        norms = torch.empty_like(out)
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            logits, _ = _logits(h_all[here], w, bias, scale, cap)
            if compiled:
                norm, chosen = _compiled(_norms)(logits, targets[here, None])
            else:
                chosen = logits.gather(1, targets[here, None])
                norm = _exponentiate(logits)[0]
            norms[here] = norm[:, 0]
            out[here] = chosen[:, 0] - norms[here]
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.plan = dtype, scale, cap, chunk, compiled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients of any loss of the log-probabilities, chunk by chunk."""
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        dtype, scale, cap, chunk, compiled = ctx.plan
        h_all, w = hidden.to(dtype), weight.to(dtype)
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(h_all)
        d_weight = torch.zeros(w.shape, dtype=_wide(w), device=w.device) if needs_weight else None
        d_bias = torch.zeros(len(w), dtype=_wide(w), device=w.device) if needs_bias else None
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            logits, slope = _logits(h_all[here], w, bias, scale, cap)
            norm, target, share = norms[here, None], targets[here, None], grad[here, None] * scale
            if compiled and slope is None:
                out_dtype = _wide(w) if needs_bias else dtype
                rows = _compiled(_slopes)(logits, norm, target, -share, out_dtype)
            else:
                rows = logits.sub_(norm).exp_().mul_(-share).scatter_add_(1, target, share)
                rows = rows if slope is None else rows * slope
            _gradients(rows, h_all[here], w, d_hidden[here], d_weight, d_bias)
            del logits, rows
        pairs = ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        cast = [d.to(x.dtype) if d is not None else None for d, x in pairs]
        return *cast, None, None, None, None, None


def _divergence(
    log_q: Tensor, log_p: Tensor, kind: Divergence, beta: float
) -> tuple[Tensor, Tensor]:
    """(chunk,) values, and (chunk, V) their gradients by the student's logits."""
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward":
        return (p * (log_p - log_q)).sum(1), q - p
    if kind == "reverse":
        # d value / d q, up to a constant
        slopes = log_q - log_p
        values = (q * slopes).sum(1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        slopes = (1 - beta) * (log_q - log_m)
        values = beta * (p * (log_p - log_m)).sum(1) + (q * slopes).sum(1)
    return values, q * (slopes - (q * slopes).sum(1, keepdim=True))


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, other, other_head, shape, kind, beta, chunk):
        """The values; both softmaxes exist for a chunk at a time, here and in the backward pass."""
        dtype = _compute_dtype(hidden)
        ctx.plan = dtype, other_head, shape, kind, beta, chunk
        ctx.save_for_backward(hidden, weight, bias, other)
        out = torch.empty(len(hidden), dtype=_wide(hidden.to(dtype)), device=hidden.device)
        for here, values, _, _ in _Divergences.chunks(ctx, (hidden, weight, bias, other)):
            out[here] = values
        return out

    @staticmethod
    def chunks(ctx, tensors):
        """For each chunk its rows, values, gradients by logits, and d logits / d raw logits."""
        hidden, weight, bias, other = tensors
        dtype, other_head, (scale, cap), kind, beta, chunk = ctx.plan
        h_all, w, other_weight = (x.to(dtype) for x in (hidden, weight, other_head.weight))
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            logits, slope = _logits(h_all[here], w, bias, scale, cap)
            teacher, _ = _logits(
                other[here].to(dtype), other_weight, other_head.bias, *other_head[2:4]
            )
            log_q, log_p = logits.log_softmax(1), teacher.log_softmax(1)
            yield here, *_divergence(log_q, log_p, kind, beta), slope

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients by hidden states, weight and bias of the student."""
        hidden, weight, bias, _ = ctx.saved_tensors
        dtype, _, (scale, _), *_ = ctx.plan
        h_all, w = hidden.to(dtype), weight.to(dtype)
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(h_all)
        d_weight = torch.zeros(w.shape, dtype=_wide(w), device=w.device) if needs_weight else None
        d_bias = torch.zeros(len(w), dtype=_wide(w), device=w.device) if needs_bias else None
        for here, _, rows, slope in _Divergences.chunks(ctx, ctx.saved_tensors):
            rows = rows * (grad[here, None] * scale)
            rows = rows if slope is None else rows * slope
            _gradients(rows, h_all[here], w, d_hidden[here], d_weight, d_bias)
        pairs = ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        cast = [d.to(x.dtype) if d is not None else None for d, x in pairs]
        return *cast, None, None, None, None, None, None
