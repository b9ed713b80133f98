"""Exports appear whole or not at all, and in as many files as their size asks for."""

import json
import os
import stat

import pytest
import torch
from conftest import together
from transformers import AutoModelForCausalLM, AutoTokenizer

from ta.builtin import models
from ta.chat.template import ChatConfig, explicit_template, export_template
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.folders import ModelConfig
from ta.model import export
from ta.model.language_model import wrap
from ta.parallel import close, init


def made(dtype=torch.float32):
    """The built-in model, untrained, and its tokenizer."""
    tokenizer = load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())
    return wrap(models.tiny_model().to(dtype))[0], tokenizer


@pytest.fixture(scope="module")
def parts():
    return made()


def test_a_large_model_is_several_files_with_an_index(parts, tmp_path, monkeypatch):
    model, tokenizer = parts
    monkeypatch.setattr(export, "MAX_FILE", "1MB")
    export.export(model, tokenizer._replace(stop_ids=[2]), tmp_path / "final")
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "final").glob("*.safetensors")}
    assert len(files) > 3 and files == set(index["weight_map"].values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.inner.parameters(), loaded.parameters(), strict=True)
    )
    assert loaded.generation_config.eos_token_id == [2] and len(
        AutoTokenizer.from_pretrained(tmp_path / "final")
    ) == len(tokenizer.fast)


def test_what_fails_leaves_the_earlier_export(parts, tmp_path, monkeypatch):
    def fail(folder):
        raise OSError(28, "No space left on device")

    export.export(*parts, tmp_path / "final")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model, tokenizer = parts
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(model, "save_parts", fail)
        export.export(model, tokenizer, tmp_path / "final")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    template = explicit_template("{role}: ", "</s>")
    export.export(model, tokenizer._replace(template=template), tmp_path / "final")
    written = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert written.chat_template == export_template(template)
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Bye"}]
    assert written.apply_chat_template(chat, tokenize=False) == "user: Hello</s>assistant: Bye</s>"


def test_every_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        export.export(*made(torch.bfloat16), tmp_path / "final")
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "final").iterdir()
    }
    assert "model.safetensors" in modes and set(modes.values()) == {0o644}


def test_an_earlier_export_stands_until_the_new_one_does(parts, tmp_path, monkeypatch):
    export.export(*parts, tmp_path / "final")
    (tmp_path / "final" / "mark").touch()
    real, seen = os.rename, []

    def rename(old, new):
        seen.append((tmp_path / "final" / "mark").exists())
        real(old, new)

    monkeypatch.setattr(os, "rename", rename)
    export.export(*parts, tmp_path / "final")
    assert seen == [True, False] and os.listdir(tmp_path) == ["final"]
    assert not (tmp_path / "final" / "mark").exists()


def test_what_fails_on_one_process_ends_the_export_of_all(tmp_path):
    final = tmp_path / "final"
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier").rename(final)
    (final / "mark").touch()

    def main(rank):
        init()
        for failing, disk in ((0, False), (1, False), (0, True)):
            try:
                with export.published(final) as folder:
                    if disk and rank == 0:  # the last step fails, on the process that writes
                        os.rename = lambda old, new: full()
                    if not disk and rank == failing:
                        full()
                    assert rank or folder.is_dir()
                os._exit(3)  # nothing was raised
            except OSError as error:
                print(rank, failing, disk, error, flush=True)
        close()

    def full():
        raise OSError(28, "No space left on device")

    assert together(main, 2, tmp_path / "said") == [0, 0]
    lines = (tmp_path / "said").read_text().splitlines()
    assert sum("No space left" in line for line in lines) == 6, lines
    assert sorted(os.listdir(tmp_path)) == ["final", "said"] and os.listdir(final) == ["mark"]


def test_end_tokens_are_those_of_the_base_and_those_learned(parts):
    model, fast = parts[0].inner, parts[1].fast
    before = model.generation_config.eos_token_id
    for known, learned, want in (
        ([5, 3], [2], [2, 3, 5]),
        (7, [2], [2, 7]),
        (None, [2], [2]),
        (len(fast) + 4, [], fast.eos_token_id),  # of a larger vocabulary
    ):
        model.generation_config.eos_token_id = known
        export.set_generation(model, fast, learned)
        assert model.generation_config.eos_token_id == want
    model.generation_config.eos_token_id = before
