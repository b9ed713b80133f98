"""Files and folders appear whole or not at all, whatever kills the writer; one writer at a time;
columns and hashes.
"""

import builtins
import errno
import hashlib
import json
import os
import resource
import signal
import stat
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ta import files
from ta.files import (
    Column,
    Parts,
    append_line,
    cache_folder,
    check_replaceable,
    content_hash,
    foreign,
    hold_lock,
    keep_inputs,
    locked,
    made_once,
    open_arrays,
    publishing,
    read_json_lines,
    remove,
    shares,
    write_atomic,
    write_manifest,
    writing,
)

STEPS = ("mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir", "open")  # of module os


def killed_at(step, work):
    """Run `work` in a child that is killed before its step-th call of STEPS; whether it came to
    that.
    """
    if not (pid := os.fork()):
        left = iter(range(step))

        def dying(real):
            def call(*rest, **more):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*rest, **more)

            return call

        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def write_folder(folder, text, **how):
    with publishing(folder, **how) as aside:
        (aside / "a").write_text(text)
        (aside / "sub").mkdir()
        (aside / "sub" / "b").write_text(text)


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def whole(text):
    return {"a": text, "sub/b": text}


@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, before, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a step like others, and quick
    path, step, seen = tmp_path / "deep" / "f.json", 0, set()
    while True:
        remove(tmp_path / "deep")
        if before:
            write_atomic(path, before)
        killed = killed_at(step, lambda: write_atomic(path, "new"))
        seen.add(path.read_text() if path.exists() else None)
        assert seen <= {before, "new"}
        write_atomic(path, b"next")
        assert path.read_text() == "next" and os.listdir(path.parent) == ["f.json"]
        if not killed:
            break
        step += 1
    assert step >= 5 and seen == {before, "new"}


def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a step like others, and quick
    for before in (None, "old"):
        folder, step, seen, gaps = tmp_path / "deep" / "final", 0, [], 0
        while True:
            remove(tmp_path / "deep")
            if before:
                write_folder(folder, before)
            killed = killed_at(
                step,
                lambda folder=folder, before=before: write_folder(
                    folder, "new", replace=bool(before)
                ),
            )
            if before and not folder.exists():  # between two renames: both are there, beside it
                kept = sorted(content(path)["a"] for path in folder.parent.iterdir())
                assert kept == ["new", "old"]
                gaps += 1
            files.clean_up(folder)
            seen.append(content(folder) if folder.exists() else None)
            assert seen[-1] in (before and whole(before), whole("new"))
            assert (
                os.listdir(folder.parent) == ["final"] * folder.exists()
                if folder.parent.exists()
                else True
            )
            write_folder(folder, "next", replace=True)
            assert content(folder) == whole("next") and os.listdir(folder.parent) == ["final"]
            if not killed:
                break
            step += 1
        assert step > 10 and whole("new") in seen and (before and whole(before)) in seen
        assert gaps == (1 if before else 0)


def logged(monkeypatch):
    """A list that tells every sync and rename from now on, by the names of what they were given."""
    log, inodes, fsync = [], {}, os.fsync

    def sync(handle):
        log.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def renaming(real):
        def rename(old, new):
            inodes[os.stat(old).st_ino] = Path(new).name
            log.append(("rename", Path(old).name.split(".")[-1], Path(new).name))
            real(old, new)

        return rename

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(getattr(os, name)))
    return log


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_told(
    tmp_path, monkeypatch
):
    log = logged(monkeypatch)
    write_atomic(tmp_path / "f", "text")
    inode = {path: path.stat().st_ino for path in (tmp_path, tmp_path / "f")}
    assert log == [
        ("sync", inode[tmp_path / "f"]),
        ("rename", "tmp", "f"),
        ("sync", inode[tmp_path]),
    ]
    log.clear()
    write_atomic(tmp_path / "x" / "y" / "f", "text")  # new folders have their names on the disk too
    inodes = [path.stat().st_ino for path in (tmp_path, tmp_path / "x")]
    assert log[:2] == [("sync", inode) for inode in inodes] and len(log) == 5


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_is_on_the_disk_with_all_that_is_in_it_before_it_has_its_name(
    tmp_path, monkeypatch, replace
):
    folder = tmp_path / "final"
    if replace:
        write_folder(folder, "old")
    log = logged(monkeypatch)
    write_folder(folder, "new", replace=replace)
    inode = {path: ("sync", path.stat().st_ino) for path in (tmp_path, folder, *folder.rglob("*"))}
    first = log.index(("rename", "tmp", "final"))
    before, after = log[:first], log[first + 1 :]
    renames = [entry for entry in before if entry[0] == "rename"]
    assert len(renames) == replace and before[len(before) - len(renames) :] == renames
    order = [before.index(inode[path]) for path in (folder / "sub" / "b", folder / "sub", folder)]
    assert order == sorted(order) and inode[folder / "a"] in before and after == [inode[tmp_path]]


