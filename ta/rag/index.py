"""Building the index of a collection: its passages and their vectors in safetensors, made block by block, gone on with after a kill.

Letters: N passages, E width of a vector.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ta.data.jsonl import regular_file
from ta.data.sources import parse_source
from ta.files import (
    Column,
    Parts,
    cache_folder,
    content_hash,
    locked,
    publishing,
    stamp,
    writing,
)
from ta.folders import encoder_folder, fingerprint
from ta.rag.passages import Passages, take, text_of, write_passages
from ta.rag.search import FORMAT, NAMES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK = 2048  # passages that are embedded together and make one part
OFFSETS, WHOLE = "offsets", "vectors.npy"  # among the parts


@dataclass(frozen=True)
class EncoderConfig:
    encoder_path: str = "builtin"
    """Folder of a text encoder, such as a sentence-transformers model; "builtin" is a tiny random one."""
    pooling: Literal["mean", "cls", "last", "max"] | None = None
    """What of an encoder's states is a text's vector. Default, here and below: what the encoder's folder says, else mean, normalised."""
    normalize: bool | None = None
    """Scale vectors to length 1, so that scores are cosines."""
    query_prefix: str | None = None
    """Text in front of every question, such as "query: "."""
    passage_prefix: str | None = None
    """Text in front of every passage, such as "passage: "."""
    encoder_max_tokens: int | None = None
    """Tokens of a text that the encoder reads at most; what is longer is cut at its end."""


def begin(
    out: Path,
    sources: Sequence[str],
    config: EncoderConfig,
    resume: bool = False,
    overwrite: bool = False,
) -> int:
    """Prepare the parts beside `out`: passages, and what the index will be made of; how many.

    ValueError: `out` or its beginning is there and neither `resume` nor `overwrite` is asked; it was
    begun with other passages or another encoder; another process builds it; passages that are wrong,
    by file and line. An index that is to be replaced stands until the new one is finished.
    """
    import torch

    from ta.rag.embedding import reading_of, width_of

    parts = Parts(out)
    if resume and overwrite:
        raise ValueError(
            "--resume goes on with an index and --overwrite deletes it: give one of the two"
        )
    begun = parts.about()
    stands = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if stands and not (overwrite or (resume and begun)):
        raise ValueError(
            f"--out {out} exists: give another folder, or --overwrite to build it anew"
        )
    if stands and not (out / "manifest.json").exists():
        raise ValueError(f"--out {out} is no index, so it is not overwritten: give another folder")
    if begun and not (resume or overwrite):
        raise ValueError(
            f"--out {out} was begun and not finished: give --resume to go on, "
            "or --overwrite to start anew"
        )
    folder, notes = encoder_folder(config.encoder_path), cache_folder("") / "hashes"
    reading = reading_of(folder, config)
    parsed = [parse_source(text) for text in sorted(sources)]
    for source in parsed:
        regular_file(source.path)
    made_of = {
        "format": FORMAT,
        "encoder": fingerprint(folder),
        "encoder_path": str(Path(folder).resolve()),
        "reading": json.loads(json.dumps(reading._asdict())),
        "width": width_of(folder),
        "sources": [[content_hash(source.path, notes), *source[1:]] for source in parsed],
    }
    with locked(out, share="part-0"):
        if resume and begun and OFFSETS in parts.keys():  # noqa: SIM118 no mapping
            if odd := [key for key in made_of if begun[key] != made_of[key]]:
                raise ValueError(
                    f"--resume: {out} was begun with another {' and another '.join(odd)}; "
                    "give the same, or --overwrite"
                )
            return len(_offsets(parts)) - 1
        parts.begin(made_of)
        try:
            with writing(parts.folder / NAMES[0]) as aside:
                offsets = torch.from_numpy(write_passages(sources, aside))
            parts.save(OFFSETS, {OFFSETS: offsets})
        except BaseException:
            parts.clear()
            raise
    return len(offsets) - 1


