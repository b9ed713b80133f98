"""Cached features: what is written is what is read, interrupted runs go on, stale and foreign
caches are refused, memory stays flat.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ta.files import content_hash, locked
from ta.media.features import (
    FeatureFile,
    Layout,
    check_absent,
    check_features,
    content_hashes,
    extract,
    read_features,
)

LAYOUT = Layout("f" * 64, (3, 2), "F32")


def check_all(features, paths):
    for key, path in paths.items():
        check_features(features, key, path)


read = partial(
    np.loadtxt, dtype=np.float32, ndmin=1
)  # without torch, so that reader processes start quickly


def encode(inputs):
    return torch.stack([inputs.expand(-1, 2) * (row + 1) for row in range(3)], 1)  # (I, 3, 2)


def expected(value):
    return torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]) * value


@pytest.fixture
def paths(tmp_path):
    keys = [f"sub/{i}.png" for i in range(7)] + ['ä "quote".png']
    (tmp_path / "media" / "sub").mkdir(parents=True)
    for value, key in enumerate(keys):
        (tmp_path / "media" / key).write_text(str(value))
    return {key: tmp_path / "media" / key for key in keys}


def stop_after(count):
    calls = iter(range(count))

    def encode_some(inputs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return encode(inputs)

    return encode_some


@pytest.mark.parametrize("workers", [0, 2])
def test_written_is_read(tmp_path, paths, workers):
    out, seen = tmp_path / "cache.safetensors", []
    done = extract(
        out,
        paths,
        read,
        encode,
        LAYOUT,
        batch_size=3,
        workers=workers,
        progress=lambda n, total: seen.append((n, total)),
    )
    assert done == (8, 0, []) and seen == [(3, 8), (6, 8), (8, 8)]
    features = read_features(out, LAYOUT.fingerprint)
    assert features.hashes == {key: content_hash(path) for key, path in paths.items()}
    order = list(reversed(paths))
    assert all(
        torch.equal(features.handle.get_tensor(key), expected(7 - i)) for i, key in enumerate(order)
    )
    assert sorted(load_file(out)) == sorted(paths)  # plain safetensors
    check_all(features, paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.safetensors", "media"]


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("more", [False, True])
def test_an_interrupted_run_goes_on(tmp_path, paths, finished, more):
    out = tmp_path / "cache.safetensors"
    for more_finished in (0, finished, 0) if finished < 2 else (1, 1, 0):
        with pytest.raises(KeyboardInterrupt):
            extract(out, paths, read, stop_after(more_finished), LAYOUT, batch_size=3)
        assert not out.exists()
        half = tmp_path / ".cache.safetensors.parts" / ".000009.safetensors.7.tmp"
        half.write_bytes(b"torn")  # what a kill leaves of a part is no part
    if more:  # files that came after the beginning
        for value in range(8, 60):
            path = tmp_path / "media" / f"{value}.png"
            path.write_text(str(value))
            paths[path.name] = path
    assert extract(out, paths, read, encode, LAYOUT, batch_size=3) == (
        len(paths),
        3 * finished,
        [],
    )
    features = read_features(out, LAYOUT.fingerprint)
    assert all(
        torch.equal(features.handle.get_tensor(key), expected(i)) for i, key in enumerate(paths)
    )
    check_all(features, paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.safetensors", "media"]


def test_a_killed_run_goes_on_and_a_second_one_is_refused(tmp_path, paths):
    out, whole = tmp_path / "c", tmp_path / "whole"
    extract(whole, paths, read, encode, LAYOUT, batch_size=3)
    for _ in range(2):  # one batch each
        if not (pid := os.fork()):
            calls = []

            def killed(inputs, calls=calls):
                calls.append(inputs)
                if len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return encode(inputs)

            extract(out, paths, read, killed, LAYOUT, batch_size=3)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]) and not out.exists()
    with locked(out), pytest.raises(ValueError, match="c is being written by another process"):
        extract(out, paths, read, encode, LAYOUT)
    assert extract(out, paths, read, encode, LAYOUT, batch_size=3)[:2] == (8, 6)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["c", "media", "whole"]


def read_and_tell(path):
    """An input that no pipe holds: its worker waits until it is fetched."""
    with open(path.parent / "pid", "a") as file:
        print(os.getpid(), file=file)
    return np.zeros(1 << 20, np.float32)


def test_workers_end_with_a_killed_run(tmp_path, paths):
    if not (pid := os.fork()):
        die = partial(os.kill, os.getpid(), signal.SIGKILL)
        extract(tmp_path / "c", paths, read_and_tell, lambda x: die(), LAYOUT, 3, workers=1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    worker = next((tmp_path / "media").rglob("pid")).read_text().split()[0]
    state = Path(f"/proc/{worker}/stat")
    deadline = time.time() + 20
    while state.exists() and state.read_text().split()[2] != "Z" and time.time() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_parts_that_a_kill_left_beside_their_cache_go(tmp_path, paths):
    out, parts, kept = tmp_path / "c", tmp_path / ".c.parts", tmp_path / "kept"
    extract(out, paths, read, encode, LAYOUT, progress=lambda *_: shutil.copytree(parts, kept))
    kept.rename(parts)
    with pytest.raises(ValueError, match="exists"):
        check_absent(out)
    assert not parts.exists()
    # what is begun to replace a cache holds more than it, and stays
    paths["sub/0.png"].write_text("9")
    with pytest.raises(KeyboardInterrupt):
        extract(out, paths, read, stop_after(1), LAYOUT, batch_size=3, overwrite=True)
    with pytest.raises(ValueError, match="exists"):
        check_absent(out)
    assert parts.exists()
    assert extract(out, paths, read, encode, LAYOUT, overwrite=True)[:2] == (8, 3)


def test_a_cache_of_an_earlier_version_is_refused_in_a_line(tmp_path):
    old = {"format": "ta-features-1", "fingerprint": "f", "shape": "[3, 2]", "hashes": "0" * 32}
    save_file({"a.png": torch.zeros(3, 2)}, tmp_path / "old", old)
    with pytest.raises(ValueError, match=r"earlier version.*preprocess_images.py --overwrite"):
        read_features(tmp_path / "old")


def test_stale_and_foreign_caches_are_refused(tmp_path, paths):
    out = tmp_path / "cache.safetensors"
    extract(out, paths, read, encode, LAYOUT)
    with pytest.raises(ValueError, match="another encoder"):
        read_features(out, "e" * 64)
    features = read_features(out)
    with pytest.raises(ValueError, match=r"'other\.png' is not in the cache"):
        check_features(features, "other.png", paths["sub/0.png"])
    paths["sub/3.png"].write_text("33")
    with pytest.raises(ValueError, match=r"is stale: 'sub/3\.png' changed since"):
        check_features(features, "sub/3.png", paths["sub/3.png"])
    check_all(features, {key: path for key, path in paths.items() if key != "sub/3.png"})
    with pytest.raises(ValueError, match="exists"):
        extract(out, paths, read, encode, LAYOUT)

    save_file({"a": torch.zeros(3, 2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, reason in (
        ("weights", "not a cache"),
        ("text", "does not load as a cache"),
        ("none", "No such file"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_features(tmp_path / f"{name}.safetensors")
    out.write_bytes(out.read_bytes()[:-8])
    with pytest.raises(ValueError, match="does not load as a cache"):
        read_features(out)


def test_a_beginning_of_another_encoder_is_refused(tmp_path, paths):
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "c", paths, read, stop_after(1), LAYOUT, batch_size=3)
    for other in (
        LAYOUT._replace(fingerprint="e" * 64),
        LAYOUT._replace(shape=(6, 1)),
        LAYOUT._replace(dtype="F16"),
    ):
        with pytest.raises(ValueError, match="begun with another encoder"):
            extract(tmp_path / "c", paths, read, encode, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_stop_or_are_counted(tmp_path, paths, workers):
    paths["sub/2.png"].write_text("bad")
    with pytest.raises(ValueError, match="could not convert string 'bad'"):
        extract(tmp_path / "c", paths, read, encode, LAYOUT, batch_size=2, workers=workers)
    done = extract(
        tmp_path / "c", paths, read, encode, LAYOUT, batch_size=2, workers=workers, skip_bad=True
    )
    assert done[:2] == (7, 2) and [key for key, _ in done[2]] == ["sub/2.png"]
    assert sorted(read_features(tmp_path / "c").hashes) == sorted(set(paths) - {"sub/2.png"})
    only = {"sub/2.png": paths["sub/2.png"]}
    with pytest.raises(ValueError, match="none of the 1 files"):
        extract(tmp_path / "d", only, read, encode, LAYOUT, skip_bad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, paths, dtype):
    layout = LAYOUT._replace(dtype={torch.float16: "F16", torch.bfloat16: "BF16"}[dtype])
    extract(tmp_path / "c", paths, read, lambda x: encode(x).to(dtype), layout)
    assert torch.equal(
        read_features(tmp_path / "c").handle.get_tensor("sub/5.png"), expected(5).to(dtype)
    )


def test_wrong_shapes_and_names_are_refused(tmp_path, paths):
    for wrong in (lambda x: encode(x)[:, :2], lambda x: encode(x).half(), lambda x: encode(x)[:1]):
        with pytest.raises(ValueError, match="the encoder gave features"):
            extract(tmp_path / "c", paths, read, wrong, LAYOUT, batch_size=4)


def test_too_long_a_header_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr("ta.media.features.MAX_HEADER", 2000)
    with pytest.raises(ValueError, match="split the folder"):
        FeatureFile(tmp_path / "c", LAYOUT, [f"{i}.png" for i in range(20)], False)


MEMORY = """
import re, resource, sys
import numpy as np
import safetensors.torch, torch
from ta.media.features import extract
from ta.media.features import Layout

