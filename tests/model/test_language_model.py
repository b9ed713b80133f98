"""Packed equals alone, on many architectures; models that would mix documents are found out."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ta import parallel
from ta.data.batch import lay_out
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig, add_adapter
from ta.model.attention import register
from ta.model.language_model import (
    base_model,
    refused_embeddings,
    self_check,
    wrap,
)
from ta.model.load import load_base

PACKED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "granite",
    "cohere",
    "opt",
    "olmo2",
]


def small(kind, auto=AutoModelForCausalLM, **more):
    names = (
        {"n_embd": 64, "n_layer": 2, "n_head": 4}
        if kind == "gpt2"
        else {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    )
    heads = (
        {}
        if kind in ("gpt2", "gpt_neox", "opt", "bloom")
        else {"num_key_value_heads": 2, "intermediate_size": 96}
    )
    heads |= {"head_dim": 16} if "gemma" in kind or kind == "qwen3" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        **names | heads | more,
    )
    return auto.from_config(
        config, attn_implementation=register() if kind != "bloom" else None
    ).eval()


PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
}


def documents(rng, n, longest=40):
    ids = [rng.integers(3, 97, rng.integers(2, longest)) for _ in range(n)]
    return ids, [(rng.random(len(x)) < 0.6).astype(np.float32) for x in ids]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_chosen_where_it_equals_alone(kind):
    wrapper, note = wrap(small(kind))
    assert (wrapper.mode, note) == ("packed", "")
    assert self_check(wrapper) < 2e-4


def test_dropout_is_no_reason_to_pad():
    """As of a trained adapter, which is loaded to be trained on."""
    model = add_adapter(small("llama"), AdapterConfig(adapter="lora", lora_dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapper, note = wrap(model.train())
    assert (wrapper.mode, note) == ("packed", "")
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_reason_to_pad(kind, dtype):
    """Weights are held so for inference on a GPU."""
    wrapper, note = wrap(small(kind).to(dtype))
    assert (wrapper.mode, note) == ("packed", "")


def test_a_model_that_mixes_documents_is_padded_in_half_precision_too():
    assert wrap(small("bloom").bfloat16())[0].mode == "padded"


def test_a_classifier_is_padded_for_what_its_head_reads_not_for_what_it_gives():
    """A head that gives little hides what documents see of each other."""
    model = small("bloom", AutoModelForSequenceClassification, num_labels=1)
    model.score.weight.data.mul_(1e-3)
    assert wrap(model)[0].mode == "padded"


def test_a_classifier_with_a_head_in_another_place_is_refused():
    with pytest.raises(ValueError, match="FlaubertForSequenceClassification has its head in none"):
        wrap(small("flaubert", AutoModelForSequenceClassification))


def test_a_model_that_reads_padding_is_refused():
    """FNet mixes all columns of a row, CpmAnt takes right padding for left."""
    wrong = "gives other values of a document beside a longer one, as if padding were text"
    with pytest.raises(ValueError, match=f"FNetForSequenceClassification {wrong}"):
        wrap(small("fnet", AutoModelForSequenceClassification))
    with pytest.raises(ValueError, match=f"CpmAntForCausalLM {wrong}"):
        wrap(small("cpmant", dim_ff=64, dim_head=16))
    assert wrap(small("bert", AutoModelForSequenceClassification))[0].mode == "native"


@pytest.mark.parametrize(("kind", "mode"), [("gemma2", "native"), ("bloom", "padded")])
def test_models_that_would_mix_documents_are_padded(kind, mode):
    wrapper, note = wrap(small(kind))
    assert wrapper.mode == mode and "padded" in note
    ids, weights = documents(np.random.default_rng(0), 3)
    together = wrapper.logprobs(lay_out(ids, weights, packed=False))
    alone = torch.cat(
        [
            wrapper.logprobs(lay_out([x], [w], packed=False))
            for x, w in zip(ids, weights, strict=True)
        ]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_that_a_model_cannot_take_are_refused():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("openai-gpt", **sizes))
    for kind, runs in (("prompt", True), ("prefix", False)):
        adapted = add_adapter(copy.deepcopy(model), AdapterConfig(adapter=kind, virtual_tokens=3))
        if runs:
            assert wrap(adapted.eval())[0].mode == "native"
        else:
            with pytest.raises(ValueError, match="the model does not run on cpu: RuntimeError"):
                wrap(adapted.eval())


def test_a_model_that_sees_padding_in_its_own_attention_too_is_refused():
    sizes = {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    config = AutoConfig.for_model(
        "prophetnet", vocab_size=97, hidden_size=64, init_std=0.2, is_decoder=True, **sizes
    )
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="ProphetNetForCausalLM gives other values of a document"):
        wrap(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma", {}),  # embeddings are scaled
        ("opt", {"word_embed_proj_dim": 32}),
        ("roberta", {"is_decoder": True}),  # positions leave padding out
        ("gemma3n_text", PER_LAYER),
        ("gemma4_text", PER_LAYER),  # looks the ids up in the table
    ],
)
def test_a_model_that_reads_ids_beside_embeddings_can_neither_see_nor_hear(kind, more):
    model = small(kind, **more)
    for weight in model.parameters():  # scales that begin at zero would hide what a layer reads
        weight.data += 0.02 * torch.randn_like(weight)
    wrapper = wrap(model)[0]
    said = {"gemma3n_text": "reads token ids beside", "gemma4_text": "takes no embeddings"}
    why = refused_embeddings(wrapper)
    assert said[kind] in why if more is PER_LAYER else not why
    # in half precision too the ids are read where they matter
    half = wrap(model, autocast=torch.bfloat16)[0]
    assert (half.mode, half.reads_ids) == (wrapper.mode, more is PER_LAYER)
    ids, weights = documents(np.random.default_rng(0), 3)
    batch = lay_out(ids, weights, packed=half.packed)
    got, want = half.logprobs(batch), wrapper.logprobs(lay_out(ids, weights, wrapper.packed))
    assert (got - want).abs().mean() < 0.05


# a small number for each name of a size that a kind of model may know
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "attention_heads", "n_heads"), 4),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2,
    "rotary_dim": 16,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "shared_expert_intermediate_size": 32,
    "initializer_range": 0.1,
    "vocab_size": 97,
}
LOADED = {
    **dict.fromkeys(("llama", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "phimoe"), "packed"),
    **dict.fromkeys(("glm", "starcoder2", "smollm3", "exaone4", "ernie4_5", "helium"), "packed"),
    **dict.fromkeys(("stablelm", "nemotron"), "packed"),
    **dict.fromkeys(("bloom", "gptj", "falcon", "xglm", "codegen", "mpt", "openai-gpt"), "padded"),
    **dict.fromkeys(("qwen3_next", "rwkv"), "padded"),
    **dict.fromkeys(("gpt_oss", "gemma2", "big_bird"), "native"),
}


@pytest.mark.parametrize("kind", LOADED)
def test_a_loaded_model_computes_what_plain_transformers_does(kind, tmp_path):
    """Older kinds have attention of their own, and masks for it: any other would leave them without."""
    known = AutoConfig.for_model(kind)
    derived = [name for name in SIZES if isinstance(getattr(type(known), name, None), property)]
    sizes = {n: size for n, size in SIZES.items() if hasattr(known, n) and n not in derived}
    if getattr(known, "layer_types", None):
        sizes["layer_types"] = known.layer_types[-2:]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    wrapper, _ = wrap(load_base(ModelConfig(str(tmp_path))))
    assert wrapper.mode == LOADED[kind]
    ids, weights = documents(np.random.default_rng(0), 3)
    with torch.no_grad():
        got = wrapper.loss(lay_out(ids, weights, packed=wrapper.packed))
        logps = [plain(torch.tensor(x)[None]).logits[0, :-1].log_softmax(-1) for x in ids]
    picked = [p.gather(1, torch.tensor(x)[1:, None])[:, 0] for p, x in zip(logps, ids, strict=True)]
    want = -sum((p * torch.tensor(w)[1:]).sum() for p, w in zip(picked, weights, strict=True))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_attention_that_knows_no_shared_prompt_is_padded():
    """transformers' masks keep packed documents apart, but a second answer does not see its prompt."""
    model = small("llama")
    model.set_attn_implementation("sdpa")
    wrapper, note = wrap(model)
    assert wrapper.mode == "padded" and "not their shared prompt" in note


