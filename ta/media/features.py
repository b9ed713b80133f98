"""A cache of encoder features: made from media files once, read in slices, refused when stale.

It is a safetensors file of tensors {key: (F, E)}. Its metadata holds, as JSON under one name (the
order of several is not kept), the encoder's fingerprint, the shape, and a content hash for each
key. Until the file is finished its batches lie as parts beside it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from ta.files import SETTLED, Parts, content_hash, json_text, locked, stamp, write_atomic, writing
from ta.folders import loading
from ta.parallel import gather_objects, rank, world

FORMAT, FORMAT_1 = "ta-features-2", "ta-features-1"
MAX_HEADER = 100_000_000  # bytes; safetensors reads no longer header
ENTRY = 200  # bytes of a header for one tensor and its hash, at most, without its two keys
MAX_PARTS = 50_000  # that are mapped into memory at once; Linux allows a process 65,530 maps


class Layout(NamedTuple):
    """What is the same for a whole cache."""

    fingerprint: str
    shape: tuple[int, int]
    dtype: str  # safetensors' name: F32, F16 or BF16


class Features(NamedTuple):
    """An open cache: nothing of it is in memory but its header."""

    path: Path
    fingerprint: str
    hashes: dict[str, str]  # key -> content hash of the file it came from
    handle: Any  # safetensors' memory-mapped reader


class FeatureFile:
    """A cache that is being made; `hashes` {key: content hash} says what it holds.

    Letters: I files of a batch, (F, E) the features of one.
    """

    def __init__(self, out: Path, layout: Layout, paths: Mapping[str, Path], overwrite: bool):
        """Begin, or go on with the parts of an earlier call: with what they hold of the files of
        `paths` {key: file} as these are now.

        ValueError where they belong to another encoder, unless `overwrite`, and for too many files
        for one cache.
        """
        self.out, self.layout, self.parts = out, layout, Parts(out)
        if sum(2 * len(json.dumps(key)) + ENTRY for key in paths) > MAX_HEADER:
            raise ValueError(
                f"{out}: {len(paths):,} files are too many for one cache (safetensors reads no "
                f"header over {MAX_HEADER:,} bytes); split the folder"
            )
        about = [FORMAT, *json.loads(json.dumps(layout))]
        begun = self.parts.about()
        if begun not in (None, about) and not overwrite:
            raise ValueError(
                f"{out} was begun with another encoder or other settings: give these, another "
                "path, or --overwrite to begin anew"
            )
        if begun != about:
            self.parts.begin(about)
        held = _held(self.parts).items()
        self.hashes = {k: v for k, v in held if k in paths and content_hash(paths[k]) == v}

    def append(self, keys: Sequence[str], hashes: Sequence[str], features: torch.Tensor) -> None:
        """Add (I, F, E) features; when this returns, they are on the disk."""
        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        have = (names.get(features.dtype), tuple(features.shape))
        want = (self.layout.dtype, (len(keys), *self.layout.shape))
        if have != want:
            raise ValueError(
                f"the encoder gave features {have}, this cache holds {want}; "
                "tell the encoder's own shape and dtype"
            )
        number = 1 + max(map(int, self.parts.keys()), default=-1)
        if number == MAX_PARTS:
            raise ValueError(
                f"{self.out}: over {MAX_PARTS:,} batches; give a larger batch size and begin anew"
            )
        added = dict(zip(keys, hashes, strict=True))
        tensors = {"features": features.detach().cpu().contiguous()}
        self.parts.save(f"{number:06}", tensors, {"hashes": json.dumps(added)})
        self.hashes |= added

    def publish(self) -> None:
        """Write the cache and delete the parts; they are memory-mapped, so memory does not grow."""
        tensors = {}
        for part in sorted(self.parts.keys()):
            part_tensors, about = self.parts.load(part)
            keys = json.loads(about["hashes"])
            # of what was encoded twice the last one counts
            tensors |= zip(keys, part_tensors["features"], strict=True)
        tensors = {key: features for key, features in tensors.items() if key in self.hashes}
        info = {"fingerprint": self.layout.fingerprint, "shape": self.layout.shape}
        info["hashes"] = self.hashes
        with writing(self.out) as aside:
            save_file(tensors, aside, {FORMAT: json.dumps(info, sort_keys=True)})
        self.parts.clear()


def content_hashes(files: Sequence[Path], notes: Path) -> list[str]:
    """`content_hash` of each file. `notes`, a JSON file, remembers them by path and stamp, so that
    only what changed is read again; processes read a share each, and all must call this alike.
    """
    try:
        known = json.loads(notes.read_text())
    except (FileNotFoundError, ValueError):  # no notes, or a damaged file of them
        known = {}
    stamps = {str(file): stamp(file) for file in files}
    new = [name for name, now in stamps.items() if known.get(name, [None])[0] != now]
    read = {name: content_hash(name) for name in new[rank() :: world()]}
    fresh = {
        name: [stamps[name], value] for part in gather_objects(read) for name, value in part.items()
    }
    latest = time.time_ns() - SETTLED
    settled = {name: note for name, note in fresh.items() if max(note[0][1:3]) < latest}
    if settled and rank() == 0:
        write_atomic(notes, json_text(known | settled))
    known |= fresh
    return [known[str(file)][1] for file in files]


def _opened(path: Path) -> tuple[Any, dict[str, str]]:
    """safetensors' reader of a file, and its metadata; ValueError where it is no such file."""
    with loading(path, "a cache of features, which recipes/preprocess_images.py makes"):
        handle = safe_open(str(path), framework="pt")
    return handle, handle.metadata() or {}


