"""The one way to write: files and folders that appear whole or not at all, locks, parts to go on
from, and hashes by content.

What is being written lies beside its target as `.NAME.PID@HOST.tmp` until it is whole and on the
disk; then one rename gives it its name. What a killed process leaves is taken away by the next one
that writes the same target.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # not a POSIX system: one writer at a time is then the user's promise
    fcntl = None

if TYPE_CHECKING:
    import numpy as np
    from numpy import ndarray
    from torch import Tensor

PathLike = str | Path
# ns; a file written later than this before its hashing may change again within one clock tick
SETTLED = 2_000_000_000
SMALL = 4 << 20  # bytes that are hashed in some 10 ms
ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d{1,9})(@(?P<host>[^@]*))?\.(?P<kind>tmp|old)")


# Files


def write_atomic(path: PathLike, content: str | bytes) -> None:
    """Write a file (text in UTF-8): `path` holds what it held or all of `content`, never a part,
    and it does so after a power cut too.
    """
    with writing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: PathLike) -> Iterator[Path]:
    """Give the path of an empty file beside `path` to write into; it takes that name when the block
    ends, and goes when the block fails.

    The folder is made where it is not there. Whatever library writes the file, its mode is the one
    that the umask gives.
    """
    path = Path(path)
    _make_folder(path.parent)
    clean_up(path)
    with _renamed(path) as aside:
        yield aside


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """`writing` in a folder that is there, without looking for left-overs."""
    aside = _aside(path)
    try:
        with _room_for(path):
            aside.unlink(missing_ok=True)
            aside.touch()
            mode = aside.stat().st_mode
            yield aside
            os.chmod(aside, mode & 0o777)
            sync(aside)
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def full_disk(error: BaseException) -> int:
    """The errno of a disk without room where that is the cause of an error, else 0. Libraries in
    Rust tell it by text alone.
    """
    for cause in causes(error):
        told = re.search(r"\(os error (\d+)\)", str(cause))
        number = int(told[1]) if told else getattr(cause, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return number
    return 0


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or after, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _room_for(path: PathLike) -> Iterator[None]:
    """Name `path` in the error of a full disk, whichever library met it."""
    try:
        yield
    except Exception as error:
        if (number := full_disk(error)) and not getattr(error, "filename", None):
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for numbers that are not finite, which JSON has none of."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), **options)


def json_line(record: Any) -> str:
    """A line of a file of JSON lines."""
    return json_text(record, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def append_line(path: PathLike, record: dict, durable: bool = False) -> None:
    """Append one JSON object as a line; a last line that a kill has torn is cut off first. A
    `durable` line is on the disk, with the name of its file, when this returns.
    """
    with _room_for(path), open(path, "ab+") as file:
        if end := file.tell():
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json_line(record).encode())
    if durable:
        sync(Path(path))
        sync(Path(path).parent)


def write_jsonl(path: PathLike, records: Iterable[dict]) -> None:
    """Write one record a line; the file appears whole or not at all. Bytes that were no UTF-8 where
    they were read (surrogateescape) are written as they were.
    """
    with (
        writing(path) as aside,
        open(aside, "w", encoding="utf-8", errors="surrogateescape") as file,
    ):
        file.writelines(map(json_line, records))


def read_json_lines(path: PathLike) -> list[dict]:
    """The whole objects of a file of JSON lines, none where there is no file.

    What a kill has torn, such as a last line without its end, and what is no object is left out;
    bytes that are no UTF-8 become U+FFFD.
    """
    out = []
    with suppress(FileNotFoundError):
        for line in Path(path).read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError):
                record = json.loads(line.decode(errors="replace"))
                if isinstance(record, dict):
                    out.append(record)
    return out


# Folders


@contextmanager
def publishing(folder: PathLike, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write into; it takes that name when the block ends,
    and goes when the block fails.

    Every file and folder in it is on the disk before the rename, and the rename is before this
    returns. With `replace` what stands at `folder` gives way: it is set aside by a rename, so that
    at any moment the old one or the new one is there to be found, and `clean_up` puts it back after
    a kill between the two renames. FileExistsError where something stands there otherwise.
    """
    folder = Path(folder)
    _make_folder(folder.parent)
    clean_up(folder)
    if not replace and os.path.lexists(folder):
        raise FileExistsError(errno.EEXIST, "this exists already", str(folder))
    aside, old = _aside(folder), _aside(folder, "old")
    try:
        with _room_for(folder):
            aside.mkdir()
            yield aside
            _sync_tree(aside)
        if replace:
            with suppress(FileNotFoundError):
                os.rename(folder, old)
        try:
            os.rename(aside, folder)
        except OSError as error:
            if os.path.lexists(folder):  # another process was quicker
                raise FileExistsError(errno.EEXIST, "this exists already", str(folder)) from error
            raise
        sync(folder.parent)
        remove(old)
    finally:
        remove(aside)
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.rename(old, folder)


