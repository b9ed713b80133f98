"""Adapters: what trains and what stays; save, load and merge give the same logits."""

import copy
import json

import numpy as np
import pytest
import torch
from adapted import KINDS, LORA, MODELS, NEW, ROWS, base, same, train_a_step
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from ta.data.batch import lay_out
from ta.model.adapters import (
    AdapterConfig,
    adapter_labels,
    add_adapter,
    is_prompt_learning,
    load_adapter,
    logits_agree,
    merge_adapter,
    probe_logits,
    save_adapter,
)
from ta.model.language_model import wrap


@pytest.mark.parametrize("name", MODELS)
def test_lora_and_new_tokens_train_alone_and_survive_save_load_and_merge(name, tmp_path):
    model = base(name, NEW)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    untouched = probe_logits(model)
    wrapped = add_adapter(model, LORA, NEW)
    assert same(
        probe_logits(wrapped), untouched
    )  # a new adapter changes nothing, the head's bias included
    changed = train_a_step(wrapped)
    assert changed == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "trainable_tokens_delta" in n for n in changed)
    assert sum("trainable_tokens_delta" in n for n in changed) == (1 if tied else 2)
    trained, total = trainable_parameters(wrapped)
    assert (
        trained == sum(p.numel() for n, p in wrapped.named_parameters() if n in changed)
        and trained < total / 2
    )
    after = probe_logits(wrapped)
    assert not same(after, untouched)
    with wrapped.disable_adapter():
        assert same(probe_logits(wrapped), untouched)
    save_adapter(wrapped, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert max(t.shape[0] for n, t in weights.items() if "lora" not in n) == len(
        NEW
    )  # rows, not tables
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"]

    for given in (
        base(name),
        base(name, NEW),
    ):  # the base as it lies on the disk, and as a recipe has extended it
        loaded = load_adapter(given, tmp_path)
        assert same(probe_logits(loaded), after) and trainable_parameters(loaded)[0] == 0
        with loaded.disable_adapter():
            assert same(probe_logits(loaded), untouched)
    again = load_adapter(base(name), str(tmp_path), trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == changed
    assert train_a_step(again) == changed
    merged = merge_adapter(loaded)
    assert same(probe_logits(merged), after) and not any(
        "lora" in n for n, _ in merged.named_parameters()
    )
    for table, kept in (
        (m.get_input_embeddings().weight, base(name).get_input_embeddings().weight)
        for m in (merged,)
    ):
        assert torch.equal(table[:ROWS], kept) and not torch.equal(table[20], table[21])
    merged.save_pretrained(tmp_path / "merged")
    assert same(probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, AutoModelForCausalLM) for name in ("llama", "gemma", "qwen3")),
        ("llama", AutoModelForSequenceClassification),
    ],
)
def test_every_kind_trains_saves_and_loads(name, head, kind, tmp_path):
    config = AdapterConfig(
        adapter=kind, **({"lora_rank": 2} if kind == "lora" else {"virtual_tokens": 3})
    )
    settings = {"num_labels": 3} if head is AutoModelForSequenceClassification else {}
    wrapped = add_adapter(base(name, head=head, **settings), config)
    assert is_prompt_learning(wrapped) == (kind != "lora")
    changed = train_a_step(wrapped)
    assert changed == {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any("score" in n for n in changed) == bool(settings)
    after = probe_logits(wrapped)
    save_adapter(wrapped, tmp_path)
    if settings:
        assert adapter_labels(tmp_path)["num_labels"] == 3
        (tmp_path / "base.json").rename(tmp_path / "elsewhere")
        assert adapter_labels(tmp_path) == {"num_labels": 3}
        (tmp_path / "elsewhere").rename(tmp_path / "base.json")
    fresh = base(name, head=head, **settings)
    if settings:
        fresh.score.weight.data.zero_()  # the head of a classifier is made anew at each load
    loaded = load_adapter(fresh, tmp_path)
    assert same(probe_logits(loaded), after)
    again = load_adapter(base(name, head=head, **settings), tmp_path, trainable=True)
    assert same(probe_logits(again), after)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == changed
    if kind == "lora":
        assert same(probe_logits(merge_adapter(loaded)), after)
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            merge_adapter(loaded)


@pytest.mark.parametrize(
    "extra", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 3.5}, {"lora_targets": ()}]
)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_kinds_of_lora_merge(name, extra, tmp_path):
    if "lora_targets" in extra:
        extra = {
            "lora_targets": ("c_attn",) if name == "gpt2" else ("q_proj", "layers.1.mlp.up_proj")
        }
    wrapped = add_adapter(base(name, NEW), AdapterConfig(adapter="lora", lora_rank=2, **extra), NEW)
    train_a_step(wrapped)
    after = probe_logits(wrapped)
    save_adapter(wrapped, tmp_path)
    assert same(probe_logits(merge_adapter(load_adapter(base(name), tmp_path))), after)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma"])
