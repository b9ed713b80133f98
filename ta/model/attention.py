"""Attention in which packed documents never see each other: exact on CPU, fast on CUDA.

It is registered with transformers under the name "ta". Letters: B rows, H query heads, H_kv key
heads, T columns, D head width, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ta.data.batch import Cuts, leads
from ta.parallel import row_group

NAME = "ta"
# layers of transformers that keep keyword arguments from their attention
SILENT_LAYERS = ("NemotronDecoderLayer", "StableLmDecoderLayer")


@dataclass(eq=False)
class Documents:
    """How a packed row is cut into documents.

    It is neither a tuple nor frozen: where compiled code ends, torch 2.11 looks into those types
    and would compile again for every other number of documents.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    cuts: Cuts | None = None
    # processes that hold a part of the row's columns each
    parts: int = 1


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
    """Causal attention inside each document: query (B, H, T, D), key and value (B, H_kv, T, D).

    Returns ((B, T, H, D), None): transformers calls its attention functions with this signature and
    takes the second value as attention weights.

    `documents` cut a packed row. Without them, or with one row a document, rows are plain causal:
    right padding is then harmless, because no real token comes after it. Document n also sees the
    first `documents.prefixes[n]` tokens of the last document before it that has no prefix.

    Sliding windows are honoured. ValueError for soft caps, for sinks and for attention that is not
    causal.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(
            "this attention function knows no soft cap and no sinks: the model must run with its "
            "own attention"
        )
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise ValueError("this attention function is causal only")
    if isinstance(attention_mask, Documents):
        documents = attention_mask
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # rotary embeddings may have widened query and key
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if documents is not None and documents.parts > 1:
        whole = replace(documents, parts=1)
        rows = _whole_rows(query, key, value, documents.parts)
        out, _ = document_attention(module, *rows, None, scaling, dropout, whole, **kwargs)
        return _own_columns(out, documents.parts), None
    window = kwargs.get("sliding_window") or 0
    dropout = dropout if module.training else 0.0
    cuts = documents.cuts if documents is not None else None
    half = query.dtype in (torch.float16, torch.bfloat16)
    if cuts is not None and not dropout and half and query.shape[-1] <= 256:
        return _varlen(query, key, value, cuts, scaling, window), None
    if documents is None or len(query) > 1:
        out = _causal(query, *_repeated(query, key, value), scaling, dropout, window)
        return out.transpose(1, 2).contiguous(), None
    return _by_document(query, key, value, documents, scaling, dropout, window), None


@torch.compiler.disable
def _whole_rows(query: Tensor, key: Tensor, value: Tensor, parts: int) -> list[Tensor]:
    """Own columns of all heads -> all columns of own heads.

    (1, H, T / parts, D) -> (1, H / parts, T, D), as in Ulysses (Jacobs et al. 2023). Keys and
    values are repeated where they have too few heads.
    """
    if key.shape[1] % parts:
        key, value = _repeated(query, key, value)
    out = []
    for x in (query, key, value):
        _, heads, columns, width = x.shape
        by_heads = x[0].reshape(parts, heads // parts, columns, width)
        by_columns = _exchange(by_heads, parts)  # (parts, H / parts, T / parts, D)
        out.append(by_columns.transpose(0, 1).reshape(1, heads // parts, -1, width))
    return out


@torch.compiler.disable
def _own_columns(x: Tensor, parts: int) -> Tensor:
    """The way back: (1, T, H / parts, D) -> (1, T / parts, H, D)."""
    _, columns, heads, width = x.shape
    by_heads = _exchange(x[0].reshape(parts, columns // parts, heads, width), parts)
    return by_heads.transpose(0, 1).reshape(1, columns // parts, parts * heads, width)


def _exchange(x: Tensor, parts: int) -> Tensor:
    """x (parts, ...): part i goes to process i of the row; what comes from i stands at i."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    return all_to_all_single_autograd(x.contiguous(), None, None, row_group(parts))