def test_the_mode_is_that_of_the_umask_whoever_wrote(tmp_path):
    before = os.umask(0o027)
    try:
        with writing(tmp_path / "f") as aside:
            aside.unlink()
            os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))
        with publishing(tmp_path / "d") as folder:
            os.close(os.open(folder / "g", os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("f", "d", "d/g")]
    assert modes == [0o640, 0o750, 0o640]


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    write_atomic(tmp_path / "f", "old")
    write_folder(tmp_path / "d", "old")
    real_open = open

    def full(path, mode="r", *rest, **more):
        file = real_open(path, mode, *rest, **more)
        if "w" in mode:

            class Full:
                def write(self, _):
                    raise OSError(errno.ENOSPC, "No space left on device")

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

            return Full()
        return file

    with monkeypatch.context() as patch:
        patch.setattr("io.open", full)
        with pytest.raises(OSError, match="No space"):
            write_atomic(tmp_path / "f", "new")
        with pytest.raises(OSError, match="No space"):
            write_folder(tmp_path / "d", "new", replace=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # and in the system's own words
    try:
        with pytest.raises(OSError, match=r"too large: .*/f.$"):
            write_atomic(tmp_path / "f", "x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "f").read_text() == "old" and content(tmp_path / "d") == whole("old")
    assert sorted(os.listdir(tmp_path)) == ["d", "f"]


def test_what_stands_there_is_replaced_only_where_that_is_asked(tmp_path):
    write_folder(tmp_path / "d", "old")
    with pytest.raises(FileExistsError), publishing(tmp_path / "d"):
        raise AssertionError("nothing is begun")
    with pytest.raises(FileExistsError), publishing(tmp_path / "late") as aside:
        (aside / "a").write_text("mine")
        write_folder(tmp_path / "late2", "other")
        os.rename(tmp_path / "late2", tmp_path / "late")
    with pytest.raises(KeyboardInterrupt), publishing(tmp_path / "d", replace=True) as aside:
        (aside / "a").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "d") == whole("old") and content(tmp_path / "late") == whole("other")
    (tmp_path / "file").write_text("a file")
    write_folder(tmp_path / "file", "new", replace=True)
    assert content(tmp_path / "file") == whole("new")
    assert sorted(os.listdir(tmp_path)) == ["d", "file", "late"]


def test_what_was_set_aside_comes_back_when_the_new_one_cannot_have_its_name(tmp_path, monkeypatch):
    write_folder(tmp_path / "d", "old")
    real = os.rename

    def rename(old, new):
        if str(old).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(tmp_path / "d", "new", replace=True)
    assert content(tmp_path / "d") == whole("old") and os.listdir(tmp_path) == ["d"]


def test_only_what_the_dead_left_is_taken_away(tmp_path):
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    host, alive = os.uname().nodename, os.getppid()
    left = [f".f.{dead}@{host}.tmp", f".f.{dead}.tmp", f".f.{os.getpid()}@{host}.tmp"]
    kept = [
        f".f.{alive}@{host}.tmp",
        f".f.{dead}@elsewhere.tmp",
        f".g.{dead}@{host}.tmp",
        ".f.tmp",
        ".f.x.tmp",
    ]
    for name in left + kept:
        (tmp_path / name).touch()
    write_atomic(tmp_path / "f", "")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "f"])


