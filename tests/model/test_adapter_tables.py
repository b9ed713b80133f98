"""Adapters and token tables: what plain peft wrote is read, what we write plain peft reads, the logits are the same."""

import itertools

import pytest
import torch
from adapted import KINDS, NEW, base, same, train_a_step
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ta.model.adapters import (
    AdapterConfig,
    add_adapter,
    load_adapter,
    merge_adapter,
    probe_logits,
    save_adapter,
)

ROWS = 20
FOREIGN = {
    "linear": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "input": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


def foreign(folder, name, tie, grown):
    """(folder of the base, folder of the adapter that plain peft wrote, logits of both together)."""
    model = base(tie_word_embeddings=tie)
    model.save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(ROWS + 2 * grown, mean_resizing=False)
    torch.manual_seed(1)
    settings = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **FOREIGN[name])
    model = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return str(folder / "base"), folder / "adapter", probe_logits(model)


CASES = itertools.product(FOREIGN, (False, True), (False, True))


@pytest.mark.parametrize(("name", "tie", "grown"), CASES)
def test_tables_of_plain_peft(tmp_path, name, tie, grown):
    """Read, merged, exported again, and the second export read by plain peft."""
    folder, adapter, expected = foreign(tmp_path, name, tie, grown)
    if grown and not tie and name in ("head", "input"):
        # peft saves the new rows of the table that it adapts, and loses those of the other
        with pytest.raises(ValueError, match=r"2 more tokens, and their rows of .* are not in it"):
            load_adapter(AutoModelForCausalLM.from_pretrained(folder), adapter)
        return
    model = load_adapter(AutoModelForCausalLM.from_pretrained(folder), adapter, trainable=True)
    assert same(probe_logits(model), expected)
    save_adapter(model, tmp_path / "again")
    again = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "again")
    assert same(probe_logits(again), expected)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.resize_token_embeddings(ROWS + 2 * grown, mean_resizing=False)
    plain = PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    assert same(probe_logits(plain), expected)
    merged = merge_adapter(again)
    assert (probe_logits(merged) - expected).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (probe_logits(read) - expected).abs().max() < 1e-4


def test_a_cut_vocabulary_is_refused(tmp_path):
    model = base(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(ROWS - 1)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"vocabulary was cut to 19 rows, where .* has 20"):
        load_adapter(whole, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi"])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_virtual_tokens_beside_new_tokens(tmp_path, name, kind):
    """The rows stay at their mean; plain transformers and peft, whose base has room for them, give the same logits."""
    whole = base(name)
    whole.save_pretrained(tmp_path / "base")
    config = AdapterConfig(adapter=kind, virtual_tokens=3)
    model = add_adapter(base(name, NEW), config, NEW)
    rows = {
        id: model.get_base_model().get_input_embeddings().weight[id].detach().clone() for id in NEW
    }
    trained = train_a_step(model)
    assert trained and all("prompt_encoder" in parameter for parameter in trained)
    expected = probe_logits(model)
    save_adapter(model, tmp_path / "adapter")
    for folder in ("adapter", "again"):
        ours = load_adapter(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
            tmp_path / folder,
            trainable=folder == "adapter",
        )
        assert same(probe_logits(ours), expected)
        table = ours.get_base_model().get_input_embeddings().weight
        assert all(torch.equal(table[id], rows[id]) for id in NEW)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain.resize_token_embeddings(ROWS + 2, mean_resizing=False)
        plain = PeftModel.from_pretrained(plain, tmp_path / folder).eval()
        assert same(probe_logits(plain), expected)
        if folder == "adapter":
            save_adapter(ours, tmp_path / "again")
    without = add_adapter(base(name), config)
    save_adapter(without, tmp_path / "without")
    assert len(load_file(tmp_path / "without" / "adapter_model.safetensors")) == 1


def test_virtual_tokens_of_plain_peft_on_a_resized_vocabulary(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(ROWS + 2, mean_resizing=False)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert same(probe_logits(again), probe_logits(model))


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_fit_embeddings_that_are_narrower_than_layers(kind, tmp_path):
    config = AdapterConfig(adapter=kind, virtual_tokens=3)
    model = add_adapter(base("opt"), config).eval()
    train_a_step(model, ids=((3, 5, 7),))
    expected = probe_logits(model)
    save_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(base("opt"), tmp_path).eval()
    for again in (plain, load_adapter(base("opt"), tmp_path)):
        assert same(probe_logits(again), expected)