def memory(name):
    return int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])

def save_without_a_copy(*given):
    held.append(memory("RssAnon"))
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, ((memory("VmData") + 16_000) * 1024, limits[1]))
    real(*given)
    resource.setrlimit(resource.RLIMIT_DATA, limits)

def encode(inputs):
    held.append(memory("RssAnon"))
    return torch.ones(len(inputs), 64, 256)

real, safetensors.torch.save_file, held = safetensors.torch.save_file, save_without_a_copy, []
paths = {str(i): sys.argv[1] for i in range(1000)}  # 65 MB of features
read = lambda path: np.zeros(1, np.float32)
extract(f"{sys.argv[1]}.cache", paths, read, encode, Layout("f", (64, 256), "F32"))
print(max(held) - held[4])
"""


def test_memory_does_not_grow_with_the_features(tmp_path):
    (tmp_path / "m").write_text("1")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "m")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) < 8_000  # kB


def test_files_with_the_same_stamp_are_not_read_again(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}.bin" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 10)
    notes, read = tmp_path / "notes" / "media.json", []
    monkeypatch.setattr(
        "ta.media.features.content_hash", lambda path: read.append(path) or content_hash(path)
    )
    assert (
        content_hashes(files, notes) == [content_hash(file) for file in files]
        and not notes.exists()
    ), "just written, may change in this tick"
    monkeypatch.setattr("ta.media.features.SETTLED", -1)
    first = content_hashes(files, notes)
    read.clear()
    assert content_hashes(files[::-1], notes) == first[::-1] and read == []
    files[2].write_bytes(b"x" * 10)  # of the same size
    again = content_hashes(files, notes)
    assert (
        read == [str(files[2])]
        and again[2] == content_hash(files[2]) != first[2]
        and again[:2] + again[3:] == first[:2] + first[3:]
    )
    notes.write_text(notes.read_text()[:20])
    assert content_hashes(files, notes) == again and len(read) == 5, (
        "a torn note is as good as none"
    )
