"""Exports appear whole or not at all, and in as many files as their size asks for."""

import json
import os
import shutil
import stat

import pytest
import torch
from conftest import together
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaConfig

from ta.builtin import models
from ta.builtin.model_folders import tiny_folder
from ta.chat.template import ChatConfig, explicit_template, export_template
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer, load_tokenizer
from ta.folders import ModelConfig
from ta.model import export
from ta.model.adapters import AdapterConfig
from ta.model.language_model import wrap
from ta.model.load import ComputeConfig, load_model
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


def base_folder(path, dtype=torch.float32, template=None, **settings):
    """The built-in model's folder with other settings, as transformers writes it."""
    models.tiny_model(**settings).to(dtype).save_pretrained(path)
    fast = load_tokenizer(tiny_folder())
    fast.chat_template = template or fast.chat_template
    fast.save_pretrained(path)
    return path


def opened(path, **compute):
    config = ModelConfig(model_path=str(path))
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
    return load_model(config, AdapterConfig(), ComputeConfig(**compute), tokenizer), tokenizer


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [None, "float16", "float32"])
def test_weights_have_the_dtype_of_the_base_or_the_one_asked(tmp_path, capsys, base, asked):
    model, tokenizer = opened(base_folder(tmp_path / "base", base), export_dtype=asked)
    want, before = getattr(torch, asked or "", base), next(model.parameters()).clone()
    # the rounding is said before training
    assert ("the export is in" in capsys.readouterr().err) == (want != torch.float32)
    export.export(model, tokenizer, tmp_path / "final")
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {want}
    assert stored.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert torch.equal(next(model.parameters()), before) and before.dtype == torch.float32
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    assert read.dtype == want == export.stored_dtype(tmp_path / "final")
    state = {n: t.to(want) for n, t in model.inner.state_dict().items()}
    assert all(torch.equal(t, state[n]) for n, t in read.state_dict().items())


def test_an_adapter_takes_no_dtype():
    config = ModelConfig()
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
    with pytest.raises(ValueError, match="--export-dtype bfloat16 with an adapter"):
        compute = ComputeConfig(export_dtype="bfloat16")
        load_model(config, AdapterConfig(adapter="lora"), compute, tokenizer)


def test_the_stored_dtype_is_that_of_the_config_else_of_the_tensors(tmp_path):
    base_folder(tmp_path, torch.bfloat16)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for change, want in (
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": "float64"}, torch.float64),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": None}, torch.bfloat16),
    ):
        file.write_text(json.dumps(settings | change))
        assert export.stored_dtype(tmp_path) == want, change


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


