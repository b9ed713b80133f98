"""Searching an index: opened as a memory map and checked against its encoder and its passages; the best passages of each question, exactly.

Letters: N passages, E width of a vector, Q questions, K results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ta.files import cache_folder, content_hash, stamp, writing
from ta.folders import encoder_folder, fingerprint
from ta.rag.passages import Passages

if TYPE_CHECKING:
    from torch import Tensor

    from ta.rag.embedding import Reading

FORMAT = 1
NAMES = ("passages.jsonl", "vectors.safetensors", "manifest.json")  # an index
APPROXIMATE = "approximate.faiss"
BLOCK = 1 << 14  # passages whose scores are in memory at a time


class Index(NamedTuple):
    """An open index; neither vectors nor passages are in memory before they are used."""

    folder: Path
    vectors: Tensor  # (N, E) float32
    passages: Passages
    manifest: dict[str, Any]
    reading: Reading  # how its encoder reads texts
    encoder: str  # folder of that encoder, as it embeds questions


def open_index(path: str | Path, encoder_path: str | None = None) -> Index:
    """The index in a folder; ValueError where there is none, its encoder is not there or is another one, or its passages have changed."""
    from safetensors import SafetensorError, safe_open

    from ta.rag.embedding import Reading, width_of

    folder = Path(path)
    if not (folder / NAMES[2]).exists():
        raise ValueError(
            f"no index at {path}: give a folder that recipes/build_index.py or recipes/rag.py wrote"
        )
    manifest = json.loads((folder / NAMES[2]).read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: build the index anew"
        )
    encoder = (
        encoder_folder(encoder_path)
        if encoder_path
        else str((folder / manifest["encoder_path"]).resolve())
    )
    if not (Path(encoder) / "config.json").exists():
        raise ValueError(f"{path}: its encoder is not at {encoder} any more; give --encoder-path")
    passages = folder / NAMES[0]
    changed = not passages.exists() or stamp(str(passages))[0] != manifest["passages_stamp"][0]
    if not changed and stamp(str(passages))[:2] != manifest["passages_stamp"]:  # a copy, perhaps
        changed = (
            content_hash(str(passages), cache_folder("") / "hashes") != manifest["passages_sha256"]
        )
    if changed:
        raise ValueError(
            f"{passages} has changed since the index was built, or is gone: build the index anew"
        )
    try:
        with safe_open(folder / NAMES[1], "pt") as file:
            vectors, offsets = file.get_tensor("vectors"), file.get_tensor("offsets").numpy()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / NAMES[1]} is damaged ({error}): build the index anew"
        ) from error
    if (width := width_of(encoder)) != vectors.shape[1]:
        raise ValueError(
            f"{path} has vectors of width {vectors.shape[1]}, the encoder in {encoder} gives {width}: give the one it was built with"
        )
    if fingerprint(encoder) != manifest["encoder"]:
        raise ValueError(
            f"{path} was built with another encoder than {encoder}: their scores would mean nothing; build it with this one"
        )
    return Index(
        folder,
        vectors,
        Passages(passages, offsets),
        manifest,
        Reading(**manifest["reading"]),
        encoder,
    )


def add_approximate(path: str | Path) -> None:
    """Put an inverted-file index of faiss beside the vectors of an index, for collections that are too large for exact search."""
    faiss = need_faiss()
    index = open_index(path)
    n, width = index.vectors.shape
    lists = max(
        1, min(round(4 * n**0.5), n // 39)
    )  # faiss wants 39 vectors a list to place its centres
    found = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    found.train(index.vectors[:: max(1, n // (256 * lists))].numpy())
    for start in range(0, n, BLOCK):
        found.add(index.vectors[start : start + BLOCK].numpy())
    with writing(index.folder / APPROXIMATE) as aside:
        faiss.write_index(found, str(aside))


def need_faiss() -> Any:
    """faiss, or a ValueError that says how to get it."""
    try:
        import faiss
    except ImportError:
        raise ValueError(
            '--approximate needs faiss: pip install "ta[faiss]", or leave it out'
        ) from None
    return faiss


def about_top_k(folder: Path, queries: Tensor, k: int, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Like top_k on the vectors of that index, but only `share` of its lists are looked through; where these hold fewer than k, the row is -1."""
    import torch

    if not (folder / APPROXIMATE).exists():
        raise ValueError(
            f"{folder} has no approximate index: build it with --approximate, or leave --approximate out"
        )
    faiss = need_faiss()
    index = faiss.read_index(str(folder / APPROXIMATE))
    index.nprobe = max(1, round(share * index.nlist))
    scores, rows = index.search(queries.float().cpu().numpy(), min(k, index.ntotal))
    return torch.from_numpy(scores).to(queries), torch.from_numpy(rows).to(queries.device)


def top_k(queries: Tensor, vectors: Tensor, k: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The k greatest products of each query (Q, E) with the vectors (N, E), found exactly: scores (Q, K) and rows (Q, K), K = min(k, N).

    Best first; of equal scores the lower row comes first. Vectors are read block by block, onto the device and in the type of the queries, and
    of a block only what beats a query's present K-th score is looked at again.
    """
    import torch

    n, k = len(queries), min(k, len(vectors))
    best = queries.new_full((n, k), float("-inf"))
    rows = torch.zeros((n, k), dtype=torch.int64, device=queries.device)
    mine = torch.arange(n, device=queries.device).repeat_interleave(k)
    start, size = 0, min(block, 1024)
    while start < len(vectors):
        scores = queries @ vectors[start : start + size].to(queries).T  # (Q, size)
        query, column = (scores > best[:, -1:]).nonzero(as_tuple=True)
        if len(query):
            value, owner = (
                torch.cat([best.flatten(), scores[query, column]]),
                torch.cat([mine, query]),
            )
            order = value.sort(descending=True, stable=True).indices
            order = order[owner[order].sort(stable=True).indices]  # by query, then score, then row
            counts = owner.bincount(minlength=n)
            chosen = order[
                (counts.cumsum(0) - counts)[:, None] + torch.arange(k, device=queries.device)
            ]  # (Q, K)
            best, rows = value[chosen], torch.cat([rows.flatten(), column + start])[chosen]
        start, size = start + size, min(2 * size, block)
    return best, rows
