"""Log-probabilities and cross-entropy from hidden states at chosen positions, in chunks: no (B, T, V) tensor is ever made.

Letters: M chosen positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Head(NamedTuple):
    """An output layer: logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap), without tanh where `cap` is None."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None


def cross_entropy_sum(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, chunk: int | None = None
) -> Tensor:
    """sum_m weights[m] * -log p(targets[m] | hidden[m]), a float32 (or float64) scalar: hidden (M, D), targets (M,), weights (M,).

    Gradients are made in the forward pass while a chunk's logits exist: three matrix products in all, `chunk` rows of logits at a time.
    """
    return _CrossEntropySum.apply(
        hidden,
        head.weight,
        head.bias,
        targets,
        weights,
        head.scale,
        head.cap,
        chunk or _rows(hidden),
    )


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """log p(targets[m] | hidden[m]) -> (M,) float32 (or float64), any loss on top; logits are made again in the backward pass."""
    return _TokenLogprobs.apply(
        hidden, head.weight, head.bias, targets, head.scale, head.cap, chunk or _rows(hidden)
    )


def sequence_sums(values: Tensor, owners: Tensor, n: int) -> Tensor:
    """Sum the (M,) values of each of n sequences: (n,)."""
    return values.new_zeros(n).index_add(0, owners, values)


def _rows(hidden: Tensor) -> int:
    return 2048 if hidden.is_cuda else 256


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits in at least float32, and d logits / d raw where it is not the constant `scale`."""
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
    """Turn logits (chunk, V) in place into exp(logits - best of the row); their log-norms and the rows' sums, (chunk, 1) each."""
    best = logits.amax(1, keepdim=True)
    mass = logits.sub_(best).exp_().sum(1, keepdim=True)
    return best + mass.log(), mass


def _gradients(rows: Tensor, h: Tensor, weight: Tensor, d_hidden: Tensor, d_weight, d_bias) -> None:
    """Add one chunk's gradients, given d loss / d raw logits (chunk, V) in `rows`; the weight's is summed in float32."""
    low = rows.to(h.dtype)
    torch.mm(low, weight, out=d_hidden)
    if d_weight is not None:
        if d_weight.dtype == low.dtype:
            d_weight.addmm_(low.t(), h)
        else:
            d_weight += low.t() @ h
    if d_bias is not None:
        d_bias += rows.sum(0)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Under autocast the products run in its dtype, as every other layer's do."""
    device = hidden.device.type
    return (
        torch.get_autocast_dtype(device)
        if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        else hidden.dtype
    )


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, scale, cap, chunk):
        """The sum, with the gradients of each chunk made while its logits exist."""
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
            chosen = logits.gather(1, target)
            norm, mass = _exponentiate(logits)
            total += ((norm - chosen) * share).sum()
            if d_hidden is None:
                continue
            share = share * scale
            rows = logits.mul_(share / mass).scatter_add_(1, target, -share)
            _gradients(
                rows if slope is None else rows * slope, h, w, d_hidden[here], d_weight, d_bias
            )
            del logits, rows  # the next chunk takes their place in memory
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """What the forward pass has made, times the gradient of the sum: in place, so autograd refuses to do it twice."""
        parts = (
            None if d is None else d.mul_(grad).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (
            *(d if need else None for d, need in zip(parts, ctx.needs_input_grad[:3], strict=True)),
            None,
            None,
            None,
            None,
            None,
        )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap, chunk):
        """Log-probabilities, and the log-norms from which the backward pass makes each chunk's softmax again."""
        dtype = _compute_dtype(hidden)
        h_all, w = hidden.to(dtype), weight.to(dtype)
        out = torch.empty(len(h_all), dtype=_wide(h_all), device=hidden.device)
        norms = torch.empty_like(out)
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            logits, _ = _logits(h_all[here], w, bias, scale, cap)
            chosen = logits.gather(1, targets[here, None])
            norms[here] = _exponentiate(logits)[0][:, 0]
            out[here] = chosen[:, 0] - norms[here]
            del logits
        ctx.save_for_backward(hidden, weight, bias, targets, norms)
        ctx.plan = dtype, scale, cap, chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients of any loss of the log-probabilities, chunk by chunk."""
        hidden, weight, bias, targets, norms = ctx.saved_tensors
        dtype, scale, cap, chunk = ctx.plan
        h_all, w = hidden.to(dtype), weight.to(dtype)
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(h_all)
        d_weight = torch.zeros(w.shape, dtype=_wide(w), device=w.device) if needs_weight else None
        d_bias = torch.zeros(len(w), dtype=_wide(w), device=w.device) if needs_bias else None
        for start in range(0, len(h_all), chunk):
            here = slice(start, start + chunk)
            logits, slope = _logits(h_all[here], w, bias, scale, cap)
            share = grad[here, None] * scale
            rows = (
                logits.sub_(norms[here, None])
                .exp_()
                .mul_(-share)
                .scatter_add_(1, targets[here, None], share)
            )
            _gradients(
                rows if slope is None else rows * slope,
                h_all[here],
                w,
                d_hidden[here],
                d_weight,
                d_bias,
            )
            del logits, rows
        cast = [
            d.to(x.dtype) if d is not None else None
            for d, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]
        return *cast, None, None, None, None
