"""Attention of packed documents: against plain attention of each alone, by hand on any machine, and torch's variable-length kernel on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from ta.data.batch import cuts_of
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


def row(query, key, value, cuts):
    """The inputs as wide as the cuts want them."""
    return [
        F.pad(x, (0, 0, 0, cuts.columns - x.shape[2])) if cuts else x for x in (query, key, value)
    ]


def on(cuts, device):
    return cuts._replace(
        **{name: x.to(device) for name, x in cuts._asdict().items() if torch.is_tensor(x)}
    )


def compare(query, key, value, window, close, cuts=None):
    module = torch.nn.Module()
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    ours, _ = document_attention(
        module,
        *row(query, key, value, cuts),
        documents=Documents(LENGTHS, (), cuts),
        sliding_window=window,
    )
    ours = ours[:, : sum(LENGTHS)]
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


def test_cuts_by_hand():
    cuts = cuts_of((3, 2))
    assert cuts.columns == 128 and cuts.queries.dtype == torch.int32 and cuts.seen is None
    assert (
        cuts.queries.tolist() == cuts.keys.tolist() == [0, 3, 5] + [128] * 62
    )  # what is over is a document, then come empty ones
    assert cuts.longest == cuts.longest_keys == 256
    assert cuts_of((128,) * 64).queries.tolist() == [128 * n for n in range(65)] + [8192] * 64
    assert cuts_of((300,)).longest == 512 and cuts_of(()).queries.tolist()[:3] == [0, 1, 128]


def test_cuts_of_shared_prompts_by_hand():
    """The third document sees two tokens of the first, not of the second, which shares three; no key is left without a query."""
    cuts = cuts_of((4, 1, 2), (0, 3, 2))
    assert cuts.queries.tolist()[:6] == [0, 4, 5, 7, 128, 128]
    assert cuts.keys.tolist()[:6] == [0, 4, 8, 12, 256, 256]
    assert (
        cuts.seen.tolist()[:13] == [0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5, 6, 7]
        and cuts.seen.max() == 127
        and len(cuts.seen) == 256
    )
    for lengths, prefixes in (((64, 64), (0, 5)), ((60, 1, 60), (0, 7, 7)), ((127, 1), (0, 127))):
        cuts = cuts_of(lengths, prefixes)
        queries, keys = cuts.queries.diff(), cuts.keys.diff()
        assert (
            cuts.columns % 128 == len(cuts.seen) % 128 == 0
            and ((queries > 0) | (keys == 0)).all()
            and (keys >= queries).all()
        )


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("width", [32, 20])
def test_one_kernel_for_all_documents_equals_each_alone(window, width):
    """The code for a GPU around a kernel that computes its definition; widths that it does not take are padded."""
    import kernel  # noqa: F401

    compare(*inputs(width=width, dtype=torch.bfloat16), window, 2e-2, cuts_of(LENGTHS))


@pytest.mark.parametrize("window", [0, 9])
def test_one_kernel_for_shared_prompts_equals_each_document_with_its_prefix(window):
    """Values and gradients, for two answers to a prompt and for three; the judge runs document by document in float64."""
    import kernel  # noqa: F401

    lengths, prefixes = (12, 5, 9, 20, 7, 3), (0, 6, 6, 0, 11, 0)
    generator = torch.Generator().manual_seed(0)
    ours = [
        torch.randn(1, h, sum(lengths), 16, generator=generator).bfloat16().requires_grad_()
        for h in (4, 2, 2)
    ]
    wide = [x.detach().double().requires_grad_() for x in ours]
    cuts = cuts_of(lengths, prefixes)
    module = torch.nn.Module()
    out = document_attention(
        module,
        *row(*ours, cuts),
        documents=Documents(lengths, prefixes, cuts),
        sliding_window=window,
    )[0]
    out = out[:, : sum(lengths)]
    wanted = document_attention(
        module, *wide, documents=Documents(lengths, prefixes), sliding_window=window
    )[0]
    assert (out - wanted).abs().max() < 2e-2
    weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    (out.double() * weights).sum().backward()
    (wanted * weights).sum().backward()
    for x, y in zip(ours, wide, strict=True):
        assert ((x.grad - y.grad).norm() / y.grad.norm()) < 2e-2
    bare = document_attention(module, *wide, documents=Documents(lengths), sliding_window=window)[0]
    assert (bare - wanted).abs().max() > 0.1, (
        "the guard: documents without their prefixes would differ"
    )


@pytest.mark.parametrize("window", [0, 7])
def test_the_kernel_of_a_gpu_takes_our_shapes(window):
    """On the meta device, which computes nothing, torch's kernel checks shapes and types as on a GPU."""
    cuts = cuts_of(LENGTHS)
    query, key, value = (x.to("meta") for x in row(*inputs(dtype=torch.bfloat16), cuts))
    try:
        out = _varlen(query, key, value, on(cuts, "meta"), None, window)
    except NotImplementedError:
        pytest.skip("this torch has no meta form of varlen_attn")
    assert out.shape == (1, 128, 4, 32) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
@needs_cuda
def test_the_kernel_of_a_gpu_equals_each_document_alone(window, dtype):
    compare(*inputs(device="cuda", dtype=dtype), window, 2e-2, on(cuts_of(LENGTHS), "cuda"))