def clean_up(path: Path) -> None:
    """Take away what killed processes of this machine left beside `path` when they wrote it; what
    they had set aside goes back where nothing is.
    """
    clean_inside(path.parent, path.name)


def clean_inside(folder: Path, name: str | None = None) -> None:
    """`clean_up` for all that stands in a folder of ours, or for what has one name."""
    names = os.listdir(folder) if folder.is_dir() else []
    for found in filter(None, map(ASIDE.fullmatch, names)):
        path = folder / found["name"]
        if name not in (None, path.name) or _alive(found):
            continue
        if found["kind"] == "old" and not os.path.lexists(path):
            os.rename(folder / found[0], path)
        else:
            remove(folder / found[0])


def _aside(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.{kind}")


def _alive(found: re.Match) -> bool:
    """Whether the process that an aside's name tells may be at work on it: another one of this
    machine, or any of another machine.
    """
    if found["host"] not in (None, platform.node()):
        return True
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(found["pid"]) != os.getpid()  # an earlier process had this number


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk, files first, then what holds them.

    Files get the mode that the umask gives. Threads wait together: a file system that keeps a
    journal brings many files to the disk in the time of one.
    """
    from concurrent.futures import ThreadPoolExecutor

    mode = folder.stat().st_mode & 0o666
    folders, files = [], []
    for place, _, names in os.walk(folder, topdown=False):
        folders.append(Path(place))
        files += [path for name in names if not (path := Path(place, name)).is_symlink()]
    for path in files:
        os.chmod(path, mode)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(sync, files))
    for path in folders:
        sync(path)


def _make_folder(folder: Path) -> None:
    """Make a folder and what is above it, with their names on the disk."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        # another process may have made it meanwhile
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file, where a folder is needed", str(folder))
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it; nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_whole(path: Path) -> None:
    """`remove`; other processes, and the next after a kill, find all of it or nothing."""
    gone = _aside(path)
    with suppress(FileNotFoundError):
        os.rename(path, gone)
    remove(gone)


def foreign(folder: Path, names: Collection[str]) -> list[Path]:
    """What stands in `folder` that we did not write, by name.

    `names` are those that we write there, with wildcards as in "step-*"; what is written aside, set
    aside, kept in parts or locked under such a name is ours as well.
    """
    own = [*names, *(f".{name}.{kind}" for name in names for kind in ("lock", "parts")), ".lock"]
    others = []
    for path in sorted(folder.iterdir()):
        found = ASIDE.fullmatch(path.name)
        name = found["name"] if found else path.name
        if not any(fnmatch.fnmatchcase(name, known) for known in own):
            others.append(path)
    return others


def is_ours(folder: Path, mark: str, keys: Collection[str]) -> bool:
    """Whether we made a folder: its file `mark` is a JSON object with these keys."""
    try:
        about = json.loads((folder / mark).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and set(keys) <= about.keys()


def check_replaceable(folder: Path, what: str, mark: str, keys: Collection[str], names) -> None:
    """ValueError where the folder --out is to be replaced and is no `what` of ours (`is_ours`), or
    holds more than the `names` that we write there.
    """
    if not is_ours(folder, mark, keys):
        raise ValueError(
            f"--out {folder} is no {what} of ours, so it is not overwritten: give another folder"
        )
    if others := foreign(folder, names):
        raise ValueError(
            f"--out {folder} holds {others[0].name}, which is no part of its {what}: "
            "move it away, or give another folder"
        )


def keep_inputs(out: PathLike, inputs: Iterable[PathLike | None]) -> None:
    """ValueError where `out` is, or holds, one of the files and folders that are read."""
    target = Path(os.path.realpath(out))
    for path in inputs:
        if path and os.path.exists(path):
            real = Path(os.path.realpath(path))
            same = target.exists() and real.samefile(target)
            if same or target in real.parents:
                raise ValueError(
                    f"--out {out} is or holds {path}, which is read from: give another name"
                )


# Locks


@contextmanager
def locked(
    out: PathLike,
    *,
    share: str = "",
    waiting: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Hold the lock of an output: `.NAME.lock` beside it, where the file system knows locks.

    Processes that write one output together each give the name of their `share`. Where another
    process holds it, ValueError; or `waiting` is called and the lock waited for. The lock ends with
    the process, however that ends. What killed processes left aside of the output and of its parts
    is taken away, so nothing of it may be written aside before.
    """
    out = Path(out)
    path = out.with_name(f".{out.name}{share and '.'}{share}.lock")
    _make_folder(path.parent)
    with _take(path, out, waiting):
        try:
            clean_up(out)
            clean_up(Parts(out).folder)
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it has gone


@contextmanager
def locked_file(out: PathLike, overwrite: bool) -> Iterator[None]:
    """Hold the lock of a file to write; ValueError where it exists and is not to be replaced."""
    with locked(out):
        if os.path.exists(out) and not overwrite:
            raise ValueError(f"--out {out} exists: give another file, or --overwrite to replace it")
        yield


def hold_lock(out: PathLike) -> IO[str]:
    """Take the lock inside a folder for as long as the file that is returned stays open. ValueError
    where another process holds it.
    """
    return _take(Path(out) / ".lock", Path(out), None)


def _take(path: Path, out: Path, waiting: Callable[[], None] | None) -> IO[str]:
    """The open lock file, locked where that can be."""
    while True:
        file = open(path, "a")  # noqa: SIM115 held open on purpose
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                file.close()
                raise ValueError(
                    f"--out {out} is being written by another process: "
                    "wait for it or give another name"
                ) from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # no locks on this file system, or none on this machine
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the last holder has taken the file away: lock the one that stands there now


def shares(out: Path) -> set[str]:
    """The shares part-N of an output whose lock is there: a process holds it, or a kill left it."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(part-\d+)\.lock")
    found = (pattern.fullmatch(path.name) for path in out.parent.glob(".*.lock"))
    return {match[1] for match in found if match}


# Parts


class Parts:
    """Parts of an output that is not finished: safetensors files in `.NAME.parts` beside it, each
    whole once it is there, known by a key.

    `about.json` among them tells (JSON values) what they belong to.
    """

    def __init__(self, out: PathLike):
        out = Path(out)
        self.folder = out.with_name(f".{out.name}.parts")

    def begin(self, about: Any) -> None:
        """Make the folder, empty but for what the parts will belong to."""
        self.clear()
        with publishing(self.folder) as aside:
            (aside / "about.json").write_text(json_text(about))

    def about(self) -> Any:
        """What the parts belong to; None where none are begun."""
        with suppress(FileNotFoundError):
            return json.loads((self.folder / "about.json").read_text())

    def keys(self) -> set[str]:
        """Keys of the parts that are there."""
        return {path.stem for path in self.folder.glob("[!.]*.safetensors")}

    def save(
        self, key: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        """Write one part; when this returns, it is on the disk."""
        from safetensors.torch import save_file

        with _renamed(self.folder / f"{key}.safetensors") as aside:
            save_file(tensors, aside, metadata)

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of a part, as a memory map, and its metadata."""
        from safetensors import safe_open

        with safe_open(self.folder / f"{key}.safetensors", "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}

    def drop(self, key: str) -> None:
        """Delete one part, where it is there."""
        (self.folder / f"{key}.safetensors").unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all parts; other processes see all of them or none."""
        clean_up(self.folder)
        remove_whole(self.folder)


# Arrays


class Column:
    """A .npy file that grows along its first axis; its header is written at the end."""

    HEADER = 128  # bytes

    def __init__(self, path: Path, dtype: np.dtype | str, row: tuple[int, ...] = ()):
        import numpy as np

        self.dtype, self.row, self.count = np.dtype(dtype), row, 0
        self.file = open(path, "wb")  # noqa: SIM115 - lives as long as the column
        self.file.seek(self.HEADER)

    def append(self, values: ndarray) -> None:
        """Add values (m, *row)."""
        values = values.astype(self.dtype, copy=False)
        assert values.shape[1:] == self.row, f"{values.shape} for rows {self.row}"
        self.file.write(values.tobytes())
        self.count += len(values)

    def close(self) -> None:
        """Write the header."""
        from numpy.lib import format as npy

        self.file.seek(0)
        header = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.row),
        }
        npy.write_array_header_1_0(self.file, header)
        assert self.file.tell() == self.HEADER, "numpy's header has another size"
        self.file.close()


def open_arrays(
    folder: Path, verify: bool = False
) -> tuple[dict[str, ndarray], dict[str, Any]] | str:
    """The memory-mapped arrays of a published folder by name, and its info; or what is wrong with
    it, "" if it is not there. With `verify` large files too are compared with their hashes.
    """
    import numpy as np

    if not folder.exists():
        return ""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        arrays = {}
        for name, known in manifest["files"].items():
            if why := damage(folder / name, known, verify or None):
                return why
            if name.endswith(".npy"):
                mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False)
                arrays[name[:-4]] = np.asarray(mapped)  # mapped all the same
        return arrays, manifest["info"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def made_once(
    folder: Path, opened: Callable[[], Any], say: Callable[[str], None]
) -> Iterator[Path | None]:
    """Give an empty folder beside `folder` to write into, published when the block ends; None where
    another process has made it meanwhile.

    `opened` gives what it reads in `folder`, or as a text why it cannot ("" where nothing is
    there). One process makes, others wait for it.
    """
    wait = f"waiting for another process that prepares the same data in {folder}"
    with locked(folder, waiting=lambda: say(wait)):
        if not isinstance(damage := opened(), str):
            yield None
            return
        if damage:
            say(f"{folder}: prepared data is damaged ({damage}); preparing it again")
        with suppress(FileExistsError), publishing(folder, replace=folder.exists()) as aside:
            yield aside


def write_manifest(folder: Path, info: dict[str, Any]) -> None:
    """Write the manifest that `open_arrays` checks the files of `folder` against."""
    files = {file.name: digest(file) for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json_text({"files": files, "info": info}))


# Data sets on the hub

HUB = "hf:"
WANTED = ["*.parquet", "*.arrow", "*.json", "*.jsonl", "*.csv", "*.gz"]


@cache
def dataset_snapshot(name: str, fetch: bool = False) -> str:
    """The folder of the hub's cache that holds the data set OWNER/NAME.

    With `fetch` it is fetched where it is absent or old; where there is no network, what the cache
    holds is taken. ValueError where it is not there.
    """
    from huggingface_hub import snapshot_download

    settings = {"repo_type": "dataset", "allow_patterns": WANTED, "local_files_only": not fetch}
    try:
        return snapshot_download(name, **settings)
    except (OSError, ValueError) as error:
        why = "only a recipe with --hub fetches it"
        if fetch:
            why = f"the hub does not give it ({' '.join(str(error).split())[:200]})"
        raise ValueError(f"{HUB}{name}: not in the hub's cache, and {why}") from None


def fetch_datasets(sources: Iterable[str]) -> None:
    """Fetch the data sets on the hub among the sources, whose other parts name splits and choices.

    ValueError for one that neither the hub nor its cache has.
    """
    for source in sources:
        if source.startswith(HUB):
            path = source.removeprefix(HUB).partition("@")[0]
            dataset_snapshot("/".join(path.split("/")[:2]), fetch=True)


# Hashes


def hash_json(value: Any) -> str:
    """Hex SHA-256 of JSON values, keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def stamp(path: PathLike) -> list[int]:
    """What changes when a file does: size, mtime and ctime in ns, inode."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def content_hash(path: PathLike, notes: Path | None = None) -> str:
    """Hex SHA-256 of a file's bytes; remembered in the folder `notes` by real path and stamp, where
    an unchanged file is not read again.
    """
    if notes is None:
        return _sha256(path)
    real, before = os.path.realpath(path), stamp(path)
    note = notes / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    # a torn note is as good as none
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text())
        if known["stamp"] == before:
            return known["sha256"]
    digest = _sha256(path)
    if before == stamp(path) and time.time_ns() - max(before[1:3]) > SETTLED:
        write_atomic(note, json_text({"stamp": before, "sha256": digest}))
    return digest


def digest(path: Path) -> dict[str, Any]:
    """What `damage` compares a file with: {"size", "sha256"}."""
    return {"size": path.stat().st_size, "sha256": content_hash(path)}


def damage(
    path: Path, known: dict[str, Any], read: bool | None = None, notes: Path | None = None
) -> str:
    """How a file differs from its `digest`, or "". Its content is read where `read`; with None,
    where it is small. `notes` are those of `content_hash`.
    """
    if not path.exists():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != known["size"]:
        return f"{path.name} has {size} bytes instead of {known['size']}"
    if read is None:
        read = size <= SMALL
    if read and content_hash(path, notes) != known["sha256"]:
        return f"{path.name} does not have the hash in its manifest"
    return ""


def _sha256(path: PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder(chosen: str) -> Path:
    """`chosen`, or $TA_CACHE, or `ta` in the user's cache folder."""
    if chosen := chosen or os.environ.get("TA_CACHE", ""):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ta"