def read_features(path: str | Path, fingerprint: str | None = None) -> Features:
    """Open a cache; ValueError if it is no cache, its header is damaged, or another encoder (or
    other settings) made it. `fingerprint` None takes any encoder's.
    """
    handle, known = _opened(Path(path))
    if known.get("format") == FORMAT_1:
        raise ValueError(
            f"{path} was made by an earlier version, which hashed files otherwise; "
            "make it again with recipes/preprocess_images.py --overwrite"
        )
    if FORMAT not in known:
        raise ValueError(
            f"{path} is a safetensors file, but not a cache of features; "
            "make one with recipes/preprocess_images.py"
        )
    with loading(path, "a whole cache (recipes/preprocess_images.py --overwrite makes it again)"):
        info = json.loads(known[FORMAT])
        made_by, hashes = str(info["fingerprint"]), info["hashes"]
        whole = set(hashes) == set(handle.keys()) and len(info["shape"]) == 2
        assert whole, "its header is damaged"
    if fingerprint not in (None, made_by):
        raise ValueError(
            f"{path} was made by another encoder or other settings ({made_by[:12]}, "
            f"this encoder is {fingerprint[:12]}); "
            "make it again with this encoder, or give the encoder that made it"
        )
    return Features(Path(path), made_by, hashes, handle)


def check_features(features: Features, key: str, file: Path, content: str | None = None) -> None:
    """ValueError unless a file is in the cache under `key` with the content that was encoded.

    `content` is its hash, where it is known.
    """
    if key not in features.hashes:
        raise ValueError(f"{features.path}: {key!r} is not in the cache; preprocess it")
    if (content or content_hash(file)) != features.hashes[key]:
        raise ValueError(f"{features.path} is stale: {key!r} changed since; make it again")