# code that depends on lengths would be compiled again for every batch
@torch.compiler.disable
def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling,
    dropout: float,
    window: int,
) -> Tensor:
    """One call a document, on any device and in any type: (1, T, H, D)."""
    lengths = documents.lengths
    whole = query, *_repeated(query, key, value)
    if len(lengths) < 2:
        return _causal(*whole, scaling, dropout, window).transpose(1, 2).contiguous()
    # the gradient of a split part is as large as the part, that of a slice as large as the row
    parts = [x.split(lengths, 2) for x in whole]
    prefixes = documents.prefixes or (0,) * len(lengths)
    out, lead = [], leads(prefixes)
    for n, (q, k, v) in enumerate(zip(*parts, strict=True)):
        if length := prefixes[n]:
            keys, values = parts[1][lead[n]], parts[2][lead[n]]
            k = torch.cat([keys[:, :, :length], k], 2)
            v = torch.cat([values[:, :, :length], v], 2)
        out.append(_causal(q, k, v, scaling, dropout, window).transpose(1, 2))
    return torch.cat(out, 1)


def _repeated(query: Tensor, *grouped: Tensor) -> tuple[Tensor, ...]:
    """Keys or values (B, H_kv, T, D), repeated to as many heads as the query has: (B, H, T, D)."""
    times = query.shape[1] // grouped[0].shape[1]
    return grouped if times == 1 else tuple(x.repeat_interleave(times, 1) for x in grouped)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling, dropout: float, window: int
) -> Tensor:
    """Causal attention (B, H, Q, D) of queries at the last Q of the K positions of the keys."""
    length, keys, mask = query.shape[2], key.shape[2], None
    if keys > length or (window and length > window):
        columns = torch.arange(keys, device=query.device)
        distance = columns[keys - length :, None] - columns
        mask = (distance >= 0) & (distance < (window or keys))
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, cuts: Cuts, scaling, window: int) -> Tensor:
    """torch's variable-length FlashAttention (CUDA, half precision): one kernel for all documents.

    -> (1, T, H, D)
    """
    from torch.nn.attention.varlen import varlen_attn

    # x[0] would copy its gradient
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    if cuts.seen is not None:
        # several documents may see one key: its gradients are summed in float32
        k = k.float().index_select(0, cuts.seen).to(k.dtype)
        v = v.float().index_select(0, cuts.seen).to(v.dtype)
    width = q.shape[-1]
    if width % 8:
        # the kernel takes multiples of 8
        scaling = width**-0.5 if scaling is None else scaling
        q, k, v = (F.pad(x, (0, -width % 8)) for x in (q, k, v))
    bounds = cuts.queries, cuts.keys, cuts.longest, cuts.longest_keys
    # the numbers of tokens before and after a query that it sees
    window_size = window - 1 if window else -1, 0
    grouped = {"enable_gqa": True} if _needs_enable_gqa() else {}
    out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=window_size, **grouped)
    return out[None, ..., :width]


@torch.compiler.assume_constant_result
def _needs_enable_gqa() -> bool:
    """Whether fewer key heads than query heads must be asked for; torch 2.11 accepts them."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in (varlen_attn.__kwdefaults__ or {})


def pass_documents_down(model: nn.Module) -> None:
    """Let the attention of layers that keep keyword arguments to themselves know the documents."""
    for layer in model.modules():
        if type(layer).__name__ in SILENT_LAYERS:
            layer.register_forward_pre_hook(_documents_as_mask, with_kwargs=True)


def _documents_as_mask(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What such a layer gets: documents in place of a mask, which it passes on and is None here."""
    mask = kwargs.get("documents") or kwargs.get("attention_mask")
    return args, kwargs | {"attention_mask": mask}


def register() -> str:
    """Make the attention function known to transformers and return its name.

    transformers makes no mask for a name without a mask function. A second call changes nothing.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, document_attention)
    return NAME


def native_attention(base) -> str:
    """The name of the attention of transformers that computes what the model defines.

    That is eager where sdpa would drop a soft cap or does not exist.
    """
    capped = getattr(base.config.get_text_config(), "attn_logit_softcapping", None)
    return "sdpa" if getattr(base, "_supports_sdpa", False) and not capped else "eager"


@contextmanager
def own_attention(base) -> Iterator[None]:
    """The attention of transformers that computes what the model defines."""
    before = base.config._attn_implementation
    base.set_attn_implementation(native_attention(base))
    try:
        yield
    finally:
        base.set_attn_implementation(before)