def test_the_self_check_can_fail():
    """With plain causal attention over the whole row documents see each other, and the check says so."""
    wrapper, _ = wrap(small("llama"))
    base_model(wrapper.inner).set_attn_implementation("sdpa")
    predictions = wrapper.predictions
    wrapper.predictions = lambda batch: predictions(
        batch._replace(positions=torch.arange(batch.tokens.shape[1])[None])
    )
    assert self_check(wrapper) > 2e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "stablelm"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_values_and_gradients_do_not_depend_on_company(kind, layout):
    """float64: a batch's sum and gradient equal the sum over its documents alone (windows shorter than documents too).

    Gemma's norms compute in float32 whatever the model's type, so its gradients agree to float32.
    """
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if "gemma" in kind else {"rtol": 1e-9, "atol": 1e-11}
    model = small(
        kind, **({"sliding_window": 8} if kind in ("mistral", "gemma3_text") else {})
    ).double()
    wrapper, _ = wrap(model)
    rng = np.random.default_rng(1)
    for _ in range(3):
        ids, weights = documents(rng, 5)
        together = wrapper.loss(lay_out(ids, weights, packed=layout == "packed"))
        together.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        alone = sum(wrapper.loss(lay_out([x], [w])) for x, w in zip(ids, weights, strict=True))
        alone.backward()
        torch.testing.assert_close(
            together, alone, rtol=1e-12 if kind == "llama" else 1e-6, atol=1e-10
        )
        for got, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, **tolerance)
        model.zero_grad()


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_a_shared_prompt_equals_two_whole_sequences(kind, settings):
    """In log-probabilities and gradients (these to float32, in which norms sum up what two answers send back to one prompt)."""
    wrapper, _ = wrap(small(kind, **settings).double())
    parameters = list(wrapper.parameters())
    rng = np.random.default_rng(2)
    for _ in range(10):
        prompts = [rng.integers(3, 97, rng.integers(1, 20)) for _ in range(3)]
        ids = [
            np.concatenate([p, rng.integers(3, 97, rng.integers(1, 12))])
            for p in prompts
            for _ in range(2)
        ]
        shared = [x for p in prompts for x in (0, len(p))]
        weights = [
            (np.arange(len(x)) >= len(prompts[i // 2])).astype(np.float32)
            for i, x in enumerate(ids)
        ]
        one = wrapper.logprobs(lay_out(ids, weights, shared=shared))
        two = wrapper.logprobs(lay_out(ids, weights))
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        for a, b in zip(
            *(torch.autograd.grad((x * x.detach()).sum(), parameters) for x in (one, two)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_answers_share_one_prompt(kind):
    """Each of a group equals its whole sequence, in log-probabilities and gradients; groups of one, of three and of four."""
    wrapper, _ = wrap(small(kind).double())
    parameters, rng = list(wrapper.parameters()), np.random.default_rng(5)
    prompts = [rng.integers(3, 97, n) for n in (1, 9, 14)]
    members = [2, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    ids = [np.concatenate([prompts[i], rng.integers(3, 97, rng.integers(1, 12))]) for i in members]
    firsts = [n == 0 or members[n - 1] != i for n, i in enumerate(members)]
    shared = [0 if first else len(prompts[i]) for first, i in zip(firsts, members, strict=True)]
    weights = [
        (np.arange(len(x)) >= len(prompts[i])) * 1.0 for x, i in zip(ids, members, strict=True)
    ]
    one, two = (wrapper.logprobs(lay_out(ids, weights, shared=s)) for s in (shared, ()))
    assert lay_out(ids, weights, shared=shared).tokens.shape[1] == sum(map(len, ids)) - sum(shared)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    slopes = torch.randn(len(one), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = (torch.autograd.grad((x * slopes).sum(), parameters) for x in (one, two))
    for a, b in zip(*gradients, strict=True):  # Llama's norms compute in float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scores_are_read_at_the_last_token_whatever_the_layout():
    model = small("llama", AutoModelForSequenceClassification, num_labels=3)
    wrapper, _ = wrap(model)
    ids, weights = documents(np.random.default_rng(3), 4)
    ids[1][-1] = 0  # the pad token as a last real token
    packed = wrapper.scores(lay_out(ids, weights))
    padded = wrapper.scores(lay_out(ids, weights, packed=False))
    alone = torch.cat(
        [wrapper.scores(lay_out([x], [w])) for x, w in zip(ids, weights, strict=True)]
    )
    assert packed.shape == (4, 3)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_scores_are_not_rounded_to_half_precision(held, adapted):
    """Answers whose scores differ in the third digit would tie, and none would be the best."""
    model = small("llama", AutoModelForSequenceClassification, num_labels=3).to(held)
    model = add_adapter(model, AdapterConfig(adapter="lora")) if adapted else model
    wrapper, _ = wrap(model, autocast=torch.bfloat16)
    batch = lay_out(*documents(np.random.default_rng(3), 4))
    with torch.no_grad():
        read = wrapper.hidden(batch).flatten(0, 1)[batch.ends]
        exact = read.double() @ wrapper.base.score.weight.double().T
        torch.testing.assert_close(wrapper.scores(batch).double(), exact, rtol=1e-5, atol=1e-5)
    assert read.dtype == torch.bfloat16
    wrapper.train().scores(batch).sum().backward()
    assert any(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "score" in n
    )


def test_an_empty_micro_batch_still_has_gradients():
    model = small("llama")
    wrapper, _ = wrap(model)
    loss = wrapper.loss(lay_out([], []))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.slow
def test_blocks_are_not_compiled_anew_for_other_documents(monkeypatch):
    """Two shapes compile (the first, then any); how many documents a row has, and how long they are, compiles nothing, and changes nothing."""
    from functools import partial

    from torch._dynamo.testing import CompileCounter

    from ta.parallel import compile_blocks

    wrapper, counter, rng = wrap(small("llama"))[0], CompileCounter(), np.random.default_rng(0)
    batches = [lay_out(*documents(rng, n)) for n in (4, 5, 3, 9, 7)]
    before = [wrapper.loss(batch).item() for batch in batches]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    compile_blocks(wrapper)
    after, counts = [], []
    for batch in batches:
        after.append(wrapper.loss(batch).item())
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[1] == counts[-1]
    assert after == pytest.approx(before, rel=1e-5)


def test_under_autocast_attention_runs_in_its_type(monkeypatch):
    """Rotary embeddings of a float32 hidden state widen queries and keys again; the kernels for many documents take half precision only."""
    from ta.model import attention

    seen = []
    real = attention._causal
    monkeypatch.setattr(
        attention, "_causal", lambda *x: seen.extend(t.dtype for t in x[:3]) or real(*x)
    )
    wrapper, _ = wrap(small("llama"), autocast=torch.bfloat16)
    seen.clear()
    wrapper.loss(lay_out(*documents(np.random.default_rng(0), 3)))
    assert wrapper.mode == "packed" and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "replaced"), [("llama", 5), ("qwen3", 9), ("gemma", 5), ("gpt2", 0)]
)
def test_norms_run_in_one_kernel_where_it_computes_what_they_do(kind, replaced):
    """Their names stay; values and gradients agree in float32; under autocast they keep the residual stream's type."""
    from ta.model.language_model import RootMeanSquareNorm, keep_input_dtype

    model = small(kind)
    with torch.no_grad():
        for parameter in model.parameters():  # a weight of ones would hide in which way it enters
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 9
            )
    ids = torch.arange(5, 45)[None]
    results = []
    for _ in range(2):
        loss = (model(ids).logits.log_softmax(-1)[0, :, 7]).sum()
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        names = [name for name, _ in model.named_parameters()]
        keep_input_dtype(model)
    assert names == [name for name, _ in model.named_parameters()]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    norms = [module for module in model.modules() if isinstance(module, RootMeanSquareNorm)]
    assert len(norms) == replaced
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            n(torch.ones(2, len(n.weight)).bfloat16()).dtype == torch.bfloat16 for n in norms
        )


def test_a_norm_of_another_kind_stays():
    """Without an epsilon, with a bias, with another formula, or with a gate, given or not."""
    from ta.model.language_model import keep_input_dtype

    class OddNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight

    class GatedNorm(OddNorm):
        def forward(self, x, gate=None):
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
            return x if gate is None else x * gate

    odd = OddNorm(), GatedNorm(), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8, bias=False)
    model = torch.nn.Sequential(*odd)
    before = list(model)
    keep_input_dtype(model)
    assert list(model) == before


@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_models_with_gated_norms_run_under_autocast(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    if kind == "mamba2":
        sizes |= {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}
    else:
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        sizes |= {"shared_expert_intermediate_size": 32, "linear_num_value_heads": 4}
        sizes |= {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "intermediate_size": 64}
        sizes |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention"] * 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    batch = lay_out(*documents(np.random.default_rng(0), 3), packed=False)
    plain = wrap(model)[0].loss(batch).item()
    wrapper, _ = wrap(model, autocast=torch.bfloat16)
    assert wrapper.mode == "padded" and wrapper.loss(batch).item() == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_under_autocast_widen_nothing(dora):
    """The products of an adapter run in autocast's type, and gradients stay as near to float32's as they were with peft's casts."""
    import peft

    from ta.model.language_model import LanguageModel

    def adapted():
        torch.manual_seed(1)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=dora)
        return peft.get_peft_model(small("llama"), settings)

    batch = lay_out(*documents(np.random.default_rng(0), 5))
    found = {}
    for name, make in {
        "float32": lambda: LanguageModel(adapted(), "packed"),
        "casts": lambda: LanguageModel(adapted(), "packed", torch.bfloat16),
        "spared": lambda: wrap(adapted(), autocast=torch.bfloat16)[0],
    }.items():
        wrapper, types = make(), set()
        with torch.no_grad():  # a new adapter does nothing yet
            for parameter_name, parameter in wrapper.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(2))
        inner = wrapper.inner.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"]
        inner.register_forward_pre_hook(
            lambda module, given, types=types: types.add(given[0].dtype)
        )
        wrapper.loss(batch).backward()
        gradients = [p.grad.flatten() for p in wrapper.parameters() if p.grad is not None]
        found[name] = torch.cat(gradients), types
    assert torch.bfloat16 in found["spared"][1] and found["casts"][1] == {torch.float32}
    exact = found["float32"][0]
    casts, spared = ((found[name][0] - exact).norm() / exact.norm() for name in ("casts", "spared"))
    assert spared < max(2 * casts, 0.02)


def on_one_kernel(batch):
    """The batch as it is on a GPU."""
    from ta.data.batch import cuts_of

    return batch._replace(cuts=cuts_of(batch.lengths, batch.prefixes))


@pytest.mark.parametrize("sharing", [False, True])
def test_what_runs_on_a_gpu_gives_the_losses_of_the_cpu(sharing):
    """Rows wider than their documents, bounds and one kernel call, in bfloat16: as near to float32 as documents one by one are."""
    import kernel  # noqa: F401

    wrapper, _ = wrap(small("llama"), autocast=torch.bfloat16)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, 97, 12) for _ in range(3)]
    ids = [np.concatenate([p, rng.integers(3, 97, n)]) for p in prompts for n in (5, 9, 3)]
    weights = [(np.arange(len(x)) >= 12).astype(np.float32) for x in ids]
    batch = lay_out(ids, weights, shared=[0, 12, 12] * 3 if sharing else ())
    results = []
    for given, autocast in (
        (batch, None),
        (batch, torch.bfloat16),
        (on_one_kernel(batch), torch.bfloat16),
    ):
        wrapper.autocast = autocast
        wrapper.zero_grad()
        loss = wrapper.loss(given)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in wrapper.parameters() if p.grad is not None])
        results.append((loss.item(), gradient, wrapper.hidden(given).shape))
    exact, plain, ours = results
    assert ours[2] == exact[2] == (1, *batch.tokens.shape[1:], 64)
    assert ours[0] == pytest.approx(exact[0], rel=0.02)
    error, usual = ((x[1] - exact[1]).norm() / exact[1].norm() for x in (ours, plain))
    assert error < max(1.5 * usual, 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "recomputed"])