def test_what_is_ours_is_known_by_name(tmp_path):
    names = ["config.json", "checkpoints", ".lock", ".config.json.12@h.tmp", ".config.json.12.tmp"]
    names += [".final.3@h.old", ".final.lock", ".config.json.parts", "report-1.html"]
    others = ["notes.txt", ".notes.txt.3@h.tmp", ".git", "config.json.bak", ".config.json.tmp"]
    for name in names + others:
        (tmp_path / name).touch()
    rest = foreign(tmp_path, ("config.json", "checkpoints", "final", "report-*.html"))
    assert [path.name for path in rest] == sorted(others)


def in_child(work):
    """What `work` gives in another process, as text."""
    send, receive = os.pipe()[::-1]
    if not (pid := os.fork()):
        try:
            text = str(work())
        except ValueError as error:
            text = str(error)
        os.write(send, text.encode())
        os._exit(0)
    os.close(send)
    os.waitpid(pid, 0)
    with os.fdopen(receive) as file:
        return file.read()


def try_lock(out, **how):
    with locked(out, **how):
        return "held"


def test_a_second_process_is_refused_in_a_line(tmp_path):
    out = tmp_path / "runs" / "answers.jsonl"
    with locked(out):
        assert os.listdir(out.parent) == [".answers.jsonl.lock"]
        said = in_child(lambda: try_lock(out))
        assert said.startswith(f"--out {out} is being written by another process: ")
        assert "\n" not in said
        assert in_child(lambda: try_lock(out.with_name("other"))) == "held"
        assert in_child(lambda: try_lock(out, share="1")) == "held"
    assert os.listdir(out.parent) == [] and in_child(lambda: try_lock(out)) == "held"
    with hold_lock(out.parent):
        assert "being written" in in_child(lambda: hold_lock(out.parent))
    assert "being written" not in in_child(lambda: hold_lock(out.parent))