def build(
    out: Path,
    device: str,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = 8192,
    advance: Callable[[int], None] = lambda n: None,
) -> bool:
    """Embed this process's blocks of what `begin` prepared, but those that an earlier run did.

    True where the index was published by this call. `advance` is told of passages whose vectors are
    on the disk, first of those from before. ValueError where another process builds these blocks.
    """
    from ta.rag.embedding import Reading, embed, open_encoder, tokenize

    parts = Parts(out)
    with locked(out, share=f"part-{rank}"):
        try:
            begun, offsets = parts.about(), _offsets(parts)
            n = len(offsets) - 1
            done = _done(parts, -(-n // BLOCK))
        except FileNotFoundError:  # the other processes had all the blocks and have published them
            return False
        blocks = {
            block: range(block * BLOCK, min((block + 1) * BLOCK, n))
            for block in range(rank, -(-n // BLOCK), world)
        }
        advance(sum(len(rows) for block, rows in blocks.items() if block in done))
        if left := [block for block in blocks if block not in done]:
            reading = Reading(**begun["reading"])
            encoder, tokenizer = open_encoder(begun["encoder_path"], reading, device)
            passages = Passages(parts.folder / NAMES[0], offsets)
        for block in left:
            texts = [text_of(passage) for passage in take(passages, blocks[block])]
            ids = tokenize(texts, tokenizer, reading, "passage")
            vectors = embed(encoder, ids, tokenizer.pad_token_id, device, max_tokens)
            parts.save(f"{block:08}", {"vectors": vectors.float().cpu().contiguous()})
            advance(len(blocks[block]))
    return _publish(out, parts, -(-n // BLOCK))


def _offsets(parts: Parts) -> np.ndarray:
    return parts.load(OFFSETS)[0][OFFSETS].numpy()


def _done(parts: Parts, total: int) -> set[int]:
    """Blocks whose vectors are on the disk: in parts, or all of them in one array."""
    if (parts.folder / WHOLE).exists():
        return set(range(total))
    return {int(key) for key in parts.keys() if key != OFFSETS}  # noqa: SIM118 no mapping


def _publish(out: Path, parts: Parts, total: int) -> bool:
    """Write the index once, whichever process comes last, in place of an earlier one.

    False where blocks are missing or another process was first.
    """
    import numpy as np
    import torch

    with locked(out, waiting=lambda: None):
        whole, about = parts.folder / WHOLE, parts.about()
        if about is None or len(_done(parts, total)) < total:
            return False
        if not whole.exists():  # all vectors in one array, to be mapped: memory does not grow
            with writing(whole) as aside:
                column = Column(aside, "float32", (about["width"],))
                for block in range(total):
                    column.append(parts.load(f"{block:08}")[0]["vectors"].numpy())
                column.close()
        for block in range(total):  # room on the disk for two copies is enough
            parts.drop(f"{block:08}")
        with publishing(out, replace=True) as aside:
            passages = Passages(parts.folder / NAMES[0], _offsets(parts))
            vectors = np.load(whole, mmap_mode="c")
            about.pop("sources")
            _write(aside, passages, torch.from_numpy(vectors), about)
        parts.clear()
    return True


def save_index(folder: Path, passages: Passages, vectors: Tensor, manifest: dict[str, Any]) -> None:
    """Write an index of these passages with these vectors (N, E) into `folder`, which is made."""
    folder.mkdir()
    _write(folder, passages, vectors, manifest)


def _write(folder: Path, passages: Passages, vectors: Tensor, manifest: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    shutil.copyfile(passages.path, folder / NAMES[0])
    tensors = {OFFSETS: torch.from_numpy(passages.offsets), "vectors": vectors.float().cpu()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / NAMES[1])
    known = {
        "passages_sha256": content_hash(folder / NAMES[0]),
        "passages_stamp": stamp(folder / NAMES[0])[:2],
    }
    (folder / NAMES[2]).write_text(json.dumps({**manifest, **known}, indent=2))
