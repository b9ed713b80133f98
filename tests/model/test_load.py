"""Models from folders: what a run left is where the next one starts, and every tensor is accounted for."""

import json
import random
import shutil

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import prepared, tiny
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ta.builtin.model_folders import builtin_encoder, tiny_folder
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.batch import lay_out
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig
from ta.model.export import export
from ta.model.load import (
    ComputeConfig,
    cast_parameters,
    check_context,
    load_base,
    load_for_inference,
    load_model,
)
from ta.rag.embedding import open_encoder
from ta.rag.embedding_settings import EncoderConfig, embedding_settings, save_embedding_settings


def opened(config, adapter=None, tokens=(), **more):
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(init_tokens=tokens), ChatConfig())
    return load_model(
        config, adapter or AdapterConfig(), ComputeConfig(), tokenizer, **more
    ), tokenizer


def batch():
    ids = torch.arange(5, 25).numpy()
    return lay_out([ids], [torch.ones(20).numpy()])


def test_an_adapter_folder_goes_on_with_its_adapter(tmp_path):
    """With rows of new tokens, which nobody names again; as --model-path and as --adapter-path."""
    model, tokenizer = opened(ModelConfig(), AdapterConfig(adapter="lora"), ("<q>=a",))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    export(model, tokenizer, tmp_path / "final")
    ids = tokenizer.vocabulary.special["<q>"]
    seqs = batch()
    seqs = seqs._replace(tokens=seqs.tokens.clone().fill_(ids))
    expected = model.eval().logprobs(seqs)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for config in (
        ModelConfig(str(tmp_path / "final")),
        ModelConfig("builtin", str(tmp_path / "final")),
    ):
        again, _ = opened(config)
        assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
        assert torch.equal(again.eval().logprobs(seqs), expected)
    with pytest.raises(ValueError, match="leave --adapter out to go on with that one"):
        opened(ModelConfig(str(tmp_path / "final")), AdapterConfig(adapter="lora"))


@pytest.mark.parametrize("fault", ["missing", "renamed"])
def test_tensors_that_do_not_fit_are_named(tmp_path, fault):
    load_for_inference(ModelConfig()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if fault == "renamed":
        tensors[f"base.{name}"] = tensor
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 tensors \({name}\)"):
        load_for_inference(ModelConfig(str(tmp_path)))
    tensors[name] = tensor.clone()
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="without a place for them"):
        load_for_inference(ModelConfig(str(tmp_path)))


def test_a_model_without_a_table_of_tokens_is_refused(tmp_path):
    """CANINE hashes characters."""
    config = AutoConfig.for_model(
        "canine", hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="CanineForSequenceClassification, which has no table of"):
        load_base(ModelConfig(str(tmp_path)), "seq_cls")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def lie(file):
    """The header claims more numbers than the file has."""
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    tensor = header["model.norm.weight"]
    tensor["shape"] = [2 * tensor["shape"][0]]
    text = json.dumps(header).encode()
    rest = file.read_bytes()[8 + size :]
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def claim_much(file):
    file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def pickle(file):
    torch.save({"a": torch.zeros(2)}, file)


def pickle_alone(file):
    torch.save({"a": torch.zeros(2)}, file.with_name("pytorch_model.bin"))
    file.unlink()


def widen(file):
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])
    save_file(tensors, file, {"format": "pt"})


def mistype(file):
    config = json.loads(file.with_name("config.json").read_text())
    file.with_name("config.json").write_text(json.dumps(config | {"hidden_size": "abc"}))


