"""Attention of packed documents: against plain attention of each alone, by hand on any machine, and torch's variable-length kernel on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from ta.model.attention import Documents, _varlen, document_attention

LENGTHS = (5, 1, 17, 40)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def inputs(heads=4, groups=2, width=32, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, sum(LENGTHS), width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for h in (heads, groups, groups)
    ]


def alone(query, key, value, window=0):
    """(1, T, H, D) by the definition: softmax of scaled products with the keys of the same document that are not later, nor `window` earlier."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    distance = place[:, None] - place
    seen = (
        (document[:, None] == document)
        & (distance >= 0)
        & ((distance < window) if window else True)
    )
    scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
    return (
        scores.masked_fill(~seen.to(query.device), float("-inf")).softmax(-1) @ value
    ).transpose(1, 2)


def compare(query, key, value, window, close):
    module = torch.nn.Module()
    ours, _ = document_attention(
        module, query, key, value, documents=Documents(LENGTHS), sliding_window=window
    )
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    wanted = alone(*wide, window)
    assert ours.shape == wanted.shape == (1, sum(LENGTHS), query.shape[1], query.shape[3])
    assert torch.allclose(ours.double(), wanted, atol=close)
    weights = torch.randn(
        wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(wanted.device)
    (ours.double() * weights).sum().backward()
    (wanted * weights).sum().backward()
    for x, y in zip((query, key, value), wide, strict=True):
        assert torch.allclose(x.grad.double(), y.grad, atol=4 * close)
    mixed = F.scaled_dot_product_attention(
        *(x.repeat_interleave(4 // x.shape[1], 1) for x in wide), is_causal=True
    ).transpose(1, 2)
    assert (mixed - wanted).abs().max() > 0.1, (
        "the guard: documents that see each other would differ"
    )


@pytest.mark.parametrize("window", [0, 7])
def test_each_document_sees_itself_alone(window):
    compare(*inputs(), window, 1e-12)


@pytest.mark.parametrize("window", [0, 7])
def test_the_kernel_of_a_gpu_takes_our_shapes(window):
    """On the meta device, which computes nothing, torch's kernel checks shapes and types as on a GPU."""
    query, key, value = (x.to("meta") for x in inputs(dtype=torch.bfloat16))
    try:
        out = _varlen(query, key, value, LENGTHS, None, window)
    except NotImplementedError:
        pytest.skip("this torch has no meta form of varlen_attn")
    assert out.shape == (1, sum(LENGTHS), 4, 32) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
@needs_cuda
def test_the_kernel_of_a_gpu_equals_each_document_alone(window, dtype):
    compare(*inputs(device="cuda", dtype=dtype), window, 2e-2)
