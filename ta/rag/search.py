"""The best passages of each question: exactly, block by block, or approximately by faiss.

Letters: N passages, E width of a vector, Q questions, K results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

APPROXIMATE = "approximate.faiss"  # in an index's folder
SCORED_AT_ONCE = 1 << 14  # passages whose scores are in memory at a time


def top_k(
    queries: Tensor, vectors: Tensor, k: int, block: int = SCORED_AT_ONCE
) -> tuple[Tensor, Tensor]:
    """The k greatest products of each query (Q, E) with the vectors (N, E), found exactly.

    Gives scores (Q, K) and rows (Q, K), K = min(k, N), best first; of equal scores the lower row
    comes first. Vectors are read block by block, onto the device and in the type of the queries; of
    a block only what beats a query's present K-th score is looked at again.
    """
    n, k = len(queries), min(k, len(vectors))
    best = queries.new_full((n, k), float("-inf"))  # (Q, K)
    rows = torch.zeros((n, k), dtype=torch.int64, device=queries.device)
    query_of_best = torch.arange(n, device=queries.device).repeat_interleave(k)
    start, size = 0, min(block, 1024)
    while start < len(vectors):
        scores = queries @ vectors[start : start + size].to(queries).T  # (Q, size)
        query, column = (scores > best[:, -1:]).nonzero(as_tuple=True)
        if len(query):
            value = torch.cat([best.flatten(), scores[query, column]])
            owner = torch.cat([query_of_best, query])
            # by query, then score, then row
            order = value.sort(descending=True, stable=True).indices
            order = order[owner[order].sort(stable=True).indices]
            counts = owner.bincount(minlength=n)
            first = (counts.cumsum(0) - counts)[:, None]
            chosen = order[first + torch.arange(k, device=queries.device)]  # (Q, K)
            best, rows = value[chosen], torch.cat([rows.flatten(), column + start])[chosen]
        start, size = start + size, min(2 * size, block)
    return best, rows


def write_approximate(path: Path, vectors: Tensor) -> None:
    """Write an inverted-file index of faiss for vectors (N, E).

    It is for collections that are too large for exact search. ValueError without faiss.
    """
    faiss = need_faiss()
    n, width = vectors.shape
    # faiss wants 39 vectors a list to place its centres
    lists = max(1, min(round(4 * n**0.5), n // 39))
    inverted = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors[:: max(1, n // (256 * lists))].numpy())
    for start in range(0, n, SCORED_AT_ONCE):
        inverted.add(vectors[start : start + SCORED_AT_ONCE].numpy())
    faiss.write_index(inverted, str(path))


def need_faiss() -> Any:
    """faiss, or a ValueError that says how to get it."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "--approximate needs faiss: pip install faiss-cpu, or leave it out"
        ) from None
    return faiss


def approximate_top_k(
    folder: Path, queries: Tensor, k: int, share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Like `top_k` on the vectors of the index in `folder`, through `share` of its lists alone.

    A row is -1 where these lists hold fewer than k passages. ValueError without faiss or without an
    approximate index.
    """
    if not (folder / APPROXIMATE).exists():
        raise ValueError(
            f"{folder} has no approximate index: build it with --approximate, "
            "or leave --approximate out"
        )
    faiss = need_faiss()
    index = faiss.read_index(str(folder / APPROXIMATE))
    index.nprobe = max(1, round(share * index.nlist))
    scores, rows = index.search(queries.float().cpu().numpy(), min(k, index.ntotal))
    return torch.from_numpy(scores).to(queries), torch.from_numpy(rows).to(queries.device)
