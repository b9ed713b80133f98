"""The index of a collection: a folder of passages and their vectors, built in parts.

Building is resumable: the vectors of each block of passages are a part on the disk, and the folder
is published whole when all parts are there. Letters: N passages, E width of a vector.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ta.data.prepare import source_hash
from ta.data.sources import parse_source
from ta.files import (
    Column,
    Parts,
    cache_folder,
    check_replaceable,
    content_hash,
    damage,
    json_text,
    locked,
    publishing,
    shares,
    stamp,
    writing,
)
from ta.folders import encoder_folder, fingerprint, index_folder, loading, read_json
from ta.rag.embedding import embed, open_encoder, tokenize
from ta.rag.embedding_settings import (
    EmbeddingSettings,
    EncoderConfig,
    embedding_settings,
    width_of,
)
from ta.rag.passages import (
    Passages,
    PassageSettings,
    read_passages,
    text_of,
    write_passages,
)
from ta.rag.search import APPROXIMATE, write_approximate

FORMAT = 1
PASSAGES, VECTORS, MANIFEST = "passages.jsonl", "vectors.safetensors", "manifest.json"
BLOCK = 2048  # passages that are embedded together and make one part
MARKS = ("format", "encoder", "passages_sha256")  # in the manifest of each index of ours
NAMES = (PASSAGES, VECTORS, MANIFEST, "approximate*")
OFFSETS, ALL_VECTORS = "offsets", "vectors.npy"  # among the parts


class Begun(NamedTuple):
    """An index that is being built."""

    count: int  # of its passages
    about: dict[str, Any]  # what it is made of


class Index(NamedTuple):
    """An open index; neither vectors nor passages are in memory before they are used."""

    folder: Path
    vectors: Tensor  # (N, E) float32
    passages: Passages
    manifest: dict[str, Any]
    embedding_settings: EmbeddingSettings  # of its encoder
    encoder: str  # folder of that encoder, which embeds the questions too


def open_index(
    path: str | Path, encoder_path: str | None = None, hub: bool = False, verify: bool = False
) -> Index:
    """The index in a folder, with the encoder it was built with, or a copy of it in `encoder_path`.

    A run of rag.py stands for its index; with `hub` the encoder may be a name on the hub. With
    `verify` large files are read and compared with their hashes too.

    ValueError where there is no index, where its encoder is gone or another one, and where its
    passages or vectors are not those that were written.
    """
    folder = Path(index_folder(str(path)))
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"no index at {path}: give a folder that recipes/build_index.py or recipes/rag.py wrote"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: "
            "build the index anew"
        )
    with loading(folder / MANIFEST, "the manifest of an index"):
        settings = EmbeddingSettings(**manifest["reading"])
        PassageSettings(**manifest.get("joining", {}))
        encoder = str((folder / manifest["encoder_path"]).resolve())
        files = [folder / name for name in (PASSAGES, VECTORS, APPROXIMATE)]
        changed = next(filter(None, (_changed(file, manifest, verify) for file in files)), "")
        built_with = manifest["encoder"]
    if encoder_path:
        encoder = encoder_folder(encoder_path, hub)
    if not (Path(encoder) / "config.json").exists():
        raise ValueError(f"{path}: its encoder is not at {encoder} any more; give --encoder-path")
    if changed:
        raise ValueError(
            f"{folder} has changed since the index was built ({changed}): build the index anew"
        )
    vectors_file = folder / VECTORS
    with loading(vectors_file, "vectors of an index"), safe_open(vectors_file, "pt") as file:
        vectors, offsets = file.get_tensor("vectors"), file.get_tensor(OFFSETS).numpy()
    if len(vectors) != len(offsets) - 1:
        raise ValueError(
            f"{vectors_file} holds {len(vectors)} vectors of {len(offsets) - 1} passages: "
            "build the index anew"
        )
    if (width := width_of(encoder)) != vectors.shape[1]:
        raise ValueError(
            f"{path} has vectors of width {vectors.shape[1]}, the encoder in {encoder} gives "
            f"{width}: give the one it was built with"
        )
    if fingerprint(encoder) != built_with:
        raise ValueError(
            f"{path} was built with another encoder than {encoder}: their scores would mean "
            "nothing; build it with this one"
        )
    passages = Passages(folder / PASSAGES, offsets)
    return Index(folder, vectors, passages, manifest, settings, encoder)


def _changed(path: Path, manifest: dict[str, Any], verify: bool) -> str:
    """How a file differs from what was written, or ""."""
    if f"{path.stem}_stamp" not in manifest:  # no such file, or vectors of an earlier version
        return ""
    size, changed = manifest[f"{path.stem}_stamp"]
    # a copy has another time of change and the same content
    copied = path.exists() and stamp(path)[1] != changed
    notes = cache_folder("") / "hashes" if copied and not verify else None
    known = {"size": size, "sha256": manifest[f"{path.stem}_sha256"]}
    return damage(path, known, verify or copied or None, notes)


def begin_index(
    out: Path,
    sources: Sequence[str],
    config: EncoderConfig,
    resume: bool = False,
    overwrite: bool = False,
) -> Begun:
    """Write the passages and the settings of an index into parts beside `out`.

    An index that is to be replaced stands until the new one is finished. ValueError where `out` or
    its parts exist and neither `resume` nor `overwrite` is given, where the parts belong to other
    passages or another encoder, where another process builds it, and for passages that are wrong,
    by file and line.
    """
    if resume and overwrite:
        raise ValueError(
            "--resume goes on with an index and --overwrite deletes it: give one of the two"
        )
    parts = Parts(out)
    with ExitStack() as stack:
        for share in sorted({"", "part-0"} | shares(out)):
            stack.enter_context(locked(out, share=share))
        begun = parts.about()
        empty = out.is_dir() and not any(out.iterdir())  # as good as none
        if os.path.lexists(out) and not empty:
            if not (overwrite or (resume and begun)):
                more = "--resume to finish what was begun, " if begun else ""
                raise ValueError(
                    f"--out {out} exists: give another folder, {more}or --overwrite to build it "
                    "anew"
                )
            check_replaceable(out, "index", MANIFEST, MARKS, NAMES)
        elif begun and not (resume or overwrite):
            raise ValueError(
                f"--out {out} was begun and not finished: give --resume to go on, "
                "or --overwrite to start anew"
            )
        folder = encoder_folder(config.encoder_path, config.hub)
        parsed = [parse_source(text) for text in sources]
        notes = cache_folder("") / "hashes"
        made_of = {
            "format": FORMAT,
            "encoder": fingerprint(folder),
            "encoder_path": str(Path(folder).resolve()),
            "reading": embedding_settings(folder, config)._asdict(),
            "width": width_of(folder),
            "sources": [[source_hash(source.path, notes), *source[1:]] for source in parsed],
        }
        if resume and begun and OFFSETS in parts.keys():  # noqa: SIM118 no mapping
            if changed := [key for key in made_of if begun[key] != made_of[key]]:
                raise ValueError(
                    f"--resume: {out} was begun with another {' and another '.join(changed)}; "
                    "give the same, or --overwrite"
                )
            return Begun(len(_offsets(parts)) - 1, made_of)
        parts.begin(made_of)
        try:
            with writing(parts.folder / PASSAGES) as aside:
                offsets = torch.from_numpy(write_passages(sources, aside))
            parts.save(OFFSETS, {OFFSETS: offsets})
        except BaseException:
            parts.clear()
            raise
    return Begun(len(offsets) - 1, made_of)


def build_index(
    out: Path,
    device: str,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = 8192,
    advance: Callable[[int], None] = lambda n: None,
    begun: Begun | None = None,
    approximate: bool = False,
) -> bool:
    """Embed this process's blocks of what `begin_index` wrote, except those already on the disk.

    With `approximate` an index of faiss stands beside the vectors. True where this call published
    the index. `advance(n)` is called when the vectors of n more passages are on the disk, first
    with those of an earlier run. ValueError where another process builds these blocks, or has begun
    anew since this one has `begun`.
    """
    parts = Parts(out)
    with locked(out, share=f"part-{rank}"):
        try:
            about, offsets = parts.about(), _offsets(parts)
            n = len(offsets) - 1
            total = -(-n // BLOCK)
            done = _done(parts, total)
        except FileNotFoundError:  # the other processes had all the blocks and have published them
            return False
        if begun and begun.about != about:
            raise ValueError(f"--out {out} was begun anew by another process")
        blocks = {
            block: range(n)[block * BLOCK : (block + 1) * BLOCK]
            for block in range(rank, total, world)
        }
        advance(sum(len(rows) for block, rows in blocks.items() if block in done))
        if left := [block for block in blocks if block not in done]:
            settings = EmbeddingSettings(**about["reading"])
            encoder, tokenizer = open_encoder(about["encoder_path"], settings, device)
            passages = Passages(parts.folder / PASSAGES, offsets)
        for block in left:
            texts = [text_of(passage) for passage in read_passages(passages, blocks[block])]
            ids = tokenize(texts, tokenizer, settings, "passage")
            vectors = embed(encoder, ids, device, max_tokens, first=block * BLOCK)
            parts.save(f"{block:08}", {"vectors": vectors.float().cpu().contiguous()})
            advance(len(blocks[block]))
    return _publish(out, parts, total, approximate)


def _offsets(parts: Parts) -> np.ndarray:
    return parts.load(OFFSETS)[0][OFFSETS].numpy()


def _done(parts: Parts, total: int) -> set[int]:
    """Blocks whose vectors are on the disk: in parts, or all of them in one array."""
    if (parts.folder / ALL_VECTORS).exists():
        return set(range(total))
    return {int(key) for key in parts.keys() if key != OFFSETS}  # noqa: SIM118 no mapping


def _publish(out: Path, parts: Parts, total: int, approximate: bool) -> bool:
    """Write the index if all blocks are there; the process that ends last does it.

    False where blocks are missing or another process has written it.
    """
    with locked(out, waiting=lambda: None):
        whole, about = parts.folder / ALL_VECTORS, parts.about()
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
            passages = Passages(parts.folder / PASSAGES, _offsets(parts))
            vectors = torch.from_numpy(np.load(whole, mmap_mode="c"))
            about.pop("sources")
            if approximate:
                write_approximate(aside / APPROXIMATE, vectors)
            save_index(aside, passages, vectors, about)
        parts.clear()
    return True


def save_index(folder: Path, passages: Passages, vectors: Tensor, manifest: dict[str, Any]) -> None:
    """Write an index of these passages with these vectors (N, E) into a `folder` of its own."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(passages.path, folder / PASSAGES)
    tensors = {OFFSETS: torch.from_numpy(passages.offsets), "vectors": vectors.float().cpu()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / VECTORS)
    known = {}
    for path in folder.iterdir():
        known[f"{path.stem}_stamp"] = stamp(path)[:2]
        known[f"{path.stem}_sha256"] = content_hash(path)
    (folder / MANIFEST).write_text(json_text({**manifest, **known}, indent=2))
