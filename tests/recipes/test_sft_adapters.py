"""Every adapter trains through recipes/sft.py, exports, and answers from its folder; what cannot work is refused at the door."""

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import ta
from ta import parallel
from ta.builtin import models, tasks
from ta.builtin.model_folders import tiny_folder
from ta.chat.tokenizer import load_tokenizer
from ta.model.adapters import load_adapter, merge_adapter
from ta.model.load import load_base

KINDS = {
    "lora": ("--lora-rank", 4, "--init-tokens", "<sep>=the end"),
    "prefix": ("--virtual-tokens", 4),
    "prompt": ("--virtual-tokens", 4, "--prompt-init-text", "red cup"),
    "p-tuning": ("--virtual-tokens", 4),
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "chats.jsonl"
    tasks.write_jsonl(path, tasks.chats("train", 16))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_train_export_answer(door, data, tmp_path, kind):
    flags = (
        "--data",
        data,
        "--val-data",
        data,
        "--steps",
        2,
        "--batch-size",
        4,
        "--sample-records",
        2,
        "--sample-max-new-tokens",
        3,
        "--log-every",
        1,
    )
    code, text = door("sft", "--adapter", kind, *KINDS[kind], *flags, "--out", tmp_path / "run")
    assert code == 0, text
    losses = [
        r["loss"] for r in map(json.loads, open(tmp_path / "run" / "metrics.jsonl")) if "loss" in r
    ]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    out = tmp_path / "answers.jsonl"
    code, text = door(
        "generate",
        "--model-path",
        tmp_path / "run" / "final",
        "--data",
        data,
        "--out",
        out,
        "--max-new-tokens",
        3,
    )
    assert code == 0, text
    assert len(out.read_text().splitlines()) == 16
    code, text = door(
        "merge",
        "--model-path",
        "builtin",
        "--adapter-path",
        tmp_path / "run" / "final",
        "--out",
        tmp_path / "merged",
    )
    assert code == (0 if kind == "lora" else 2), text


def test_an_adapter_of_another_base_is_refused(door, data, tmp_path):
    models.write_tiny(
        tmp_path / "other", hidden_size=96, num_attention_heads=3, num_key_value_heads=3
    )
    flags = ("--data", data, "--steps", 1, "--batch-size", 4)
    assert door("sft", "--adapter", "lora", *flags, "--out", tmp_path / "run")[0] == 0
    code, text = door(
        "sft",
        "--model-path",
        tmp_path / "other",
        "--adapter-path",
        tmp_path / "run" / "final",
        *flags,
        "--out",
        tmp_path / "two",
    )
    assert code == 2 and "base" in text and not (tmp_path / "two").exists()


def test_ids_beyond_the_embedding_table_are_refused(door, data, tmp_path):
    models.write_tiny(tmp_path / "small", vocab_size=100)
    code, text = door(
        "sft",
        "--model-path",
        tmp_path / "small",
        "--data",
        data,
        "--steps",
        1,
        "--out",
        tmp_path / "run",
    )
    assert code == 2 and "100" in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--adapter", "prefix", "--activation-checkpointing"), "checkpointing"),
        (("--lora-rank", 4), "--lora-rank has no effect"),
        (("--resume", "--overwrite"), "one of the two"),
    ],
)
def test_what_cannot_work_is_refused(door, data, tmp_path, flags, word):
    code, text = door("sft", *flags, "--data", data, "--out", tmp_path / "run")
    assert code == 2 and word in text and not (tmp_path / "run").exists()


def test_a_quantized_base_is_refused_where_it_cannot_work(door, data, tmp_path, monkeypatch):
    import importlib.util

    flags = ("--data", data, "--out", tmp_path / "run", "--quantize", "4bit")
    code, said = door("sft", *flags)
    assert code == 2 and "give --adapter lora" in said and not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot be sharded over 2 processes" in door("sft", *flags, "--adapter", "lora")[1]
    monkeypatch.delenv("WORLD_SIZE")
    stored = tmp_path / "stored"
    shutil.copytree(tiny_folder(), stored)
    settings = json.loads((stored / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps(settings))
    # without the package; with it, because nothing of such a model trains
    said = door("sft", *flags[:4], "--model-path", stored)[1]
    assert said.startswith(f"error: {stored} ") and ("bitsandbytes" in said or "lora" in said)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in door("sft", *flags, "--adapter", "lora")[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_base_trains_an_adapter_for_the_whole_one(door, data, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="holds weights in few bits; install bitsandbytes")
    out = tmp_path / "run"
    flags = (
        "--data",
        data,
        "--adapter",
        "lora",
        "--lr",
        "1e-2",
        "--steps",
        8,
        "--batch-size",
        8,
        "--log-every",
        1,
    )
    code, said = door("sft", *flags, "--out", out, "--quantize", bits)
    losses = [row["loss"] for row in map(json.loads, open(out / "metrics.jsonl")) if "loss" in row]
    assert code == 0 and losses[-1] < losses[0] - 1, said
    base = tmp_path / "base"
    models.write_tiny(base)
    whole = load_base(ta.ModelConfig(str(base)), quantize=bits)
    whole.save_pretrained(tmp_path / "few")
    load_tokenizer(base).save_pretrained(tmp_path / "few")
    code, said = door("sft", *flags[:2], "--model-path", tmp_path / "few", "--out", tmp_path / "x")
    assert code == 2 and "few bits, which cannot be trained: give --adapter lora" in said
    with pytest.raises(ValueError, match="holds weights of few bits, to which an update cannot"):
        merge_adapter(load_adapter(whole, out / "final"))
    more = ("--model-path", base, "--adapter-path", out / "final", "--out", tmp_path / "merged")
    assert door("merge", *more)[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_an_evaluation_over_few_bits_leaves_the_gradients(bits):
    """bitsandbytes lays weights out anew for inference on some processors, without a backward pass."""
    pytest.importorskip("bitsandbytes", reason="holds weights in few bits; install bitsandbytes")
    device = parallel.pick_device()
    model = load_base(ta.ModelConfig(str(tiny_folder())), device=device, quantize=bits)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings)
    ids = torch.arange(5, 45, device=device)[None]

    def gradients():
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    for a, b in zip(before, gradients(), strict=True):
        torch.testing.assert_close(a, b)