def for_older(config_class, settings, folder):
    export.write_for_older(config_class, settings, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("kind", "rope", "older"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_type": "default"},
            {"rope_theta": 5e5, "rope_scaling": None},
        ),
        ("llama", {"rope_theta": 5e5, **SCALED}, {"rope_theta": 5e5, "rope_scaling": SCALED}),
        (
            "phi",
            {"rope_theta": 5e3, "rope_type": "default", "partial_rotary_factor": 0.4},
            {"rope_theta": 5e3, "partial_rotary_factor": 0.4},
        ),
        (
            "gpt_neox",
            {"rope_theta": 5e3, "rope_type": "default", "partial_rotary_factor": 0.4},
            {"rotary_emb_base": 5e3, "rotary_pct": 0.4},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "modernbert",
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            {"global_rope_theta": 1e6, "local_rope_theta": 1e3},
        ),
        ("gpt2", None, {"rope_theta": None, "rope_scaling": None}),
    ],
)
def test_rotary_positions_stand_where_transformers_4_looks(kind, rope, older, tmp_path):
    config = AutoConfig.for_model(kind, **({"rope_parameters": rope} if rope else {}))
    settings = json.loads(config.to_json_string(use_diff=False))
    written = for_older(type(config), settings, tmp_path)
    assert {key: written.get(key) for key in older} == older
    read = AutoConfig.from_pretrained(tmp_path)
    assert getattr(read, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    # and inside another config
    outer = {"model_type": "llava", "text_config": settings}
    if rope and kind == "llama":
        inner = for_older(LlavaConfig, outer, tmp_path)
        assert inner["text_config"] == written and inner["model_type"] == "llava"


@pytest.mark.parametrize("kind", ["granitemoehybrid", "nemotron_h"])
def test_a_config_with_infinity_in_it_is_written(kind, tmp_path):
    """transformers writes it as an object of its own form."""
    config = AutoConfig.for_model(kind)
    assert config.time_step_limit[1] == float("inf")
    config.save_pretrained(tmp_path)
    for_older(type(config), json.loads((tmp_path / "config.json").read_text()), tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.to_diff_dict() == config.to_diff_dict()


ROLES = (
    "{% for m in messages %}{{ HEAD + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ASK }}{% endif %}"
)


def roles(head, ask):
    return ROLES.replace("HEAD", head).replace("ASK", ask)


@pytest.mark.parametrize(
    ("template", "ids", "strings", "said"),
    [
        (None, ["<|im_end|>"], [], ""),
        # nothing after an answer, and the next message begins with a token, or with text
        (
            roles("'<|im_start|>' + m['role'] + ' '", "'<|im_start|>assistant '"),
            ["<|im_start|>", "<|im_end|>"],
            [],
            "never learns to stop: generation stops where the next message begins, at '<|im_start|>'",
        ),
        (
            roles("m['role'] + ': '", "'assistant: '"),
            ["<|im_end|>"],
            ["user:"],
            "never learns to stop: generation stops where the next message begins, at 'user:'",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n##\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            ["<|im_end|>"],
            ["\n##\n"],
            r"ends answers with the text '\n##\n' and no token",
        ),
    ],
)
def test_a_template_that_teaches_no_end_is_said_and_stopped(
    tmp_path, capsys, template, ids, strings, said
):
    model, tokenizer = opened(base_folder(tmp_path / "base", template=template))
    printed = capsys.readouterr().err
    assert said in printed and ("note: the chat template" in printed) == bool(said)
    # the end tokens of the base's generation config are kept and used
    want = sorted(tokenizer.fast.convert_tokens_to_ids(ids))
    assert (tokenizer.stop_ids, tokenizer.stop_strings) == (want, strings)
    export.export(model, tokenizer, tmp_path / "final")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config
    assert (read.eos_token_id, read.stop_strings) == (want, strings or None)
    # a run that starts from there knows them too
    config = ModelConfig(model_path=str(tmp_path / "final"))
    again = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
    assert (again.stop_ids, again.stop_strings) == (want, strings)
    # texts belong to a template: with another one they are gone
    chat = ChatConfig(prefix_template="{role}\n", suffix_template="<|im_end|>")
    assert load_chat_tokenizer(config, TokenizerConfig(), chat).stop_strings == []


def test_an_export_that_would_be_misread_is_refused_before_step_1(door, tmp_path):
    """The class of the model's type, which transformers 5 takes whatever is named, knows no words."""
    base_folder(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    fast = load_tokenizer(str(tmp_path / "base"))
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save_pretrained(tmp_path / "base")
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    model = AutoConfig.for_model(**config)
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path / "base")
    flags = ("--model-path", tmp_path / "base", "--out", tmp_path / "run", "--steps", 1)
    code, text = door("sft", *flags)
    assert code == 2 and "misreads the tokenizer.json" in text, text
    assert not (tmp_path / "run").exists()
    # an adapter's folder holds no config.json
    assert door("sft", *flags, "--adapter", "lora", "--dry-run")[0] == 0


def test_a_disk_without_room_is_said_before_step_1(door, tmp_path, monkeypatch):
    free = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", free)
    code, text = door("sft", "--out", tmp_path / "new" / "run", "--steps", 1)
    assert code == 2 and "GB are needed on its disk, which has 0.001 GB" in text, text
    assert not (tmp_path / "new").exists()


def test_a_sharded_model_is_exported_in_the_dtype_of_the_base(forked, tmp_path):
    base_folder(tmp_path / "base", torch.bfloat16)
    flags = ("--model-path", tmp_path / "base", "--steps", 1, "--sample-records", 0)
    said = forked("sft", *flags, "--out", tmp_path / "run", processes=2)
    assert said.count("the export is in bfloat16") == 1
    final = tmp_path / "run" / "final"
    stored = load_file(final / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(final, dtype="auto").dtype == torch.bfloat16


def test_positions_that_can_stand_in_one_place_alone_are_written_there(tmp_path):
    """Of Gemma 4, which transformers 4 does not know."""
    config = AutoConfig.for_model(
        "gemma4_text",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=20,
        vocab_size_per_layer_input=20,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    export.save_model(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
