"""The file that holds cached features, and the parts it is made of while it is not finished.

Tensors {key: (F, E)}; the metadata holds, as JSON under one name (safetensors keeps no order of
several), the encoder's fingerprint, the shape, and a content hash for each key. Until the file is
finished its batches lie as parts beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ta.files import Parts, writing

if TYPE_CHECKING:  # reader processes import this module, and none of them needs torch
    import torch

FORMAT = "ta-features-2"
MAX_HEADER = 100_000_000  # bytes; safetensors reads no longer header
ENTRY = 200  # bytes of a header for one tensor and its hash, at most, without its two keys
MAX_PARTS = 50_000  # that are mapped into memory at once; Linux allows a process 65,530 maps


class Layout(NamedTuple):
    """What is the same for a whole cache."""

    fingerprint: str
    shape: tuple[int, int]
    dtype: str  # safetensors' name: F32, F16 or BF16


class FeatureFile:
    """A cache that is not finished: what it holds so far, `hashes` {key: content hash}.

    Letters: I files of a batch, (F, E) the features of one.
    """

    def __init__(self, out: Path, layout: Layout, keys: Iterable[str]):
        """Begin or go on with what a call left; ValueError where that belongs to another encoder."""
        self.out, self.layout, self.parts = out, layout, Parts(out)
        keys = list(keys)
        if "__metadata__" in keys:
            raise ValueError(
                "a media file named '__metadata__' cannot be cached: safetensors keeps that name; "
                "rename it"
            )
        if sum(2 * len(json.dumps(key)) + ENTRY for key in keys) > MAX_HEADER:
            raise ValueError(
                f"{out}: {len(keys):,} files are too many for one cache (safetensors reads no "
                f"header over {MAX_HEADER:,} bytes); split the folder"
            )
        about = [FORMAT, *json.loads(json.dumps(layout))]
        if self.parts.about() not in (None, about):
            raise ValueError(
                f"{out} was begun with another encoder or other settings; remove "
                f"{self.parts.folder}, or give another path"
            )
        if self.parts.about() is None:
            self.parts.begin(about)
        self.hashes: dict[str, str] = {}
        for part in self.parts.keys():  # noqa: SIM118 no mapping
            self.hashes |= json.loads(self.parts.load(part)[1]["hashes"])

    def append(self, keys: Sequence[str], hashes: Sequence[str], features: torch.Tensor) -> None:
        """Add (I, F, E) features; when this returns, they are on the disk."""
        import torch

        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        have = (names.get(features.dtype), tuple(features.shape))
        want = (self.layout.dtype, (len(keys), *self.layout.shape))
        if have != want:
            raise ValueError(
                f"the encoder gave features {have}, this cache holds {want}; "
                "tell the encoder's own shape and dtype"
            )
        number = len(self.parts.keys())
        if number == MAX_PARTS:
            raise ValueError(
                f"{self.out}: over {MAX_PARTS:,} batches; give a larger batch size and begin anew"
            )
        added = dict(zip(keys, hashes, strict=True))
        tensors = {"features": features.detach().cpu().contiguous()}
        self.parts.save(f"{number:06}", tensors, {"hashes": json.dumps(added)})
        self.hashes |= added

    def publish(self) -> None:
        """Write the cache and delete the parts, which are mapped, so that memory does not grow."""
        from safetensors.torch import save_file

        tensors, hashes = {}, {}
        for part in sorted(self.parts.keys()):
            found, about = self.parts.load(part)
            hashes |= json.loads(about["hashes"])
            tensors |= zip(json.loads(about["hashes"]), found["features"], strict=True)
        info = {
            "fingerprint": self.layout.fingerprint,
            "shape": self.layout.shape,
            "hashes": hashes,
        }
        with writing(self.out) as aside:
            save_file(tensors, aside, {FORMAT: json.dumps(info, sort_keys=True)})
        self.parts.clear()
