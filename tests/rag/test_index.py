"""Building an index: the same vectors on any number of processes and after any kill; what does not fit is refused before anything is written."""

import os
import shutil
import signal

import pytest
import torch

from ta.builtin import models, tasks
from ta.files import clean_up, locked
from ta.rag import index
from ta.rag.embedding_settings import EncoderConfig
from ta.rag.index import begin_index, build_index, open_index


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    models.write_encoder(folder / "encoder")
    tasks.write_jsonl(folder / "passages.jsonl", tasks.passages()[:90])
    return folder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(index, "BLOCK", 16)  # 6 blocks


def config(given, **more):
    return EncoderConfig(encoder_path=str(given / "encoder"), **more)


def whole(given, out):
    begin_index(out, [str(given / "passages.jsonl")], config(given))
    assert build_index(out, "cpu")
    return out


def same(a, b):
    names = ("passages.jsonl", "vectors.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names) and sorted(
        os.listdir(a)
    ) == sorted(os.listdir(b))


def test_two_processes_build_what_one_does(given, tmp_path):
    one, two = whole(given, tmp_path / "one"), tmp_path / "two"
    begin_index(two, [str(given / "passages.jsonl")], config(given))
    assert not build_index(two, "cpu", 0, 2) and not two.exists()
    assert build_index(two, "cpu", 1, 2)
    assert same(one, two) and sorted(os.listdir(one)) == [
        "manifest.json",
        "passages.jsonl",
        "vectors.safetensors",
    ]
    assert not list(tmp_path.glob(".*"))


def dying_after(count):
    """os.rename and os.replace, which names a part, that are killed after so many calls."""
    seen = []

    def dying(real):
        def call(old, new):
            seen.append(new)
            if len(seen) > count:
                os.kill(os.getpid(), signal.SIGKILL)
            real(old, new)

        return call

    return dying(os.rename), dying(os.replace)


def killed(out, count):
    """Build in a child that is killed after so many renames; whether it came to that."""
    if not (pid := os.fork()):
        os.rename, os.replace = dying_after(count)
        try:
            build_index(out, "cpu")
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_build_goes_on_where_it_was_killed(given, tmp_path):
    expected, out = whole(given, tmp_path / "whole"), tmp_path / "killed"
    begin_index(out, [str(given / "passages.jsonl")], config(given))
    for count in (1, 2, 1):  # blocks after which it dies, before the next one has its name
        assert killed(out, count) and not out.exists()
        begin_index(out, [str(given / "passages.jsonl")], config(given), resume=True)
    left = []
    torn = tmp_path / ".killed.parts" / ".00000005.safetensors.7.tmp"
    torn.write_bytes(b"torn")  # what a kill leaves of a part is no part
    assert build_index(out, "cpu", advance=left.append) and left == [64, 16, 10]
    assert same(expected, out)


def test_a_kill_while_it_is_published_leaves_the_old_index_or_the_new_one(given, tmp_path):
    expected, out, step = whole(given, tmp_path / "whole"), tmp_path / "index", 0
    tasks.write_jsonl(tmp_path / "other.jsonl", tasks.passages()[:7])
    begin_index(out, [str(tmp_path / "other.jsonl")], config(given))
    build_index(out, "cpu")
    shutil.copytree(out, tmp_path / "old")
    sources, seen = [str(given / "passages.jsonl")], []
    while True:
        begin_index(out, sources, config(given), overwrite=True)
        died = killed(out, 6 + step)  # six blocks, then each step of what follows
        clean_up(out)
        seen.append(len(open_index(out).vectors))
        if not died:
            break
        begin_index(out, sources, config(given), resume=True)
        left = []
        assert build_index(out, "cpu", advance=left.append) and left == [90] and same(expected, out)
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "old", out)
        step += 1
    assert seen == sorted(seen) and set(seen) == {7, 90} and same(expected, out)
    assert not list(tmp_path.glob(".*"))


def test_a_second_builder_is_refused(given, tmp_path):
    out, sources = tmp_path / "index", [str(given / "passages.jsonl")]
    begin_index(out, sources, config(given))
    with locked(out, share="part-0"):
        with pytest.raises(ValueError, match="index is being written by another process"):
            begin_index(out, sources, config(given), overwrite=True)
        with pytest.raises(ValueError, match="index is being written by another process"):
            build_index(out, "cpu")
    assert build_index(out, "cpu")


def test_what_was_begun_is_not_gone_on_with_otherwise(given, tmp_path):
    out, sources = tmp_path / "index", [str(given / "passages.jsonl")]
    begin_index(out, sources, config(given))
    with pytest.raises(ValueError, match="was begun and not finished: give --resume"):
        begin_index(out, sources, config(given))
    with pytest.raises(ValueError, match="begun with another reading"):
        begin_index(out, sources, config(given, pooling="cls"), resume=True)
    tasks.write_jsonl(tmp_path / "other.jsonl", tasks.passages()[:7])
    with pytest.raises(ValueError, match="begun with another sources"):
        begin_index(out, [str(tmp_path / "other.jsonl")], config(given), resume=True)
    begin_index(out, [str(tmp_path / "other.jsonl")], config(given), overwrite=True)
    assert build_index(out, "cpu") and open_index(out).vectors.shape == (7, 128)
    with pytest.raises(ValueError, match="exists: give another folder, or --overwrite"):
        begin_index(out, sources, config(given))
    (tmp_path / "precious").mkdir()
    begin_index(tmp_path / "precious", sources, config(given))  # an empty folder is as good as none
    (tmp_path / "precious" / "notes.txt").touch()
    with pytest.raises(ValueError, match="is no index of ours, so it is not overwritten"):
        begin_index(tmp_path / "precious", sources, config(given), overwrite=True)


@pytest.mark.slow
def test_the_recipe_on_one_process_and_on_two(forked, given, tmp_path):
    flags = (
        "--passages",
        given / "passages.jsonl",
        "--encoder-path",
        given / "encoder",
        "--passage-prefix",
        "passage: ",
    )
    forked("build_index", *flags, "--out", tmp_path / "one")
    forked("build_index", *flags, "--out", tmp_path / "two", processes=2)
    one, two = (open_index(tmp_path / name) for name in ("one", "two"))
    assert (
        torch.equal(one.vectors, two.vectors)
        and one.embedding_settings.passage_prefix == "passage: "
    )


def test_wrong_input_is_answered_in_a_line_and_nothing_is_written(door, given, tmp_path):
    twice = tmp_path / "twice.jsonl"
    tasks.write_jsonl(twice, [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}])
    (tmp_path / "empty.jsonl").write_text("")
    tasks.write_jsonl(tmp_path / "blank.jsonl", [{"text": "x"}, {"text": ""}])
    cases = (
        (("--passages", twice), "twice.jsonl:2: id 'a' is that of"),
        (("--passages", tmp_path / "empty.jsonl"), "empty.jsonl: empty, no record in it"),
        (("--passages", tmp_path / "blank.jsonl"), "blank.jsonl:2: text is"),
        (("--passages", tmp_path / "gone.jsonl"), "gone.jsonl: no such file"),
        (("--encoder-path", tmp_path / "gone"), "no model folder at"),
        (("--encoder-max-tokens", 1000), "reads 1 to 128"),
        (("--resume", "--overwrite"), "give one of the two"),
    )
    for more, words in cases:
        flags = (
            "--encoder-path",
            given / "encoder",
            "--passages",
            given / "passages.jsonl",
            "--out",
            tmp_path / "out",
            *more,
        )
        code, said = door("build_index", *flags)
        assert code == 2 and words in said, (more, said)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name], more
