"""Build the index of a collection of passages: their vectors by a text encoder, for exact search; resumable, on one process or many.

    python recipes/build_index.py                                                # built-in catalogue and encoder
    python recipes/build_index.py --passages passages.jsonl --encoder-path ENCODER --out index
    torchrun --nproc-per-node 8 recipes/build_index.py ...                       # each process embeds every 8th block

A line of passages: {"id": "p1", "title": "Keys", "text": "Anna's key is red."}; id and title are optional. The index is a folder: passages.jsonl,
vectors.safetensors and manifest.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from ta.builtin import data_files
from ta.command_line import cli
from ta.parallel import close, init, on_rank_zero, pick_device, rank, world
from ta.rag import index
from ta.rag.index import EncoderConfig
from ta.rag.search import add_approximate, need_faiss


@dataclass(frozen=True)
class BuildIndex:
    encoder: EncoderConfig = EncoderConfig()
    passages: tuple[str, ...] = ()
    """Sources of passages: file.jsonl, file.jsonl@0.1 (share), file.jsonl@500 (count); none: the built-in catalogue."""
    out: str = "index"
    """Folder to write."""
    max_tokens_per_pass: int = 8192
    """Tokens, padding included, in one pass of the encoder: the memory knob."""
    approximate: bool = False
    """Put an approximate index beside the exact one (needs faiss), for `generate --approximate`; pays from millions of passages on."""
    resume: bool = False
    """Go on where a stopped run left off."""
    overwrite: bool = False
    """Replace an index that exists."""


def main(config: BuildIndex) -> None:
    from tqdm import tqdm

    if config.approximate:
        need_faiss()
    init()
    out, sources = Path(config.out), config.passages or (str(data_files.passages_file()),)
    count = on_rank_zero(
        lambda: index.begin(out, sources, config.encoder, config.resume, config.overwrite)
    )
    close()
    # from here on each process works on its own share and waits for no other
    me, processes, device = rank(), world(), pick_device()
    share = None if me else -(-count // processes)
    with tqdm(
        total=share,
        desc="embedding",
        unit=" passages",
        disable=me > 0,
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
        if index.build(out, device, me, processes, config.max_tokens_per_pass, bar.update):
            if config.approximate:
                add_approximate(out)
            print(f"done: {out}", file=sys.stderr)


if __name__ == "__main__":
    cli(main, BuildIndex)