def extract(
    out: str | Path,
    paths: Mapping[str, Path],
    read: Callable[[Path], np.ndarray],
    encode: Callable[[torch.Tensor], torch.Tensor],
    layout: Layout,
    batch_size: int = 32,
    workers: int = 0,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    overwrite: bool = False,
) -> tuple[int, int, list[tuple[str, str]]]:
    """Encode the files of `paths` {key: file} into the cache `out`.

    Returns the number of features in the published file, how many of them are from a call that was
    stopped, and (key, why) of the files that were left out.

    It goes on where an interrupted call stopped, and its memory does not grow with the files.
    `read` makes one input of a file, in `workers` processes (0: in this one); `encode` makes
    (I, F, E) of a batch of inputs. A file that `read` refuses with ValueError ends the call, or is
    counted with `skip_bad`. `progress(done, total)` is called after every batch. With `overwrite`
    an `out` that exists is replaced at the end. ValueError where another process writes `out`.
    """
    skipped: list[tuple[str, str]] = []
    with locked(out):
        _check_absent(Path(out), overwrite)
        cache = FeatureFile(Path(out), layout, paths, overwrite)
        before = len(cache.hashes)
        batch: list[tuple[str, str, np.ndarray]] = []
        left = [(key, path) for key, path in paths.items() if key not in cache.hashes]

        def flush() -> None:
            """Encode and write what has been read."""
            if batch:
                keys, hashes, inputs = zip(*batch, strict=True)
                stacked = torch.stack([torch.from_numpy(x) for x in inputs])
                cache.append(keys, hashes, encode(stacked))
                batch.clear()
            progress(len(cache.hashes) + len(skipped), len(paths))

        for key, content, value, reason in _read_all(left, read, workers):
            if reason is None:
                batch.append((key, content, value))
            elif skip_bad:
                skipped.append((key, reason))
            else:
                raise ValueError(reason)
            if len(batch) == batch_size:
                flush()
        flush()
        if not cache.hashes:
            why = f"; the first: {skipped[0][1]}" if skipped else ""
            raise ValueError(f"{out}: none of the {len(paths)} files could be encoded{why}")
        cache.publish()
        return len(cache.hashes), before, skipped


def check_absent(out: Path, overwrite: bool = False) -> None:
    """ValueError where something stands at `out`, with `overwrite` where it is no cache, and where
    another process writes it. What a kill has left beside a finished cache is taken away.
    """
    with locked(out):
        _check_absent(out, overwrite)


def _check_absent(out: Path, overwrite: bool) -> None:
    """`check_absent` under the lock of `out`."""
    if not out.exists():
        return
    known = _opened(out)[1]
    if FORMAT not in known and known.get("format") != FORMAT_1:
        raise ValueError(
            f"--out {out} is no cache of features, so it is not overwritten: give another file"
        )
    if not overwrite:
        parts, made = Parts(out), read_features(out)
        begun = parts.about()
        if begun and begun[1] == made.fingerprint and _held(parts).items() <= made.hashes.items():
            parts.clear()  # the cache holds all of them: it was published before the kill
        raise ValueError(f"--out {out} exists: give another file, or --overwrite to replace it")


def _held(parts: Parts) -> dict[str, str]:
    """{key: content hash} of what the parts hold; of what was encoded twice the last one counts."""
    return {
        key: value
        for part in sorted(parts.keys())
        for key, value in json.loads(parts.load(part)[1]["hashes"]).items()
    }


Read = tuple[str, str, Any, str | None]  # key, content hash, input, why it could not be read


def _read_one(read: Callable[[Path], np.ndarray], file: tuple[str, Path]) -> Read:
    key, path = file
    try:
        return key, content_hash(path), read(path), None
    except ValueError as error:
        return key, "", None, str(error)


def _end_with_parent(worker: int) -> None:
    """Have this process end when the one that started it is gone, also by a kill.

    DataLoader's own workers wait for ever where what they have read is still to be fetched.
    """

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _read_all(
    left: Sequence[tuple[str, Path]], read: Callable[[Path], np.ndarray], workers: int
) -> Iterable[Read]:
    """Read in order, a few ahead in each of `workers` fresh processes; a forked one would inherit
    torch's threads.
    """
    workers = min(workers, len(left))
    own = {"multiprocessing_context": "spawn", "worker_init_fn": _end_with_parent}
    ahead = own | {"prefetch_factor": 8} if workers else {}
    one = partial(_read_one, read)
    return DataLoader(left, batch_size=None, collate_fn=one, num_workers=workers, **ahead)
