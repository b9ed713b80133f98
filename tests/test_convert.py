"""What other programs pickled becomes what plain libraries and this one read; nothing in a file is run."""

import json
import pickle
import sys
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ta import __main__ as command
from ta.builtin.model_folders import tiny_folder
from ta.convert import convert, load_pickled
from ta.data.jsonl import parse_record
from ta.data.readers import read_rows
from ta.data.records import check_media
from ta.data.sources import canonical
from ta.media.projectors import Mlp, load_projector


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(tiny_folder())


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_a_model_in_pickled_shards(base, tmp_path):
    old, state = tmp_path / "old", base.state_dict()
    base.config.save_pretrained(old)
    (old / "notes.txt").write_text("kept")
    names = sorted(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, old / file)
    index = {"metadata": {}, "weight_map": {name: f for f, part in shards.items() for name in part}}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    said = convert(str(old), str(tmp_path / "new"))
    assert "model-00001-of-00002.safetensors" in said
    assert not [p for p in (tmp_path / "new").iterdir() if p.suffix == ".bin"]
    assert (tmp_path / "new" / "notes.txt").read_text() == "kept"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(again), logits(base))


def test_an_adapter(base, tmp_path):
    tuned = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "old")
    weights = load_file(tmp_path / "old" / "adapter_model.safetensors")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "adapter_model.bin")
    convert(str(tmp_path / "old"), str(tmp_path / "new"))
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder())
    again = PeftModel.from_pretrained(plain, tmp_path / "new")
    assert torch.equal(logits(again), logits(tuned))


def test_projectors_by_modality(tmp_path):
    projector = Mlp(6, 4, 8, 4)
    names = {"layers.0": "linear_1", "layers.2": "linear_2"}
    state = {
        f"image.{names[name.rsplit('.', 1)[0]]}.{name.rsplit('.', 1)[1]}": tensor
        for name, tensor in projector.state_dict().items()
    }
    torch.save(state, tmp_path / "modality_adapters.pt")
    convert(str(tmp_path / "modality_adapters.pt"), str(tmp_path / "new"))
    again = Mlp(6, 4, 8, 4)
    load_projector(again, tmp_path / "new" / "image.safetensors")
    features = torch.randn(2, 4, 6)
    assert torch.equal(again(features), projector(features))


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content", [{"a": Evil()}, [1, 2], {"a": 1}, {}, types.SimpleNamespace(a=1)]
)
def test_anything_but_tensors_is_refused_and_not_run(content, tmp_path, capsys):
    path = tmp_path / "x.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.bin"):
        load_pickled(path)
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"x\.bin"):
        load_pickled(path)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_is_answered_in_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    for words, said in {
        ("nowhere", "out"): "no such file or folder",
        ("a.pt", "empty"): "empty exists: give a new folder",
        ("empty", "out"): "nothing is to be converted",
        ("a.txt", "out"): "give a folder or a file of .bin, .pt, .pth",
        ("a.pt",): "give: ta convert FROM OUT",
    }.items():
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ta", "convert", *words])
        with pytest.raises(SystemExit, match="2"):
            command.main()
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sentencepiece_tokenizer(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    old, words = (
        tmp_path / "old",
        [f"{a} plus {b} is {a + b}" for a in range(30) for b in range(30)],
    )
    old.mkdir()
    (tmp_path / "text").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=120,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "m.model").rename(old / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", **special}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    (old / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = convert(str(old), str(tmp_path / "new"))
    assert "tokenizer.json" in said and (tmp_path / "new" / "tokenizer.model").exists()
    plain = sentencepiece.SentencePieceProcessor(str(old / "tokenizer.model"))
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    for text in words[::97]:
        assert fast.encode(text, add_special_tokens=False) == plain.encode(text)


def test_a_table_with_pictures(tmp_path):
    """The struct of bytes and path that datasets writes: records.jsonl reads, with files beside it."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    png, wav = (tmp_path / "x.png").read_bytes(), b"RIFF\0\0\0\0WAVEfmt "
    asked = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"conversations": asked, "image": [{"bytes": png, "path": "../x.png"}], "audio": None},
        {"conversations": asked, "image": [{"bytes": png, "path": None}], "audio": None},
        {"conversations": asked, "image": [{"bytes": None, "path": "y.png"}], "audio": wav},
    ]
    (tmp_path / "set").mkdir()
    table = tmp_path / "set" / "train.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), table)
    with pytest.raises(ValueError, match=r"train.parquet:1: a cell holds bytes.*ta convert .* OUT"):
        list(read_rows(str(table)))
    for i, given in enumerate((table, tmp_path / "set", tmp_path / "set" / "train")):
        said = convert(str(given), str(tmp_path / f"new{i}"))
        assert said.endswith("records.jsonl with 3 records, 2 files in media")
    records = [parse_record(raw) for _, raw in read_rows(str(tmp_path / "new0" / "records.jsonl"))]
    first, second, third = records
    (path,) = first["image"]
    assert first == second and (tmp_path / "new0" / path).read_bytes() == png
    assert (tmp_path / "new0" / third["audio"]).read_bytes() == wav
    third.pop("audio")
    assert canonical(first, check_media)[0]["messages"][0]["content"][0]["content"] == path
    assert canonical(third, check_media)[0]["messages"][0]["content"][0]["content"] == "y.png"
    parquet.write_table(pa.table({"text": ["a"], "raw": [b"?"]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet: a cell holds bytes that begin with b'\?'"):
        convert(str(tmp_path / "bad.parquet"), str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()
