"""The store: columns equal what was put in, publishing is one rename, and a damaged folder is noticed."""

import builtins
import hashlib
import os
import threading

import numpy as np
import pytest

from ta import files
from ta.files import Column, cache_folder, content_hash, open_arrays, open_or_make


def write(folder, value=1):
    column = Column(folder / "a.npy", "int32", (2,))
    for size in (0, 3, 1):
        column.append(np.full((size, 2), value))
    column.close()
    return {"value": value}


def opened(folder):
    found = open_arrays(folder)
    return found if isinstance(found, str) else (found[0]["a"].tolist(), found[1])


def make(folder, value=1, lines=None):
    return open_or_make(
        folder,
        opened,
        lambda beside: write(beside, value),
        (lines if lines is not None else []).append,
    )


def test_columns_grow(tmp_path):
    rng = np.random.default_rng(0)
    for dtype, row in (("int32", ()), ("float64", ()), ("int64", (2,))):
        parts = [rng.integers(0, 99, (size, *row)) for size in (0, 5, 1, 300)]
        column = Column(tmp_path / "c.npy", dtype, row)
        for part in parts:
            column.append(part)
        column.close()
        got = np.load(tmp_path / "c.npy", mmap_mode="r", allow_pickle=False)
        assert (
            got.dtype == dtype
            and np.array_equal(got, np.concatenate(parts))
            and not got.flags.writeable
        )


def test_made_once_and_opened_after(tmp_path):
    folder = tmp_path / "p" / "key"
    assert opened(folder) == ""
    assert make(folder) == (([[1, 1]] * 4, {"value": 1}), True)
    assert make(folder, 2) == (([[1, 1]] * 4, {"value": 1}), False)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key", "key.lock"]


@pytest.mark.parametrize(
    "damage",
    [
        "a.npy missing",
        "a.npy short",
        "manifest.json missing",
        "manifest.json short",
        "manifest.json null",
    ],
)
def test_damage_is_said_and_mended(tmp_path, damage):
    folder, lines = tmp_path / "key", []
    make(folder)
    name, how = damage.split()
    if how == "missing":
        (folder / name).unlink()
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"null" if how == "null" else content[: len(content) // 2])
    assert make(folder, 2, lines) == (([[2, 2]] * 4, {"value": 2}), True)
    assert len(lines) == 1 and "damaged" in lines[0] and str(folder) in lines[0]


def test_a_failure_leaves_nothing_and_left_overs_go(tmp_path):
    def fail(beside):
        write(beside)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_or_make(tmp_path / "key", opened, fail, print)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    (tmp_path / ".key.123").mkdir()
    (tmp_path / ".other.123").mkdir()
    make(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.123", "key", "key.lock"]


def test_the_second_waits_for_the_first(tmp_path):
    started, go, lines, results = threading.Event(), threading.Event(), [], []

    def slow(beside):
        started.set()
        assert go.wait(20)
        return write(beside, 1)

    def say(line):
        lines.append(line)
        go.set()

    first = threading.Thread(
        target=lambda: results.append(open_or_make(tmp_path / "key", opened, slow, print))
    )
    first.start()
    assert started.wait(20)
    assert open_or_make(tmp_path / "key", opened, lambda beside: write(beside, 2), say) == (
        ([[1, 1]] * 4, {"value": 1}),
        False,
    )
    first.join()
    assert results[0][1] and "waiting" in lines[0]


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr("fcntl.flock", no_lock)

    def overtaken(beside):
        other = tmp_path / "other"
        other.mkdir()
        files._publish(other, tmp_path / "key", write(other, 1))
        return write(beside, 2)

    assert open_or_make(tmp_path / "key", opened, overtaken, print)[0] == (
        [[1, 1]] * 4,
        {"value": 1},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path, notes = tmp_path / "d", tmp_path / "notes"
    path.write_bytes(b"one")
    first = content_hash(str(path), notes)
    assert not notes.exists(), "a file of this moment may change again unnoticed"
    monkeypatch.setattr(files, "SETTLED", 0)
    assert content_hash(str(path), notes) == first and len(list(notes.iterdir())) == 1
    reads, real_open = [], builtins.open

    def counting(name, *rest, **more):
        reads.append(str(name) == str(path))
        return real_open(name, *rest, **more)

    monkeypatch.setattr(builtins, "open", counting)
    (tmp_path / "link").symlink_to(path)
    assert content_hash(str(path), notes) == content_hash(
        str(tmp_path / "link"), notes
    ) == first and not any(reads)
    before = os.stat(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(str(path), notes) != first, "same size and mtime, other content"
    next(notes.iterdir()).write_text("{")
    assert content_hash(str(path), notes) != first


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch):
    path, real = tmp_path / "d", hashlib.file_digest
    path.write_bytes(b"one")
    monkeypatch.setattr(files, "SETTLED", 0)

    def digest(file, name):
        done = real(file, name)
        path.write_bytes(b"longer")
        return done

    monkeypatch.setattr(hashlib, "file_digest", digest)
    assert content_hash(str(path), tmp_path / "notes") == hashlib.sha256(b"one").hexdigest()
    assert not (tmp_path / "notes").exists()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TA_CACHE", "/t")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    assert str(cache_folder("/c")) == "/c" and str(cache_folder("")) == "/t"
    monkeypatch.delenv("TA_CACHE")
    assert str(cache_folder("")) == "/x/ta"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder("")) == "/h/.cache/ta"
