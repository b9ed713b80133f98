"""What stands in a folder, and what a command loads for it; no weights are read."""

import json
import shutil

import pytest
from huggingface_hub import constants
from test_audio import write_wav
from test_encoders import save_clip, save_whisper

from ta.builtin.model_folders import builtin_encoder, tiny_folder
from ta.builtin.pictures import write_pictures
from ta.folders import ModelConfig, _downloaded, read_folder, resolve


def folder(path, **files):
    """A folder with JSON files: config={...} is config.json."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", config={"model_type": "llama"})


def test_the_kinds_of_folders(tmp_path, base):
    assert read_folder(base)[:3] == (base, "model", None)
    head = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    assert read_folder(folder(tmp_path / "head", config=head)).kind == "classifier"
    adapter = folder(tmp_path / "adapter", adapter_config={"base_model_name_or_path": base})
    assert read_folder(adapter)[:3] == (adapter, "adapter", base)


def test_an_adapter_as_the_model_is_that_adapter_on_its_base(tmp_path, base):
    adapter = folder(
        tmp_path / "adapter", adapter_config={"base_model_name_or_path": base}, tokenizer={}
    )
    expected = (base, adapter, None, adapter)
    assert resolve(ModelConfig(adapter)) == resolve(ModelConfig(base, adapter)) == expected
    assert resolve(ModelConfig(base)) == (base, None, None, base)
    with pytest.raises(ValueError, match=r"is an adapter, and --adapter-path .* is another"):
        resolve(ModelConfig(adapter, adapter))
    lost = folder(tmp_path / "lost", adapter_config={"base_model_name_or_path": "/nowhere"})
    with pytest.raises(ValueError, match="an adapter of base '/nowhere', which is not here"):
        resolve(ModelConfig(lost))


def test_a_run_folder_stands_for_its_final(tmp_path, base):
    """Its own config.json holds the run's settings, not a model's."""
    folder(tmp_path / "run", config={"config": {}})
    final = folder(tmp_path / "run" / "final", adapter_config={"base_model_name_or_path": base})
    assert resolve(ModelConfig(str(tmp_path / "run")))[:2] == (base, final)
    assert resolve(ModelConfig(base, str(tmp_path / "run")))[:2] == (base, final)
    # a model that happens to have a folder of that name is itself
    folder(tmp_path / "base" / "final", config={"model_type": "llama"})
    assert resolve(ModelConfig(base)).base == base


def test_encoders_and_projectors_come_along_from_the_adapter_or_its_base(tmp_path):
    base = folder(tmp_path / "base", config={"model_type": "llama"}, media={})
    with pytest.raises(ValueError, match=r"has media\.json and no projectors"):
        resolve(ModelConfig(base))
    (tmp_path / "base" / "projectors").mkdir()
    settings = {"base_model_name_or_path": base}
    plain = folder(tmp_path / "plain", adapter_config=settings)
    seeing = folder(tmp_path / "seeing", adapter_config=settings, media={})
    (tmp_path / "seeing" / "projectors").mkdir()
    assert resolve(ModelConfig(plain)).media == base
    assert resolve(ModelConfig(seeing)).media == seeing


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no model folder at /nowhere"):
        resolve(ModelConfig("/nowhere"))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        resolve(ModelConfig(folder(tmp_path / "empty")))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        resolve(ModelConfig(str(tmp_path / "torn")))


@pytest.fixture
def hub(tmp_path, monkeypatch, door):
    """A hub's cache without network: (put a folder into it under me/NAME, run a recipe in this process)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _downloaded.cache_clear()

    def put(name, folder):
        kept = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(folder, kept / "snapshots" / "0123abcd")
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("0123abcd")

    def run(recipe, *flags, code=0):
        ended, said = door(recipe, *flags)
        assert ended == code, said
        return said

    yield put, run
    _downloaded.cache_clear()


def chats(folder):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "cup"}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 2)
    return folder / "chats.jsonl"


STEPS = ("--steps", 1, "--batch-size", 2, "--sample-records", 0)


@pytest.mark.slow
def test_encoders_and_tokenizers_may_be_names_of_the_hub(tmp_path, hub):
    put, run = hub
    put("text", builtin_encoder())
    put("tiny", tiny_folder())
    save_clip(tmp_path / "clip", whole=False)
    put("clip", tmp_path / "clip")
    save_whisper(tmp_path / "whisper")
    put("whisper", tmp_path / "whisper")
    (tmp_path / "p.jsonl").write_text('{"text": "cat"}\n')
    index = ("--passages", tmp_path / "p.jsonl", "--out", tmp_path / "index")
    run("build_index", *index, "--encoder-path", "me/text", "--hub")
    said = run("build_index", *index, "--encoder-path", "me/text", "--overwrite", code=2)
    assert "no model folder at me/text" in said and "--hub" in said
    write_pictures(tmp_path / "pictures", 4, 2)
    root = tmp_path / "pictures" / "images"
    data = ("--data", tmp_path / "pictures" / "train.jsonl", "--image-root", root, *STEPS)
    sees = ("--image-encoder", "clip", "--image-encoder-path", "me/clip", "--hub")
    run("multimodal", *data, *sees, "--out", tmp_path / "see")
    # its media.json says where the encoder is, so that nothing is named again
    run("multimodal", "--model-path", tmp_path / "see", *data, "--out", tmp_path / "on")
    put("see", tmp_path / "see" / "final")
    run("to_llava", "--model-path", "me/see", "--hub", "--out", tmp_path / "llava")
    assert "no model folder at me/see" in run(
        "to_llava", "--model-path", "me/see", "--out", tmp_path / "x", code=2
    )
    (tmp_path / "sounds").mkdir()
    write_wav(tmp_path / "sounds" / "a.wav", [0.0, 0.5] * 400)
    for name, folder in (("clip", root), ("whisper", tmp_path / "sounds")):
        encode = ("--root", folder, "--encoder", name, "--encoder-path", f"me/{name}", "--hub")
        run("preprocess_images", *encode, "--workers", 0, "--out", tmp_path / f"{name}.safetensors")
    named = ("--model-path", tiny_folder(), "--tokenizer-path", "me/tiny", "--hub")
    run("sft", *named, "--data", chats(tmp_path), *STEPS, "--out", tmp_path / "sft")


@pytest.mark.slow
def test_a_name_of_the_hub_is_a_folder_from_then_on(tmp_path, hub):
    """From a filled cache without network: to train on, to go on with an adapter, and to answer."""
    put, run = hub
    put("tiny", tiny_folder())
    named = ("--model-path", "me/tiny", "--hub", "--data", chats(tmp_path))
    run("sft", *named, *STEPS, "--adapter", "lora", "--out", tmp_path / "lora")
    on = ("--adapter-path", tmp_path / "lora" / "final")
    run("sft", *named, *on, *STEPS, "--out", tmp_path / "on")
    # what is exported says where its base is
    ask = ("--data", tmp_path / "ask.jsonl", "--max-new-tokens", 2)
    (tmp_path / "ask.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    for i, model in enumerate((("--model-path", tmp_path / "on"), (*named[:3], *on))):
        run("generate", *model, *ask, "--out", tmp_path / f"answers{i}.jsonl")
    said = run("sft", "--model-path", "me/other", "--hub", code=2).splitlines()
    assert len(said) == 1 and said[0].startswith("error: me/other is no folder, and the hub")
    said = run("sft", "--model-path", "me/tiny", code=2)
    assert "no model folder at me/tiny" in said and "--hub" in said
