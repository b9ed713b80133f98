"""A store of arrays on disk: grown piece by piece, published by one rename, opened as memory maps, found by content hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy import ndarray

T = TypeVar("T")
SETTLED = 2_000_000_000  # ns; a file written later than this before its hashing may change again within one tick of its clock


def hash_json(value: Any) -> str:
    """Hex SHA-256 of JSON values, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stamp(path: str) -> list[int]:
    """What changes when a file does: size, mtime and ctime in ns, inode."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def content_hash(path: str, notes: Path) -> str:
    """Hex SHA-256 of a file, remembered in the folder `notes` by real path and stamp: an unchanged file is not read again."""
    real, before = os.path.realpath(path), stamp(path)
    note = notes / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    if note.exists():
        try:
            known = json.loads(note.read_text())
            if known["stamp"] == before:
                return known["sha256"]
        except (ValueError, KeyError, TypeError):
            note.unlink(missing_ok=True)  # a torn note is as good as none
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if before == stamp(path) and time.time_ns() - max(before[1:3]) > SETTLED:
        notes.mkdir(parents=True, exist_ok=True)
        beside = note.with_name(f"{note.name}.{os.getpid()}")
        beside.write_text(json.dumps({"stamp": before, "sha256": digest}))
        beside.rename(note)
    return digest


class Column:
    """A .npy file that grows along its first axis; its header is written again at the end."""

    def __init__(self, path: Path, dtype: np.dtype | str, row: tuple[int, ...] = ()):
        import numpy as np

        self.dtype, self.row, self.count = np.dtype(dtype), row, 0
        self.file = open(path, "wb")  # noqa: SIM115 - lives as long as the column
        self.start = self._write_header()

    def _write_header(self) -> int:
        from numpy.lib import format as npy

        self.file.seek(0)
        header = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.row),
        }
        npy.write_array_header_1_0(self.file, header)
        return self.file.tell()

    def append(self, values: ndarray) -> None:
        """Add values (m, *row)."""
        values = values.astype(self.dtype, copy=False)
        assert values.shape[1:] == self.row, f"{values.shape} for rows {self.row}"
        self.file.write(values.tobytes())
        self.count += len(values)

    def close(self) -> None:
        """Finish the header and bring the file to the disk."""
        end = self._write_header()
        assert end == self.start, "numpy leaves room for the count to grow"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _publish(beside: Path, folder: Path, info: dict[str, Any]) -> None:
    """Write the manifest of `beside` and rename it to `folder`; what stands there stays if it is sound, else gives way."""
    sizes = {file.name: file.stat().st_size for file in beside.iterdir()}
    with open(beside / "manifest.json", "w") as file:
        json.dump({"sizes": sizes, "info": info}, file)
        file.flush()
        os.fsync(file.fileno())
    while True:
        try:
            return os.rename(beside, folder)
        except OSError:
            if not folder.exists():
                raise
        if isinstance(open_arrays(folder), tuple):
            return None
        broken = folder.with_name(f"{beside.name}.broken")
        with suppress(FileNotFoundError):  # another process was quicker
            os.rename(folder, broken)
        shutil.rmtree(broken, ignore_errors=True)


def open_arrays(folder: Path) -> tuple[dict[str, ndarray], dict[str, Any]] | str:
    """The memory-mapped arrays of a published folder by name, and its info; or what is wrong with it, "" if it is not there."""
    import numpy as np

    if not folder.exists():
        return ""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, size in manifest["sizes"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
        names = [name for name in manifest["sizes"] if name.endswith(".npy")]
        arrays = {
            name[:-4]: np.asarray(np.load(folder / name, mmap_mode="r", allow_pickle=False))
            for name in names
        }  # mapped all the same
        return arrays, manifest["info"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def open_or_make(
    folder: Path,
    opened: Callable[[Path], T | str],
    make: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
) -> tuple[T, bool]:
    """What `opened` finds in `folder`, or else what `make` wrote into an empty folder beside it, published; and whether it was made now.

    `opened` gives what it read, or why it cannot ("" where nothing is there). One process makes, others wait for it.
    """
    if not isinstance(found := opened(folder), str):
        return found, False
    with _lock(folder, say) as alone:
        if not isinstance(found := opened(folder), str):
            return found, False
        if found:
            say(f"{folder}: prepared data is damaged ({found}); preparing it again")
        for left_over in folder.parent.glob(f".{folder.name}.*") if alone else ():
            shutil.rmtree(left_over, ignore_errors=True)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            beside.mkdir()
            _publish(beside, folder, make(beside))
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(found := opened(folder), str):
            raise OSError(f"{folder}: what was just written cannot be read ({found})")
        return found, True


@contextmanager
def _lock(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file of `folder`, waiting for another process that prepares it; False where the file system knows no locks."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that prepares the same data in {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False  # both processes prepare then, and the first rename wins
        yield held


def cache_folder(chosen: str) -> Path:
    """`chosen`, or $TA_CACHE, or `ta` in the user's cache folder."""
    if chosen := chosen or os.environ.get("TA_CACHE", ""):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ta"