def test_whole_tables_trained_beside_lora_merge_and_reload(name, tmp_path):
    for whole in (
        ("embed_tokens", "lm_head"),
        ("lm_head", "embed_tokens"),
        ("embed_tokens",),
        ("lm_head",),
    ):
        wrapped = add_adapter(
            base(name, NEW),
            AdapterConfig(adapter="lora", lora_rank=2, lora_modules_to_save=whole),
            NEW,
        )
        train_a_step(wrapped)
        after = probe_logits(wrapped)
        save_adapter(wrapped, tmp_path / whole[-1])
        merged = merge_adapter(load_adapter(base(name), tmp_path / whole[-1]))
        assert same(probe_logits(merged), after)
        assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == (
            name != "llama"
        )
        merged.save_pretrained(tmp_path / "merged")
        assert same(probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), after)


def trainable_parameters(model):
    """Number of weights that train, and of all weights (a tied table counts once)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(
        p.numel() for p in model.parameters()
    )


def test_adapter_weights_are_float32_on_a_bfloat16_base_and_float64_on_a_float64_one(tmp_path):
    for head in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        for kind in KINDS:
            config = AdapterConfig(
                adapter=kind, **({"lora_rank": 2} if kind == "lora" else {"virtual_tokens": 3})
            )
            wrapped = add_adapter(
                base(head=head, dtype=torch.bfloat16, new=NEW),
                config,
                NEW if kind == "lora" else (),
            )
            assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
            assert train_a_step(wrapped) == {
                n for n, p in wrapped.named_parameters() if p.requires_grad
            }
            if kind == "lora":
                save_adapter(wrapped, tmp_path)
                after = probe_logits(wrapped)
                merged = merge_adapter(wrapped, tolerance=0.05)
                assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
                exact = merge_adapter(
                    load_adapter(base(head=head), tmp_path)
                )  # a float32 copy of the same base
                assert logits_agree(probe_logits(exact), after, 0.1)
    wrapped = add_adapter(base(dtype=torch.float64), LORA)
    assert {p.dtype for p in wrapped.parameters()} == {torch.float64}


def test_full_modules_in_the_middle_of_a_bfloat16_model():
    wrapped = add_adapter(
        base(dtype=torch.bfloat16),
        AdapterConfig(adapter="lora", lora_rank=2, lora_modules_to_save=("down_proj", "norm")),
    )
    assert any("norm.modules_to_save" in n for n in train_a_step(wrapped))
    with wrapped.disable_adapter():
        assert same(probe_logits(wrapped), probe_logits(base(dtype=torch.bfloat16)))


def test_the_seed_alone_decides_the_start_and_the_global_state_stays():
    state = torch.random.get_rng_state()
    for kind in KINDS:
        config = AdapterConfig(adapter=kind)
        starts = []
        for seed in (1, 1, 2):
            torch.random.set_rng_state(state)
            model = base()
            now = torch.random.get_rng_state()
            wrapped = add_adapter(model, config, seed=seed)
            assert torch.equal(now, torch.random.get_rng_state())
            starts.append(torch.cat([p.flatten() for p in wrapped.parameters() if p.requires_grad]))
        assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_prompt_tuning_starts_from_the_text(name):
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    config = AdapterConfig(adapter="prompt", virtual_tokens=5, prompt_init_text="3 4 5")
    wrapped = add_adapter(base(name), config, tokenizer=tokenizer)
    table = base(name).get_input_embeddings()
    assert torch.equal(wrapped.get_prompt(batch_size=1)[0], table(torch.tensor([3, 4, 5, 3, 4])))
    # the virtual tokens are the text: the same as reading it
    logits = wrapped(input_ids=torch.tensor([[7, 8]])).logits
    assert same(logits, base(name)(torch.tensor([[3, 4, 5, 3, 4, 7, 8]])).logits)
    for text, count in (("", 0), ("1 2 3 4 5 6", 6)):
        with pytest.raises(ValueError, match=f"has {count} tokens for 5 virtual tokens"):
            add_adapter(
                base(name),
                AdapterConfig(adapter="prompt", virtual_tokens=5, prompt_init_text=text),
                tokenizer=tokenizer,
            )


def test_the_guard_of_the_merge_can_fail():
    ones = torch.ones(3)
    assert logits_agree(ones, ones + 1e-4) and not logits_agree(ones, ones + 1e-2)
    assert not logits_agree(ones * float("nan"), ones) and not logits_agree(ones, ones[:2])
    wrapped = add_adapter(base(), LORA)
    train_a_step(wrapped)
    next(p for n, p in wrapped.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not the base with its adapter"):
        merge_adapter(wrapped)
    wrapped = add_adapter(base(), LORA)
    train_a_step(wrapped)
    layer = next(m for m in wrapped.modules() if hasattr(m, "lora_A"))
    layer.get_delta_weight = lambda adapter: torch.zeros_like(
        layer.weight
    )  # a merge that forgets a layer
    with pytest.raises(ValueError, match="not the base with its adapter"):
        merge_adapter(wrapped)


def test_p_tuning_without_its_encoder_can_be_used_but_not_trained(tmp_path):
    save_adapter(add_adapter(base(), AdapterConfig(adapter="p-tuning", virtual_tokens=3)), tmp_path)
    (tmp_path / "prompt_encoder.safetensors").unlink()
    load_adapter(base(), tmp_path)
    with pytest.raises(ValueError, match="cannot go on training"):
        load_adapter(base(), tmp_path, trainable=True)


def test_lora_on_an_untied_head_and_on_the_embedding_merges(tmp_path):
    config = AdapterConfig(
        adapter="lora", lora_rank=2, lora_targets=("q_proj", "embed_tokens", "lm_head")
    )
    wrapped = add_adapter(base(), config)
    train_a_step(wrapped)
    after = probe_logits(wrapped)
    save_adapter(wrapped, tmp_path)
    assert (
        max(
            t.shape[0] * t.shape[1]
            for t in load_file(tmp_path / "adapter_model.safetensors").values()
        )
        < ROWS * 16
    )
    assert same(probe_logits(merge_adapter(load_adapter(base(), tmp_path))), after)


def test_lora_on_the_head_learns():
    """A new one changes no logit, so that nothing shows it but its gradient."""
    config = AdapterConfig(adapter="lora", lora_targets=("q_proj", "lm_head"))
    wrapper, note = wrap(add_adapter(base(), config))
    ids = np.arange(9)
    wrapper.loss(lay_out([ids], [np.ones(9)])).backward()
    grads = {name: p.grad for name, p in wrapper.named_parameters() if "lora_B" in name}
    assert len(grads) == 3 and all(grad.any() for grad in grads.values())
    assert "LoRA on the head" in note


def test_saving_twice_gives_the_same_bytes_and_equals_a_gathered_state(tmp_path):
    wrapped = add_adapter(base("llama", NEW), LORA, NEW)
    save_adapter(wrapped, tmp_path / "a")
    save_adapter(wrapped, tmp_path / "b", state=wrapped.state_dict())
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "new_tokens.safetensors",
    ]
    assert all(
        (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        for name in names
    )


def test_lora_leaves_out_linear_layers_of_the_model_s_own_making():
    """A router of Phi-3.5-MoE is a subclass of a linear layer that gives scores and indices."""
    config = AutoConfig.for_model(
        "phimoe",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    wrapped = add_adapter(AutoModelForCausalLM.from_config(config), LORA)
    assert wrapped.peft_config["default"].exclude_modules == {"model.layers.0.mlp.router"}
    changed = train_a_step(wrapped)
    assert changed and not any("router" in name for name in changed)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_h1"])
def test_lora_leaves_out_what_a_kernel_reads_by_itself(kind):
    """The fused kernels of state spaces take the weight of out_proj, without its adapter."""
    sizes = {
        "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
        "falcon_h1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    }.get(kind, {})
    config = AutoConfig.for_model(kind, vocab_size=97, hidden_size=64, num_hidden_layers=1, **sizes)
    wrapped = add_adapter(AutoModelForCausalLM.from_config(config), LORA)
    changed = train_a_step(wrapped)
    assert any("in_proj" in name for name in changed)
    assert not any("out_proj" in name for name, p in wrapped.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "falcon"])
def test_lora_of_a_classifier_trains_its_head_whole(kind, tmp_path):
    """Also DistilBERT's pre_classifier, which peft takes for a classifier; and Falcon's own class of linear layer is one."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    wrapped = add_adapter(copy.deepcopy(model), LORA)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    whole = {name for name in trained if "lora_" not in name}
    assert whole and all("modules_to_save" in name for name in whole)
    assert not any("lora_" in name and "classifier" in name for name in trained)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.01 * parameter.requires_grad)
        save_adapter(wrapped, tmp_path)
        want = wrapped.eval()(input_ids=ids).logits
        read = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert (want - model(input_ids=ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(read(input_ids=ids).logits, want)
        torch.testing.assert_close(load_adapter(model, tmp_path)(input_ids=ids).logits, want)


def test_an_adapter_is_read_where_transformers_would_rename_its_weights(tmp_path):
    """Laguna's own names are renamed once more by the rule for its old checkpoints."""
    if "laguna" not in CONFIG_MAPPING:
        pytest.skip("this transformers knows no Laguna")
    config = AutoConfig.for_model(
        "laguna",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    wrapped = add_adapter(copy.deepcopy(model), LORA)
    train_a_step(wrapped)
    save_adapter(wrapped, tmp_path)
    read = load_adapter(model, tmp_path)
    assert any("shared_experts" in name for name, _ in read.named_parameters())
    for (name, want), got in zip(wrapped.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(want, got), name
