"""Build the index of a collection of passages: their vectors by a text encoder, for exact search.

    python recipes/build_index.py                              # built-in catalogue and encoder
    python recipes/build_index.py --passages passages.jsonl --encoder-path ENCODER --out index
    torchrun --nproc-per-node 8 recipes/build_index.py ...     # each process embeds every 8th block

A run that was stopped goes on with --resume. The index is a folder: passages.jsonl,
vectors.safetensors and manifest.json.

A line of passages: {"id": "p1", "title": "Keys", "text": "Anna's key is red."}; id and title are
optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import ta


@dataclass(frozen=True)
class Config:
    encoder: ta.rag.EncoderConfig = ta.rag.EncoderConfig()
    passages: tuple[str, ...] = ()
    """Sources of passages: file.jsonl, file.jsonl@0.1 (share), file.jsonl@500 (count); none: the
    built-in catalogue."""
    out: str = "index"
    """Folder to write."""
    max_tokens_per_pass: Annotated[int, ta.Range(1)] = 8192
    """Tokens, padding included, in one pass of the encoder: the memory knob."""
    approximate: bool = False
    """Put an approximate index beside the exact one (needs faiss), for `generate --approximate`;
    pays from millions of passages on."""
    resume: bool = False
    """Go on where a stopped run left off."""
    overwrite: bool = False
    """Replace an index that exists."""


def main(config: Config) -> None:
    if config.approximate:
        ta.rag.need_faiss()
    out, sources = Path(config.out), config.passages or (str(ta.rag.passages_file()),)
    ta.parallel.init()
    begun = ta.parallel.on_rank_zero(
        lambda: ta.rag.begin_index(out, sources, config.encoder, config.resume, config.overwrite)
    )
    begun = ta.parallel.gather_objects(begun)[0]
    ta.parallel.close()

    # from here on each process embeds its own share and waits for no other
    rank, world = ta.parallel.rank(), ta.parallel.world()
    share = None if rank else -(-begun.count // world)
    with ta.progress(share, "embedding", "passage", show=rank == 0) as bar:
        published = ta.rag.build_index(
            out,
            ta.parallel.pick_device(),
            rank,
            world,
            config.max_tokens_per_pass,
            bar.update,
            begun,
            config.approximate,
        )
    if published:
        ta.parallel.tell(f"done: {out}")


if __name__ == "__main__":
    ta.cli(main, Config)