def test_all_blocks_and_batches_share_one_compiled_graph(kind, monkeypatch):
    """Twelve layers in whole graphs: one for training, one without gradients, none for generation, whatever the documents are."""
    from functools import partial

    import kernel  # noqa: F401
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama", vocab_size=97, num_hidden_layers=12, num_key_value_heads=2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
    if kind == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    wrapper, _ = wrap(model, autocast=torch.bfloat16)
    parallel.frozen_to_bfloat16(wrapper)
    plain = [block.forward for block in parallel.blocks(wrapper)]
    parallel.compile_blocks(wrapper)
    compiled = [block.forward for block in parallel.blocks(wrapper)]
    rng, counts = np.random.default_rng(0), []
    for lengths in ((11, 7), (300, 20, 5), (9, 9, 9, 3), (40,), (200, 100), (700, 3), (12,) * 80):
        ids = [rng.integers(3, 97, n) for n in lengths]
        batch = on_one_kernel(lay_out(ids, [np.ones(n, np.float32) for n in lengths]))
        gradients = []
        for forwards in (plain, compiled):
            for block, forward in zip(parallel.blocks(wrapper), forwards, strict=True):
                block.forward = forward
            if kind == "recomputed":
                parallel.checkpoint_activations(wrapper)
            wrapper.train()
            wrapper.zero_grad()
            wrapper.loss(batch).backward()
            found = [p.grad.flatten() for p in wrapper.parameters() if p.grad is not None]
            gradients.append(torch.cat(found))
        assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
        wrapper.eval()
        with torch.no_grad():
            wrapper.loss(batch)
            base_model(wrapper.inner).set_attn_implementation("sdpa")
            wrapper.inner.generate(
                torch.from_numpy(ids[0])[None], max_new_tokens=2, do_sample=False
            )
            base_model(wrapper.inner).set_attn_implementation("ta")
        counts.append(counter.frame_count)
    # the first is traced again once its constants are known; before the first adapter nothing
    # asks for gradients, so that its block differs
    assert counts[0] == counts[-1] <= (4 if kind == "lora" else 3)


