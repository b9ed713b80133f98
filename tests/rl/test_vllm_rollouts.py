"""Rollouts by a real vLLM: after each update it holds the trainer's weights, so that both agree on every token."""

import importlib.util
import json

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize("more", [(), ("--adapter", "lora", "--temperature", 0.8)])
def test_vllm_answers_with_the_weights_that_train(run, tmp_path, more):
    """Log-probabilities of sampled tokens differ by rounding, with a learning rate at which old weights would be far off."""
    import torch
    from transformers import LlamaForCausalLM

    from ta.builtin.models import tiny_config, tiny_tokenizer

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 64}
    model = LlamaForCausalLM(tiny_config(**heads, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "r.py").write_text("def f(messages, answer, record):\n    return len(answer) % 5\n")
    flags = ("--model-path", tmp_path / "model", "--rewards", f"{tmp_path}/r.py:f")
    flags += ("--engine", "vllm", "--kv-cache-gb", 0.06, "--max-model-len", 200, "--lr", 1e-2)
    flags += ("--steps", 4, "--batch-size", 4, "--num-answers", 4, "--max-new-tokens", 8)
    run("grpo", *flags, "--sample-records", 2, "--out", tmp_path / "run", *more)
    steps = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
    gaps = [step["mismatch"] for step in steps if "mismatch" in step]
    assert len(gaps) == 4 and max(gaps) < 1e-5


def test_a_tied_head_is_refused(run, tmp_path):
    from ta.builtin.models import write_tiny

    write_tiny(tmp_path / "model")
    flags = ("--model-path", tmp_path / "model", "--engine", "vllm", "--out", tmp_path / "run")
    assert "its table of embeddings" in run("grpo", *flags, code=2).stderr
