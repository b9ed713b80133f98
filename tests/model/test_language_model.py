"""Packed equals alone, on many architectures; models that would mix documents are found out."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ta.data.batch import lay_out
from ta.model.attention import register
from ta.model.language_model import base_model, self_check, wrap

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
        **names,
        **heads,
        **more,
    )
    return auto.from_config(
        config, attn_implementation=register() if kind != "bloom" else None
    ).eval()


def documents(rng, n, longest=40):
    ids = [rng.integers(3, 97, rng.integers(2, longest)) for _ in range(n)]
    return ids, [(rng.random(len(x)) < 0.6).astype(np.float32) for x in ids]


@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_chosen_where_it_equals_alone(kind):
    wrapper, note = wrap(small(kind))
    assert (wrapper.mode, note) == ("packed", "")
    assert self_check(wrapper) < 2e-4


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


def test_the_self_check_can_fail():
    """With plain causal attention over the whole row documents see each other, and the check says so."""
    wrapper, _ = wrap(small("llama"))
    base_model(wrapper.inner).set_attn_implementation("sdpa")
    logprobs = wrapper.logprobs
    wrapper.logprobs = lambda batch: logprobs(
        batch._replace(positions=torch.arange(batch.tokens.shape[1])[None])
    )
    assert self_check(wrapper) > 2e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_values_and_gradients_do_not_depend_on_company(kind, layout):
    """float64: a batch's sum and gradient equal the sum over its documents alone (windows shorter than documents too).

    Gemma's norms compute in float32 whatever the model's type, so its gradients agree to float32.
    """
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if "gemma" in kind else {"rtol": 1e-9, "atol": 1e-11}
    model = small(kind, **({"sliding_window": 8} if kind != "llama" else {})).double()
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
