"""Rollouts by a real vLLM: after each update it holds the trainer's weights, so that both agree on every token."""

import importlib.util
import json

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def write_model(folder, tied):
    """A Llama whose heads vLLM can run, with its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from ta.builtin.models import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}
    LlamaForCausalLM(tiny_config(**heads, tie_word_embeddings=tied)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_after_an_update_greedy_answers_are_the_trainers(tied, tmp_path):
    """Of all weights and of a LoRA that is merged on the way; prompts come again, so that nothing cached may be left."""
    import torch

    import ta
    from ta.generation.generate import generate
    from ta.generation.settings import GenerateConfig
    from ta.rl.engines import merged_weights, start_engine

    write_model(tmp_path, tied)
    config, compute = ta.ModelConfig(str(tmp_path), dtype="float32"), ta.ComputeConfig()
    tokenizer = ta.load_chat_tokenizer(config, ta.TokenizerConfig(), ta.ChatConfig())
    plain, lora = (
        ta.load_model(config, ta.AdapterConfig(kind), compute, tokenizer)
        for kind in ("none", "lora")
    )
    small = ta.VllmConfig(kv_cache_gb=0.06, max_model_len=200)
    engine = start_engine("vllm", small, config, plain, tokenizer, tmp_path)
    # as long as a block of the cache and more
    prompts, greedy = [[5, 6, 7, 8] * 40, [9, 10, 11] * 50] * 2, GenerateConfig(max_new_tokens=12)
    seen = []
    for model in (plain, plain, lora, lora):
        with torch.no_grad():
            for weights in (p for p in model.parameters() if p.requires_grad):
                weights.add_(0.1 * torch.randn_like(weights))
        engine.put_weights(merged_weights(model))
        wanted, got = (
            [answer for (answer,) in generate(who, tokenizer.fast, prompts, greedy, [2])]
            for who in (model, engine)
        )
        assert [answer.ids for answer in got] == [answer.ids for answer in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        seen.append(tuple(got[0].ids))
    assert len(set(seen)) == 4, "each update changes the answers"


def test_vllm_answers_with_the_weights_that_train(run, tmp_path):
    """Log-probabilities of sampled tokens differ by rounding, with a learning rate at which old weights would be far off."""
    write_model(tmp_path / "model", True)
    (tmp_path / "r.py").write_text("def f(messages, answer, record):\n    return len(answer) % 5\n")
    flags = ("--model-path", tmp_path / "model", "--rewards", f"{tmp_path}/r.py:f")
    flags += ("--engine", "vllm", "--kv-cache-gb", 0.06, "--max-model-len", 200, "--lr", 1e-2)
    flags += ("--steps", 4, "--batch-size", 4, "--num-answers", 4, "--max-new-tokens", 8)
    flags += ("--adapter", "lora", "--temperature", 0.8, "--sample-records", 2)
    run("grpo", *flags, "--out", tmp_path / "run")
    steps = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    gaps = [step["mismatch"] for step in steps if "mismatch" in step]
    assert len(gaps) == 4 and max(gaps) < 1e-5
