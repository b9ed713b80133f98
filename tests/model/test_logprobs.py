"""Chunked log-probabilities equal plain log_softmax in value and gradient, for every kind of head."""

import pytest
import torch

from ta.model import logprobs
from ta.model.logprobs import (
    Head,
    cross_entropy_sum,
    divergences,
    sequence_sums,
    token_logprobs,
)


def plain(hidden, head, targets):
    logits = hidden @ head.weight.t()
    logits = (logits + head.bias if head.bias is not None else logits) * head.scale
    logits = head.cap * torch.tanh(logits / head.cap) if head.cap else logits
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_values_and_gradients_equal_full_logits(cap, scale, bias, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "chunk_rows", lambda device, parts=1: chunk)
    torch.manual_seed(0)
    hidden, weight, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((33, 16), (50, 16), (50,))
    )
    inputs = [hidden, weight] + [b] * bias
    head = Head(weight, b if bias else None, scale, cap)
    targets, weights = torch.randint(0, 50, (33,)), torch.rand(33)
    expected = plain(hidden, head, targets)
    loss = -(expected * weights.double()).sum()
    gradients = torch.autograd.grad(loss, inputs)
    ours = cross_entropy_sum(hidden, head, targets, weights)
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=1e-12)
    for got, want in zip(torch.autograd.grad(ours * 3, inputs), gradients, strict=True):
        torch.testing.assert_close(got, want * 3, rtol=1e-12, atol=1e-12)
    logps = token_logprobs(hidden, head, targets)
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(-(logps * weights.double()).sum(), inputs), gradients, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_what_is_compiled_computes_the_same(bias, cap, monkeypatch):
    """Through dynamo and autograd's tracer, in float64; one variant of each function for chunks of any size."""
    from functools import partial

    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(logprobs, "chunk_rows", lambda device, parts=1: 7)
    logprobs._compiled.cache_clear()
    torch.manual_seed(0)
    hidden, weight, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((33, 16), (50, 16), (50,))
    )
    inputs = [hidden, weight] + [b] * bias
    targets, weights = torch.randint(0, 50, (33,)), torch.rand(33)
    results = []
    for compiled in (False, True):
        head = Head(weight, b if bias else None, 0.3, cap, compiled)
        loss = cross_entropy_sum(hidden, head, targets, weights)
        logps = token_logprobs(hidden, head, targets)
        results.append(
            [
                loss,
                logps,
                *torch.autograd.grad(loss * 3, inputs),
                *torch.autograd.grad((logps * weights).sum(), inputs),
            ]
        )
    logprobs._compiled.cache_clear()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert 0 < counter.frame_count <= 4


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    cross_entropy_sum(hidden, Head(weight), torch.tensor([0, 1, 2, 3, 4]), torch.ones(5)).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0


def test_no_target_is_a_zero_that_can_be_differentiated():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    for loss in (
        cross_entropy_sum(hidden, Head(weight), empty, torch.zeros(0)),
        token_logprobs(hidden, Head(weight), empty).sum(),
    ):
        loss.backward()
        assert loss.item() == 0 and (weight.grad == 0).all()


def test_large_logits_stay_finite():
    hidden = (torch.randn(8, 4) * 1e4).requires_grad_()
    logps = token_logprobs(hidden, Head(torch.randn(9, 4)), torch.arange(8))
    logps.sum().backward()
    assert torch.isfinite(logps).all() and torch.isfinite(hidden.grad).all()


def test_bfloat16_is_summed_in_float32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(0, 500, (64,))
    exact = plain(hidden.double(), Head(weight.double()), targets)
    assert (token_logprobs(hidden, Head(weight), targets).double() - exact).abs().max() < 0.1
    assert token_logprobs(hidden, Head(weight), targets).dtype == torch.float32


def test_sequence_sums_by_hand():
    out = sequence_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2]), 4)
    assert out.tolist() == [1, 0, 6, 0]


def test_a_second_backward_pass_is_refused():
    """The first one has scaled the gradients where they stand."""
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss = cross_entropy_sum(hidden, Head(weight), torch.arange(5), torch.ones(5))
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_divergences_equal_those_of_full_logits(kind, cap, bias, chunk, monkeypatch):
    monkeypatch.setattr(logprobs, "chunk_rows", lambda device, parts=1: chunk)
    """In float64, values and gradients, with scales, and with a teacher of another width and a longer table."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, weight, b = (draw(*shape).requires_grad_() for shape in ((33, 16), (50, 16), (50,)))
    inputs = [hidden, weight] + [b] * bias
    head = Head(weight, b if bias else None, 0.7, cap)
    other, teacher = draw(33, 8), Head(draw(56, 8), draw(56), 0.5)
    weights, beta = torch.rand(33, generator=generator, dtype=torch.float64), 0.3
    logits = (hidden @ weight.t() + (b if bias else 0)) * 0.7
    log_q = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)
    log_p = ((other @ teacher.weight[:50].t() + teacher.bias[:50]) * 0.5).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    wanted = {
        "forward": (p * (log_p - log_q)).sum(-1),
        "reverse": (q * (log_q - log_p)).sum(-1),
        "js": beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1),
    }[kind]
    got = divergences(hidden, head, other, teacher, kind, beta)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert (got > 0).all()
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (got, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_no_divergence_from_oneself(kind):
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 16, requires_grad=True), Head(torch.randn(50, 16))
    got = divergences(hidden, head, hidden, head, kind)
    torch.testing.assert_close(got, torch.zeros(9), rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    assert grad.abs().max() < 1e-5
