"""Building the index of a collection: its passages and their vectors in safetensors, made block by block, gone on with after a kill.

Letters: N passages, E width of a vector.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ta.data.jsonl import regular_file
from ta.data.sources import parse_source
from ta.files import cache_folder, content_hash, stamp
from ta.folders import encoder_folder, fingerprint
from ta.rag.passages import Passages, take, text_of, write_passages
from ta.rag.search import FORMAT, NAMES
from ta.train.run_folder import write_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

BLOCK = 2048  # passages that are embedded, synced to the disk and noted together


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
    """Prepare `.NAME.partial` beside `out`: passages, room for their vectors, and what the index will be made of; how many passages there are.

    ValueError: `out` or its beginning is there and neither `resume` nor `overwrite` is asked; it was begun with other passages or another encoder;
    passages that are wrong, by file and line.
    """
    from ta.rag.embedding import reading_of, width_of

    beside = _partial(out)
    if resume and overwrite:
        raise ValueError(
            "--resume goes on with an index and --overwrite deletes it: give one of the two"
        )
    if out.exists() and not overwrite:
        raise ValueError(
            f"--out {out} exists: give another folder, or --overwrite to build it anew"
        )
    if out.exists() and not (out / "manifest.json").exists():
        raise ValueError(f"--out {out} is no index, so it is not overwritten: give another folder")
    if beside.exists() and not (resume or overwrite):
        raise ValueError(
            f"--out {out} was begun and not finished: give --resume to go on, or --overwrite to start anew"
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
        "reading": reading._asdict(),
        "width": width_of(folder),
        "sources": [[content_hash(source.path, notes), *source[1:]] for source in parsed],
    }
    if resume and (beside / "begun.json").exists():
        begun = json.loads((beside / "begun.json").read_text())
        if odd := [
            key for key, value in json.loads(json.dumps(made_of)).items() if begun[key] != value
        ]:
            raise ValueError(
                f"--resume: {out} was begun with another {' and another '.join(odd)}; give the same, or --overwrite"
            )
        return begun["passages"]
    for old in (beside, out) if overwrite else (beside,):
        shutil.rmtree(old, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        offsets = write_passages(sources, beside / NAMES[0])
        _make_room(beside / NAMES[1], offsets, made_of["width"])
    except BaseException:
        shutil.rmtree(beside)
        raise
    write_text(beside / "begun.json", json.dumps(made_of | {"passages": len(offsets) - 1}))
    return len(offsets) - 1


def build(
    out: Path,
    device: str,
    rank: int = 0,
    world: int = 1,
    max_tokens: int = 8192,
    advance: Callable[[int], None] = lambda n: None,
) -> bool:
    """Embed this process's blocks of what `begin` prepared, but those that an earlier run did; True where the index was published by this call.

    `advance` is told of passages whose vectors are on the disk, first of those from before.
    """
    from ta.rag.embedding import Reading, embed, open_encoder, tokenize

    beside = _partial(out)
    try:
        begun = json.loads((beside / "begun.json").read_text())
    except FileNotFoundError:  # the other processes had all the blocks and have published them
        return False
    total = -(-begun["passages"] // BLOCK)
    done = _done(beside)
    advance(
        sum(
            min(BLOCK, begun["passages"] - block * BLOCK)
            for block in range(rank, total, world)
            if block in done
        )
    )
    if left := [block for block in range(rank, total, world) if block not in done]:
        reading = Reading(**begun["reading"])
        encoder, tokenizer = open_encoder(begun["encoder_path"], reading, device)
        start, n, width = _layout(beside / NAMES[1])
        passages = Passages(beside / NAMES[0], _offsets(beside / NAMES[1]))
        with open(beside / NAMES[1], "r+b") as file, _journal(beside / f"done-{rank}") as journal:
            for block in left:
                rows = range(block * BLOCK, min((block + 1) * BLOCK, n))
                ids = tokenize(
                    [text_of(p) for p in take(passages, rows)], tokenizer, reading, "passage"
                )
                vectors = embed(encoder, ids, tokenizer.pad_token_id, device, max_tokens)
                file.seek(start + rows.start * width * 4)
                file.write(vectors.float().cpu().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
                journal.write(f"{block}\n")
                journal.flush()
                advance(len(rows))
    return _publish(out, beside, begun, total)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _journal(path: Path) -> IO[str]:
    """The journal of one process, open at its end; a line torn by a kill is cut off first."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))
    return open(path, "a", encoding="utf-8")


def _done(beside: Path) -> set[int]:
    """Blocks whose vectors are on the disk; a torn last line names one that may not be."""
    return {
        int(line)
        for path in beside.glob("done-*")
        for line in path.read_text().split("\n")[:-1]
        if line
    }


def _publish(out: Path, beside: Path, begun: dict[str, Any], total: int) -> bool:
    """Give the finished folder its name, once, whichever process comes last; False where blocks are missing or another one was first."""
    try:
        lock = open(beside / "lock", "w")  # noqa: SIM115 - held below
    except FileNotFoundError:
        return False
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not beside.exists() or len(_done(beside)) < total:
            return False
        seal(beside, {key: value for key, value in begun.items() if key != "sources"})
        os.rename(beside, out)
        for path in out.iterdir():
            if path.name not in NAMES:
                path.unlink()
    return True


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of an index whose passages and vectors lie in `folder`."""
    passages = folder / NAMES[0]
    content = content_hash(str(passages), cache_folder("") / "hashes")
    known = {"passages_sha256": content, "passages_stamp": stamp(str(passages))[:2]}
    write_text(folder / NAMES[2], json.dumps({**manifest, **known}, indent=2))


def save_index(folder: Path, passages: Passages, vectors: Tensor, manifest: dict[str, Any]) -> None:
    """Write an index of these passages with these vectors (N, E) into `folder`, which is made."""
    folder.mkdir()
    shutil.copyfile(passages.path, folder / NAMES[0])
    start = _make_room(folder / NAMES[1], passages.offsets, vectors.shape[1])
    with open(folder / NAMES[1], "r+b") as file:
        file.seek(start)
        for part in vectors.split(BLOCK):
            file.write(part.float().cpu().numpy().tobytes())
    seal(folder, manifest)


def _make_room(path: Path, offsets: np.ndarray, width: int) -> int:
    """Write a safetensors file of the offsets and of room for the vectors; where the vectors start."""
    n, size = len(offsets) - 1, offsets.nbytes
    entries = {
        "offsets": {"dtype": "I64", "shape": [n + 1], "data_offsets": [0, size]},
        "vectors": {
            "dtype": "F32",
            "shape": [n, width],
            "data_offsets": [size, size + n * width * 4],
        },
    }
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + offsets.tobytes())
        start = file.tell()
        file.truncate(start + n * width * 4)
    return start


def _layout(path: Path) -> tuple[int, int, int]:
    """(byte at which the vectors start, N, E)."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))["vectors"]
    return 8 + size + entry["data_offsets"][0], *entry["shape"]


def _offsets(path: Path) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor("offsets").numpy()