def test_a_lock_ends_with_its_process(tmp_path):
    def die():
        with locked(tmp_path / "f"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == "" and os.listdir(tmp_path) == [".f.lock"]
    with locked(tmp_path / "f"):
        pass
    assert os.listdir(tmp_path) == []


def test_many_processes_on_one_lock_are_there_one_at_a_time(tmp_path):
    count, children = tmp_path / "count", []
    count.write_text("0")
    for _ in range(4):
        if not (pid := os.fork()):
            for _ in range(25):
                with locked(count, waiting=lambda: None):
                    count.write_text(str(int(count.read_text()) + 1))
            os._exit(0)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    assert count.read_text() == "100" and os.listdir(tmp_path) == ["count"]


@pytest.mark.parametrize("cut", range(1, 24, 4))
def test_a_torn_line_is_cut_off_before_the_next(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    records = [{"n": i, "text": "é\u2028\n"} for i in range(4)]
    assert read_json_lines(path) == []
    for record in records[:3]:
        append_line(path, record)
    assert read_json_lines(path) == records[:3]
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_json_lines(path) == records[:2]
    append_line(path, records[3])
    assert read_json_lines(path) == records[:2] + records[3:]
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == read_json_lines(
        path
    )
    path.write_bytes(b'[1]\n\xff\nnull\n{"a": 1}\n{"b":')
    assert read_json_lines(path) == [{"a": 1}]
    path.write_bytes(b'{"torn')
    append_line(path, records[0])
    assert read_json_lines(path) == records[:1]


def test_parts_are_there_or_not_and_go_with_the_rest(tmp_path):
    parts = Parts(tmp_path / "out.bin")
    assert parts.about() is None and parts.keys() == set()
    parts.begin({"of": 1})
    tensors = {"é": torch.arange(6.0).view(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}
    parts.save("a.1", tensors, {"note": "x"})
    killed = 0
    while killed_at(killed, lambda: parts.save("b", tensors)):
        assert parts.keys() == {"a.1"} or (parts.keys() == {"a.1", "b"} and killed > 2)
        killed += 1
    assert killed > 2 and parts.keys() == {"a.1", "b"}
    again = Parts(tmp_path / "out.bin")
    found, note = again.load("a.1")
    assert again.about() == {"of": 1} and note == {"note": "x"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    again.begin(None)
    assert parts.keys() == set() and parts.about() is None
    parts.clear()
    assert os.listdir(tmp_path) == []


def test_nothing_heavy_is_imported(tmp_path):
    code = "import sys, ta.files; print(*({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    pid = os.popen(f'{sys.executable} -c "{code}"')
    assert pid.read().strip() == "" and pid.close() is None


def write(folder, value=1):
    column = Column(folder / "a.npy", "int32", (2,))
    for size in (0, 3, 1):
        column.append(np.full((size, 2), value))
    column.close()
    return {"value": value}


def opened(folder, verify=False):
    found = open_arrays(folder, verify)
    return found if isinstance(found, str) else (found[0]["a"].tolist(), found[1])


def open_or_make(folder, opened, make, say):
    """What stands in the folder, and whether it was made now."""
    if not isinstance(found := opened(folder), str):
        return found, False
    with made_once(folder, lambda: opened(folder), say) as aside:
        if aside is not None:
            write_manifest(aside, make(aside))
    return opened(folder), aside is not None


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
    assert sorted(path.name for path in folder.parent.iterdir()) == ["key"]


@pytest.mark.parametrize(
    "damage",
    [
        "a.npy missing",
        "a.npy short",
        "a.npy flipped",
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
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        new = {"null": b"null", "flipped": flipped, "short": content[: len(content) // 2]}[how]
        (folder / name).write_bytes(new)
    assert make(folder, 2, lines) == (([[2, 2]] * 4, {"value": 2}), True)
    assert len(lines) == 1 and "damaged" in lines[0] and str(folder) in lines[0]


def test_a_large_file_is_compared_with_its_hash_on_a_word(tmp_path, monkeypatch):
    make(tmp_path / "key")
    array = tmp_path / "key" / "a.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\7")
    monkeypatch.setattr(files, "SMALL", 0)
    assert opened(tmp_path / "key")[1] == {"value": 1}
    assert opened(tmp_path / "key", verify=True) == "a.npy does not have the hash in its manifest"


def test_a_failure_leaves_nothing_and_left_overs_go(tmp_path):
    def fail(beside):
        write(beside)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_or_make(tmp_path / "key", opened, fail, print)
    assert not list(tmp_path.iterdir())
    left = f"{os.getpid()}@{os.uname().nodename}.tmp"
    (tmp_path / f".key.{left}").mkdir()
    (tmp_path / f".other.{left}").mkdir()
    make(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.{left}", "key"]


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
        open_or_make(tmp_path / "other", opened, lambda folder: write(folder, 1), print)
        os.rename(tmp_path / "other", tmp_path / "key")
        return write(beside, 2)

    assert open_or_make(tmp_path / "key", opened, overtaken, print)[0] == (
        [[1, 1]] * 4,
        {"value": 1},
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]


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


def test_an_input_is_known_under_any_name(tmp_path):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "f").write_text("x")
    os.link(tmp_path / "f", tmp_path / "hard")
    (tmp_path / "link").symlink_to("out")
    read = [tmp_path / "f", tmp_path / "out" / "deep"]
    for out in (tmp_path / "f", tmp_path / "hard", tmp_path / "out", tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="which is read from"):
            keep_inputs(out, read)
    for out in (tmp_path / "new", tmp_path / "out" / "deep" / "new", tmp_path / "f2"):
        keep_inputs(out, [*read, None, "", "x" * 5000, "a\0b", "no such file"])


def test_a_folder_of_ours_is_known_by_content(tmp_path):
    def check():
        check_replaceable(tmp_path, "index", "manifest.json", ("a", "b"), ("manifest.json", "x*"))

    for text in (None, "", "[1]", '{"a": 1}', '{"a": 1, "b"', "\xff"):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="is no index of ours"):
            check()
    (tmp_path / "manifest.json").write_text('{"a": 1, "b": 2, "c": 3}')
    (tmp_path / "x1").mkdir()
    check()
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="holds notes, which is no part of its index"):
        check()


def test_shares_are_told_by_their_locks(tmp_path):
    out = tmp_path / "a.b"
    for name in (".a.b.part-0.lock", ".a.b.part-12.lock", ".a.b.lock", ".a.b.c.part-1.lock"):
        (tmp_path / name).touch()
    (tmp_path / ".axb.part-3.lock").touch()
    assert shares(out) == {"part-0", "part-12"} and shares(tmp_path / "none" / "x") == set()


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    for write in (lambda path: write_atomic(path, ""), lambda path: locked(path).__enter__()):
        with pytest.raises(NotADirectoryError, match=f"where a folder is needed: '{tmp_path}/a'"):
            write(tmp_path / "a" / "b" / "c")
