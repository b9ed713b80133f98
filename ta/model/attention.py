"""Attention in which packed documents never see each other, exact on CPU and fast on CUDA; registered with transformers under the name "ta".

Letters: B rows, H heads, T columns, D head width, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "ta"


@dataclass(frozen=True)
class Documents:
    """How a packed row is cut: no tuple, since a compiled block would be compiled anew for every other number of documents."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()


@torch.compiler.disable  # what depends on lengths would be compiled anew for every batch
def document_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    documents=None,
    **kwargs,
):
    """Causal attention inside each document: query (B, H, T, D), key and value (B, H_kv, T, D) -> (B, T, H, D).

    `documents` cut a packed row; without them, or with one row a document, rows are plain causal: right padding is then harmless because no real
    token comes after it. `documents.prefixes[n]` leading tokens of document n - 1 are seen by document n too. The signature is the one
    transformers calls its attention functions with; sliding windows are honoured, soft caps and sinks are refused.
    """
    lengths, prefixes = (documents.lengths, documents.prefixes) if documents else ((), ())
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(
            "this attention function knows no soft cap and no sinks: the model must run with its own attention"
        )
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise ValueError("this attention function is causal only")
    device = query.device.type
    if (
        torch.is_autocast_enabled(device) and query.dtype != torch.float64
    ):  # rotary embeddings may have widened query and key
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    window = kwargs.get("sliding_window") or 0
    dropout = dropout if module.training else 0.0
    packed = len(query) == 1 and len(lengths) > 1
    if (
        packed
        and query.is_cuda
        and not prefixes
        and not dropout
        and query.dtype in (torch.float16, torch.bfloat16)
    ):
        return _varlen(query, key, value, lengths, scaling, window), None
    key, value = (_repeat(x, query.shape[1] // key.shape[1]) for x in (key, value))
    if not packed:
        return _causal(query, key, value, scaling, dropout, window).transpose(
            1, 2
        ).contiguous(), None
    if sum(lengths) != query.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"documents of {sum(lengths)} tokens in all do not make a row of {query.shape[2]} columns"
        )
    parts = [
        x.split(lengths, 2) for x in (query, key, value)
    ]  # slices would each have a gradient as large as the whole row
    out = []
    for n, (q, k, v) in enumerate(zip(*parts, strict=True)):
        shared = prefixes[n] if prefixes else 0
        if shared:
            k, v = (torch.cat([x[n - 1][:, :, :shared], x[n]], 2) for x in parts[1:])
        out.append(_causal(q, k, v, scaling, dropout, window).transpose(1, 2))
    return torch.cat(out, 1), None


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling, dropout: float, window: int
) -> Tensor:
    """Queries are those of the last of the keys' positions."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    if before or (window and length > window):
        distance = torch.arange(before, before + length, device=query.device)[
            :, None
        ] - torch.arange(key.shape[2], device=query.device)
        mask = (distance >= 0) & (distance < (window or key.shape[2]))
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, dropout_p=dropout, scale=scaling
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, lengths, scaling, window: int) -> Tensor:
    """torch's own variable-length FlashAttention (CUDA, half precision): one kernel for all documents."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = _bounds(lengths, query.device)
    grouped = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}
    if not grouped:
        key, value = (_repeat(x, query.shape[1] // key.shape[1]) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    longest = max(lengths)
    left = window - 1 if window else -1
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(left, 0), **grouped
    )
    return out[None]


@lru_cache(maxsize=2)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(N + 1,) int32 where documents begin and end; every layer of a forward pass asks for the same."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def register() -> str:
    """Make the function known to transformers (idempotent) and return its name; a name without a mask function gets no mask at all."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    return NAME
