"""What every command does with its output: it is none of its inputs, another process's work stays, and what is not ours is not replaced."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

from ta.builtin import models
from ta.files import hold_lock, locked

sys.path.append(str(ROOT / "bench"))
import storms


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Inputs of every command: a tiny model, an adapter of it, chats, passages, an encoder."""
    folder = tmp_path_factory.mktemp("outputs") / "given"
    storms.write_inputs(folder)
    return folder


def flags_of(name, given):
    """The flags of a command that give its inputs."""
    model = ("--model-path", given / "model")
    return {
        "sft": (*model, "--data", given / "chats.jsonl", "--steps", 1),
        "generate": (*model, "--data", given / "chats.jsonl", "--max-new-tokens", 2),
        "merge": ("--model-path", given / "adapter"),
        "build_index": (
            *("--passages", given / "passages.jsonl"),
            *("--encoder-path", given / "encoder"),
        ),
    }[name]


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("sft", "model"),
        ("sft", "."),
        ("sft", "chats.jsonl"),
        ("generate", "chats.jsonl"),
        ("merge", "model"),
        ("merge", "adapter"),
        ("build_index", "encoder"),
        ("build_index", "passages.jsonl"),
        ("build_index", "."),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_an_input_is_never_the_output(given, door, tmp_path, name, out, link):
    place = given / out
    if link:
        place = tmp_path / "link"
        place.symlink_to(given / out)
    before = content(given)
    for more in (("--overwrite",), ("--resume",) if name != "merge" else ()):
        code, said = door(name, *flags_of(name, given), "--out", place, *more)
        assert code == 2 and "which is read from" in said and said.count("\n") == 1, said
    assert content(given) == before


def test_a_part_of_a_source_is_an_input_too(given, door):
    code, said = door(
        *("generate", "--model-path", given / "model", "--data", f"{given / 'chats.jsonl'}@2"),
        *("--out", given / "chats.jsonl", "--overwrite"),
    )
    assert code == 2 and "which is read from" in said


def test_the_base_of_an_adapter_is_an_input_too(given, door):
    """It stands in no flag."""
    before = content(given)
    code, said = door(
        *("sft", "--model-path", given / "adapter", "--data", given / "chats.jsonl"),
        *("--out", given / "model", "--overwrite"),
    )
    assert code == 2 and "which is read from" in said and content(given) == before


@pytest.mark.parametrize("name", ["sft", "generate", "merge", "build_index"])
def test_a_second_process_is_refused_in_one_line(given, door, tmp_path, name):
    out = tmp_path / "out"
    how = {"generate": {"share": "part-0"}, "build_index": {"share": "part-0"}}.get(name, {})
    out.mkdir() if name == "sft" else None
    with hold_lock(out) if name == "sft" else locked(out, **how):
        before = content(tmp_path)
        code, said = door(name, *flags_of(name, given), "--out", out)
        assert code == 2 and content(tmp_path) == before
        assert said.splitlines()[-1].startswith(f"error: --out {out} is being written by another")
    code, said = door(name, *flags_of(name, given), "--out", out)
    assert code == 0, said


def test_only_a_merged_model_is_replaced_by_a_merge(given, door, tmp_path):
    out = tmp_path / "out"
    models.write_tiny(out)
    before = content(out)
    code, said = door("merge", *flags_of("merge", given), "--out", out, "--overwrite")
    assert code == 2 and "is no merged model of ours" in said and content(out) == before
    assert door("merge", *flags_of("merge", given), "--out", tmp_path / "new")[0] == 0
    about = json.loads((tmp_path / "new" / "merged_from.json").read_text())
    assert about == {"base": str(given / "model"), "adapter": str(given / "adapter")}
    assert (
        door("merge", *flags_of("merge", given), "--out", tmp_path / "new", "--overwrite")[0] == 0
    )
    (tmp_path / "new" / "notes.txt").write_text("mine")
    code, said = door("merge", *flags_of("merge", given), "--out", tmp_path / "new", "--overwrite")
    assert code == 2 and "holds notes.txt, which is no part" in said
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


def test_a_feature_cache_replaces_feature_caches_only(door, tmp_path):
    (tmp_path / "root").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / "root" / f"{i}.png")
    flags = ("--root", tmp_path / "root", "--workers", 0)
    models.write_tiny(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    for out, word in (
        (weights, "is no cache of features"),
        (tmp_path / "t", "does not load as a cache"),
    ):
        (tmp_path / "t").write_text("text")
        code, said = door("preprocess_images", *flags, "--out", out, "--overwrite")
        assert code == 2 and word in said
    assert weights.read_bytes() == before and (tmp_path / "t").read_text() == "text"
    with locked(tmp_path / "c"):
        assert "is being written" in door("preprocess_images", *flags, "--out", tmp_path / "c")[1]
    assert door("preprocess_images", *flags, "--out", tmp_path / "c")[0] == 0
    first = (tmp_path / "c").read_bytes()
    assert "exists: give another" in door("preprocess_images", *flags, "--out", tmp_path / "c")[1]
    assert door("preprocess_images", *flags, "--out", tmp_path / "c", "--overwrite")[0] == 0
    assert (tmp_path / "c").read_bytes() == first
