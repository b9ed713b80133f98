"""The file that holds cached features while it is written: safetensors in batches, with a journal to go on from and a rename at the end.

Tensors {key: (F, E)}; the metadata holds the encoder's fingerprint, the shape, and a content hash for each key. While it is being written it
is `<name>.partial` (the same layout, header left blank) beside `<name>.partial.jsonl` (one line a batch).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # reader processes import this module, and none of them needs torch
    import torch

FORMAT = "ta-features-1"
MAX_HEADER = 100_000_000  # safetensors reads no longer header
COPY_BYTES = 1 << 24


class Layout(NamedTuple):
    """What is the same for a whole cache."""

    fingerprint: str
    shape: tuple[int, int]
    dtype: str  # safetensors' name: F32, F16 or BF16


class FeatureFile:
    """The half-written cache: its file, its journal and what they hold so far."""

    def __init__(self, out: Path, layout: Layout, keys: Iterable[str]):
        self.out, self.layout, self.hashes = out, layout, {}
        self.data_path, self.journal_path = Path(f"{out}.partial"), Path(f"{out}.partial.jsonl")
        rows, width = layout.shape
        self.row_bytes = rows * width * {"F32": 4, "F16": 2, "BF16": 2}[layout.dtype]
        full = self._header(dict.fromkeys(keys, "0" * 32))
        if len(full) > MAX_HEADER:
            raise ValueError(
                f"{out}: so many files need a header of {len(full)} bytes, safetensors reads {MAX_HEADER}; split the folder"
            )
        self.reserved = len(full)
        if not self._resume():
            self.data_path.write_bytes(b"")
            self.journal_path.write_text(
                json.dumps({"layout": layout, "reserved": self.reserved}) + "\n"
            )
        self.data = self.data_path.open("r+b")
        self.data.truncate(
            self.reserved + len(self.hashes) * self.row_bytes
        )  # what no journal line vouches for is cut off
        self.journal = self.journal_path.open("a")

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()
        self.journal.close()

    def _resume(self) -> bool:
        """Take over what an interrupted call left; False if it left nothing."""
        if not self.journal_path.is_file() or not self.data_path.is_file():
            return False
        text = self.journal_path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a torn last line names a batch that was not finished
        if not whole:
            return False
        first, *batches = whole.splitlines()
        start = json.loads(first)
        if Layout(start["layout"][0], tuple(start["layout"][1]), start["layout"][2]) != self.layout:
            raise ValueError(
                f"{self.data_path} was begun with another encoder or other settings; remove it, or give another path"
            )
        self.reserved = start["reserved"]
        for line in batches:
            self.hashes.update(json.loads(line))
        if self.data_path.stat().st_size < self.reserved + len(self.hashes) * self.row_bytes:
            raise ValueError(
                f"{self.data_path} is shorter than its journal says; remove both files and start again"
            )
        os.truncate(self.journal_path, len(whole.encode()))
        return True

    def append(self, keys: Sequence[str], hashes: Sequence[str], features: torch.Tensor) -> None:
        """Add (I, F, E) features; their journal line is written once they are on the disk."""
        import torch

        names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        have = (names.get(features.dtype), tuple(features.shape))
        want = (self.layout.dtype, (len(keys), *self.layout.shape))
        if have != want:
            raise ValueError(
                f"the encoder gave features {have}, this cache holds {want}; tell the encoder's own shape and dtype"
            )
        self.data.seek(0, os.SEEK_END)
        self.data.write(features.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.data.flush()
        os.fsync(self.data.fileno())
        self.journal.write(json.dumps(dict(zip(keys, hashes, strict=True))) + "\n")
        self.journal.flush()
        self.hashes.update(zip(keys, hashes, strict=True))

    def publish(self) -> None:
        """Fill in the header and rename the file to its name; files added since the beginning may need a longer header, and so a copy."""
        header = self._header(self.hashes)
        done = self.data_path
        if len(header) <= self.reserved:
            self.data.seek(0)
            self.data.write(
                (self.reserved - 8).to_bytes(8, "little") + header[8:].ljust(self.reserved - 8)
            )
            self.data.flush()
            os.fsync(self.data.fileno())
        else:
            done = Path(f"{self.out}.partial.copy")
            self.data.seek(self.reserved)
            with done.open("wb") as copy:
                copy.write(header)
                while piece := self.data.read(COPY_BYTES):
                    copy.write(piece)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(done, self.out)
        self.data_path.unlink(missing_ok=True)
        self.journal_path.unlink()

    def _header(self, hashes: Mapping[str, str]) -> bytes:
        """safetensors' header for `hashes` in file order: 8 bytes of length, then JSON padded so that the tensors start at a multiple of 8."""
        if "__metadata__" in hashes:
            raise ValueError(
                "a media file named '__metadata__' cannot be cached: safetensors keeps that name; rename it"
            )
        info = {
            "format": FORMAT,
            "fingerprint": self.layout.fingerprint,
            "shape": json.dumps(self.layout.shape),
        }
        entries: dict[str, Any] = {
            "__metadata__": {**info, "hashes": " ".join(hashes[key] for key in sorted(hashes))}
        }
        for row, key in enumerate(hashes):
            span = [row * self.row_bytes, (row + 1) * self.row_bytes]
            entries[key] = {
                "dtype": self.layout.dtype,
                "shape": self.layout.shape,
                "data_offsets": span,
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text