def test_kept_products_are_not_computed_again():
    """Selective checkpointing: the gradients of plain training, and as many products and attentions; without it more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            heavy = "mm." in name or ("attention" in name and "backward" not in name)
            self.calls = getattr(self, "calls", 0) + heavy
            return func(*args, **(kwargs or {}))

    ids = [np.arange(3, 3 + n) for n in (11, 7)]
    batch = lay_out(ids, [np.ones(len(x), np.float32) for x in ids])
    found = {}
    for kind in ("plain", "kept", "again"):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        config = AutoConfig.for_model("llama", vocab_size=64, num_hidden_layers=2, **sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register())
        wrapper, _ = wrap(model)
        if kind != "plain":
            parallel.checkpoint_activations(wrapper, keep_products=kind == "kept")
        wrapper.train()
        with Counted() as counted:
            wrapper.loss(batch).backward()
        found[kind] = counted.calls, [p.grad for p in wrapper.parameters()]
    assert found["plain"][0] == found["kept"][0] < found["again"][0]
    for kind in ("kept", "again"):
        for a, b in zip(found["plain"][1], found[kind][1], strict=True):
            assert torch.equal(a, b)


def test_a_model_that_runs_in_no_way_is_refused_in_a_line():
    """Not taken for one that needs its own attention, whose first pass would fail in training."""
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register())

    def broken(*args, **kwargs):
        raise RuntimeError("a shape that no kernel takes\nand more")

    model.model.layers[0].mlp.forward = broken
    with pytest.raises(
        ValueError, match=r"^the model does not run on cpu: RuntimeError: a shape that"
    ):
        wrap(model)
