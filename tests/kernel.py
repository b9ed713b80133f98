"""torch's kernel for many documents, which only CUDA has, on the CPU by its definition: what is written for a GPU then computes everywhere."""

import itertools

import torch
from torch.nn.attention import varlen


def _each(query, key, queries, keys, longest, longest_keys, scale, window):
    """For every document with queries: where these and its keys are, and its attention (H, n, m) in float32.

    The queries are the last of the keys' places, and see what is not later nor before the window.
    """
    bounds = queries.tolist(), keys.tolist()
    for ends, rows, most in ((bounds[0], len(query), longest), (bounds[1], len(key), longest_keys)):
        assert (
            ends[0] == 0
            and ends[-1] == rows
            and all(0 <= b - a <= most for a, b in itertools.pairwise(ends))
        )
    for a, b, c, d in zip(
        bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True
    ):
        if b > a:
            distance = torch.arange(d - c - b + a, d - c)[:, None] - torch.arange(d - c)
            seen = (distance >= 0) & ((distance <= window[0]) if window[0] >= 0 else True)
            assert seen.any(1).all(), "a query without a key"
            scores = (
                _heads(query[a:b])
                @ _heads(key[c:d], query).transpose(1, 2)
                * (scale or query.shape[-1] ** -0.5)
            )
            yield slice(a, b), slice(c, d), scores.masked_fill(~seen, -torch.inf).softmax(-1)


def _heads(x, query=None):
    """(T, H, D) -> (H, T, D) in float32, each head as often as queries need it."""
    times = 1 if query is None else query.shape[1] // x.shape[1]
    return x.float().transpose(0, 1).repeat_interleave(times, 0)


def _grouped(x, like):
    """(H, n, D) -> (n, H_kv, D): the gradients of the heads that share one, summed."""
    return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1)


@varlen._varlen_attn.register_kernel("cpu")
def forward(
    query,
    key,
    value,
    queries,
    keys,
    longest,
    longest_keys,
    is_causal=False,
    scale=None,
    window_size=None,
    *more,
):
    """The output, and of what else the kernel gives only the shapes."""
    out = torch.empty_like(query)
    for q, k, share in _each(query, key, queries, keys, longest, longest_keys, scale, window_size):
        out[q] = (share @ _heads(value[k], query)).transpose(0, 1).to(out.dtype)
    return (
        out,
        query.new_zeros(query.shape[1], len(query), dtype=torch.float32),
        torch.zeros(2, dtype=torch.uint64),
    )


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(
    grad,
    query,
    key,
    value,
    out,
    norms,
    queries,
    keys,
    longest,
    longest_keys,
    is_causal,
    state,
    scale=None,
    window_size=None,
):
    """Gradients of query, key and value."""
    found = [torch.zeros(x.shape) for x in (query, key, value)]
    for q, k, share in _each(query, key, queries, keys, longest, longest_keys, scale, window_size):
        g, factor = _heads(grad[q]), scale or query.shape[-1] ** -0.5
        d_share = g @ _heads(value[k], query).transpose(1, 2)
        d_scores = share * (d_share - (d_share * share).sum(-1, keepdim=True)) * factor
        found[0][q] = (d_scores @ _heads(key[k], query)).transpose(0, 1)
        found[1][k] = _grouped(d_scores.transpose(1, 2) @ _heads(query[q]), key)
        found[2][k] = _grouped(share.transpose(1, 2) @ g, value)
    return tuple(d.to(x.dtype) for d, x in zip(found, (query, key, value), strict=True))
