"""How fast is the default engine? 64 prompts of mixed lengths and answers of mixed lengths, one by one, in HF batches, continuous batching, ours.

    python bench/generate.py [--vllm-python PYTHON]

Generated tokens per CPU-second of one thread, best of `--rounds`, contenders alternating in one process (vLLM in its own, start-up not counted).
Answers must be identical; a contender whose answers differ gets no ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

VOCABULARY, LONGEST_ANSWER, BATCH = 16_384, 96, 16


def workload(n: int):
    """(prompts of 8-64 tokens, stop ids that end answers after about 80 tokens, 96 at most)."""
    r = random.Random(0)
    stop = sorted(r.sample(range(VOCABULARY), VOCABULARY // 80))
    return [[r.randrange(VOCABULARY) for _ in range(r.randint(8, 64))] for _ in range(n)], stop


def build():
    """A Llama of 30 million weights whose greedy answers wander."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 6, "num_attention_heads": 14}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_key_value_heads=7, max_position_embeddings=512, bos_token_id=None, eos_token_id=None)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def one_by_one(model, prompts, stop):
    import torch

    out = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST_ANSWER,
            eos_token_id=stop,
            pad_token_id=stop[0],
            do_sample=False,
        )
        out.append(row[0, len(prompt) :].tolist())
    return out


def hf_batches(model, prompts, stop):
    """Sorted by length, left-padded."""
    from ta.slots import left_pad

    out = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = left_pad([prompts[i] for i in batch])
        inputs.pop("position_ids")
        rows = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, eos_token_id=stop, pad_token_id=stop[0], do_sample=False)
        for i, row in zip(batch, rows[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in set(stop)), len(row) - 1)
            out[i] = row[: end + 1]
    return out


def continuous(model, prompts, stop):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=LONGEST_ANSWER, eos_token_id=stop, pad_token_id=stop[0], do_sample=False)
    try:
        found = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    finally:
        model.set_attn_implementation("sdpa")
    return [list(found[key].generated_tokens) for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]


def ours(model, prompts, stop):
    from ta.builtin import tiny_tokenizer
    from ta.generate import GenerateConfig, generate

    config = GenerateConfig(max_new_tokens=LONGEST_ANSWER, skip_special_tokens=False)
    return [row[0].ids for row in generate(model, tiny_tokenizer(), prompts, config, stop)]


def vllm(folder: str, n: int) -> None:
    """Run in the environment that has vLLM: prints seconds of CPU and the answers as JSON."""
    from ta.builtin import tiny_tokenizer
    from ta.generate import GenerateConfig
    from ta.model import ModelConfig
    from ta.vllm_engine import VllmConfig, generate_vllm, open_engine

    prompts, stop = workload(n)
    engine = open_engine(ModelConfig(folder), tiny_tokenizer(), None, VllmConfig(kv_cache_gb=0.5, max_model_len=512))
    config = GenerateConfig(max_new_tokens=LONGEST_ANSWER, skip_special_tokens=False)
    generate_vllm(engine, prompts[:2], config, stop)
    best = float("inf")
    for _ in range(2):
        engine.llm.reset_prefix_cache()
        start = time.process_time()
        rows = generate_vllm(engine, prompts, config, stop)
        best = min(best, time.process_time() - start)
    print(json.dumps({"seconds": best, "answers": [row[0].ids for row in rows]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vllm-python", help="a Python that has vLLM")
    parser.add_argument("--inside-vllm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside_vllm:
        return vllm(given.inside_vllm, given.prompts)
    import torch
    import transformers

    model, (prompts, stop) = build(), workload(given.prompts)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights / 1e6:.0f}M weights, {len(prompts)} prompts, {torch.get_num_threads()} thread, load {os.getloadavg()[0]:.1f}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    contenders = {f.__name__: f for f in (one_by_one, hf_batches, continuous, ours)}
    seconds, answers = dict.fromkeys(contenders, float("inf")), {}
    ours(model, prompts[:2], stop)
    for _ in range(given.rounds):
        for name, run in contenders.items():
            start = time.process_time()
            answers[name] = run(model, prompts, stop)
            seconds[name] = min(seconds[name], time.process_time() - start)
    if given.vllm_python:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            command = [given.vllm_python, __file__, "--inside-vllm", folder, "--prompts", str(given.prompts)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]
        found = json.loads(told)
        seconds["vllm"], answers["vllm"] = found["seconds"], found["answers"]
    reference = answers["one_by_one"]
    tokens = sum(map(len, reference))
    lengths = sorted(map(len, reference))
    print(f"{tokens} tokens; answers of {lengths[0]}-{lengths[-1]}, median {lengths[len(lengths) // 2]}")
    for name, took in seconds.items():
        same = sum(a == b for a, b in zip(answers[name], reference, strict=True))
        ratio = f"{seconds['one_by_one'] / took:6.2f}x one by one" if same == len(reference) else "answers differ: no ratio"
        print(f"{name:12} {tokens / took:8.1f} tokens/CPU-s  {took:7.2f} s  {same}/{len(reference)} identical  {ratio}")


if __name__ == "__main__":
    main()