def tear_index(file):
    file.unlink()
    file.with_name(f"{file.name}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')


DAMAGES = {
    truncate: "not fully covered",
    lie: "invalid shape",
    claim_much: "header too large",
    pickle: "header too large",
    pickle_alone: "no file named model",
    widen: r"of another shape, 1 tensors .*up_proj.weight is \(449, 160\) there and \(448, 160\)",
    mistype: "'hidden_size' expected int",
    tear_index: "KeyError",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_one_line(tmp_path, damage):
    shutil.copytree(tiny_folder(), tmp_path / "m")
    damage(tmp_path / "m" / "model.safetensors")
    for task in ("causal", "seq_cls", "encoder"):
        with pytest.raises(ValueError, match=DAMAGES[damage]) as error:
            load_base(ModelConfig(str(tmp_path / "m")), task)
        assert str(tmp_path / "m") in str(error.value) and "\n" not in str(error.value)


KEYS = {  # what stands in the JSON files of a folder and is read, here or by a library
    "base": {
        "config.json": "architectures id2label num_labels dtype hidden_size hidden_act vocab_size",
        "generation_config.json": "eos_token_id stop_strings num_beams temperature pad_token_id",
        "tokenizer_config.json": "tokenizer_class content_tokens eos_token model_max_length",
        "special_tokens_map.json": "pad_token additional_special_tokens",
    },
    "adapter": {
        "adapter_config.json": "peft_type r target_modules modules_to_save task_type "
        "base_model_name_or_path alora_invocation_tokens trainable_token_indices",
        "base.json": "name task vocabulary sample",
    },
    "encoder": {
        "config.json": "hidden_size hidden_act max_position_embeddings dtype vocab_size",
        "tokenizer_config.json": "model_max_length tokenizer_class pad_token",
        "sentence_bert_config.json": "max_seq_length do_lower_case modality_config model_args",
        "config_sentence_transformers.json": "prompts similarity_fn_name truncate_dim",
        "1_Pooling/config.json": "pooling_mode include_prompt",
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of KEYS."""
    folder = tmp_path_factory.mktemp("folders")
    shutil.copytree(tiny_folder(), folder / "base")
    export(*opened(ModelConfig(), AdapterConfig(adapter="lora")), folder / "adapter")
    shutil.copytree(builtin_encoder(), folder / "encoder")
    settings = embedding_settings(str(folder / "encoder"), EncoderConfig())
    save_embedding_settings(folder / "encoder", settings)
    return folder


def read_all(kind, folder):
    """What a command reads of a folder."""
    if kind == "encoder":
        open_encoder(str(folder), embedding_settings(str(folder), EncoderConfig()))
    else:
        opened(ModelConfig(str(folder)))


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in KEYS for file in KEYS[kind]])
def test_values_of_wrong_types_are_one_line(folders, kind, file):
    """Any value at any key loads or is refused; one is also put in place of the whole file."""
    path, draw = folders / kind / file, random.Random(f"{kind} {file}")
    whole = path.read_text() if path.exists() else None
    values = ["abc", 7, -1, 1.5, [], ["a"], [1], {}, {"a": 1}, True]
    cases = [("", draw.choice(["abc", 7, ["a"]]))]
    cases += [(key, value) for key in KEYS[kind][file].split() for value in draw.sample(values, 2)]
    refused = 0
    for key, value in cases:
        path.write_text(json.dumps(json.loads(whole or "{}") | {key: value} if key else value))
        try:
            read_all(kind, folders / kind)
        except ValueError as error:
            refused += 1
            said = str(error)
            assert any(words in said for words in (str(folders / kind), "the tokenizer has ids"))
            assert "\n" not in said and len(said) < 500, (key, value)
    path.unlink() if whole is None else path.write_text(whole)
    assert refused
    read_all(kind, folders / kind)


def test_arguments_that_transformers_refuses_are_one_line():
    for argument, words in (
        ("attn_implementation=flash_attention_2", "FlashAttention2"),
        ("attn_implementation=nonesuch", "nonesuch"),
        ("nonsense=3", "nonsense"),
        ("dtype=float64", "give --dtype instead"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_base(ModelConfig(str(tiny_folder()), model_args=(argument,)))
        assert "\n" not in str(error.value)


def test_a_generation_config_that_could_not_be_exported_is_mended_or_refused(tmp_path, capsys):
    shutil.copytree(tiny_folder(), tmp_path / "base")
    settings = {"do_sample": False, "temperature": 0.6, "top_k": 20, "length_penalty": 2.0}
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(settings | {"eos_token_id": 2, "pad_token_id": 0}))
    config = ModelConfig(str(tmp_path / "base"))
    model = load_base(config)
    assert "temperature, top_k, length_penalty of" in capsys.readouterr().err
    model.generation_config.save_pretrained(tmp_path)
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "pad_token_id": 0}))
    assert load_base(config).generation_config.temperature == 0.6  # sampling keeps its settings
    assert "note" not in capsys.readouterr().err
    path.write_text(json.dumps({"pad_token_id": -1}))
    with pytest.raises(ValueError, match=r"generation_config\.json does not load.*pad_token_id"):
        load_base(config)


@pytest.mark.parametrize("k", [1, 2])
def test_a_sequence_longer_than_the_model_takes_is_named_before_the_first_step(k):
    model, data = tiny(), prepared(n=12, k=k)
    sizes = np.diff(data.offsets)
    check_context(model, data, None)
    model.inner.config.max_position_embeddings = int(sizes.max())
    check_context(model, data)
    model.inner.config.max_position_embeddings -= 1
    record = int(sizes.argmax()) // k + 1
    words = f"made.jsonl:{record}, has {sizes.max()}: give --max-tokens {sizes.max() - 1} "
    for both in ((data, None), (prepared(n=4, longest=8), data)):
        with pytest.raises(ValueError, match=words):
            check_context(model, *both)


def test_a_new_head_is_told_and_drawn_from_the_seed():
    heads = [
        opened(ModelConfig(), num_labels=3, seed=seed)[0].inner.score.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert "the head of 3 scores is new" in opened(ModelConfig(), num_labels=3)[0].note
    assert opened(ModelConfig())[0].note == ""


def test_a_cast_leaves_rotary_frequencies_alone():
    model = load_base(ModelConfig(str(tiny_folder())))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cast_parameters(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert before and all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert any(b.dtype == torch.float32 for _, b in model.named_buffers())


def test_inference_reads_in_its_own_type(tmp_path, monkeypatch):
    """Weights are never float32 on the way to bfloat16, and the same as when they are rounded after; an adapter is merged first."""
    from transformers import PreTrainedModel

    from ta.model import load

    folder = tiny_folder()
    asked = []
    kept = PreTrainedModel.from_pretrained.__func__

    def noted(cls, *args, dtype=None, **more):
        asked.append(dtype)
        return kept(cls, *args, dtype=dtype, **more)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    half = load.load_for_inference(ModelConfig(str(folder), dtype="bfloat16"))
    rounded = load.load_base(ModelConfig(str(folder)))
    cast_parameters(rounded, torch.bfloat16)
    assert asked == [torch.bfloat16, torch.float32]
    buffers = zip(half.named_buffers(), rounded.buffers(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), b in buffers)
    for (name, a), b in zip(half.named_parameters(), rounded.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b), name


def test_an_adapter_of_a_model_that_runs_with_its_own_attention_is_merged(tmp_path):
    """Gemma 2 caps what attention sees, which ours does not."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes))
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    settings = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ours = load_for_inference(ModelConfig(str(tmp_path / "adapter")))
    ours.set_attn_implementation("eager")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
