"""How fast is the default engine? 64 prompts of mixed lengths, answers of mixed lengths.

    python bench/generate.py [--peer-python PYTHON]      (of an environment that has vLLM)

transformers one by one, in sorted batches, with its continuous batching, ours, and vLLM; all must
give the same tokens. Generated tokens per CPU-second of one thread, start-up not counted;
`identical` counts answers that equal those of one by one.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

try:
    from harness import compare, parser, read
except ImportError:
    from bench.harness import compare, parser, read

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
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 448,
        "intermediate_size": 1216,
        "num_hidden_layers": 6,
        "num_attention_heads": 14,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            num_key_value_heads=7,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=None,
        )
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
    from ta.generation.slot_engine import left_pad

    out = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = left_pad([prompts[i] for i in batch])
        inputs.pop("position_ids")
        rows = model.generate(
            **inputs,
            max_new_tokens=LONGEST_ANSWER,
            eos_token_id=stop,
            pad_token_id=stop[0],
            do_sample=False,
        )
        for i, row in zip(batch, rows[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((k for k, token in enumerate(row) if token in set(stop)), len(row) - 1)
            out[i] = row[: end + 1]
    return out


def continuous(model, prompts, stop):
    """With the cache that these prompts need; by default it fills the memory with zeros first."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    cache = ContinuousBatchingConfig(
        page_size=16, num_blocks=1024, max_batch_tokens=512, use_async_batching=False
    )
    config = GenerationConfig(
        max_new_tokens=LONGEST_ANSWER, eos_token_id=stop, pad_token_id=stop[0], do_sample=False
    )
    try:
        found = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=cache, progress_bar=False
        )
    finally:
        model.set_attn_implementation("sdpa")
    return [
        list(found[key].generated_tokens)
        for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))
    ]


def ours(model, prompts, stop):
    from ta.builtin.models import tiny_tokenizer
    from ta.generation.generate import generate
    from ta.generation.settings import GenerateConfig

    config = GenerateConfig(max_new_tokens=LONGEST_ANSWER, skip_special_tokens=False)
    return [row[0].ids for row in generate(model, tiny_tokenizer(), prompts, config, stop)]


def vllm(model):
    """vLLM started on the model: its run."""
    from ta.builtin.models import tiny_tokenizer
    from ta.folders import ModelConfig
    from ta.generation.settings import GenerateConfig
    from ta.generation.vllm_engine import VllmConfig, generate_vllm, start_vllm

    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = start_vllm(
            ModelConfig(folder),
            tiny_tokenizer(),
            VllmConfig(kv_cache_gb=0.5, max_model_len=512),
        )
    config = GenerateConfig(max_new_tokens=LONGEST_ANSWER, skip_special_tokens=False)

    def run(_, prompts, stop):
        engine.llm.reset_prefix_cache()
        return [row[0].ids for row in generate_vllm(engine, prompts, config, stop)]

    return run


def measured(name: str, flags: argparse.Namespace) -> dict[str, float]:
    """Figures of one contender; the first one's answers are what the others are compared with."""
    import torch

    torch.set_num_threads(flags.threads)
    model, (prompts, stop) = build(), workload(flags.prompts)
    run = vllm(model) if name == "vllm" else CONTENDERS[name]
    run(model, prompts[:2], stop)
    start = time.process_time()
    answers = run(model, prompts, stop)
    seconds = time.process_time() - start
    if name == "one_by_one":
        Path(flags.answers).write_text(json.dumps(answers))
    same = sum(
        a == b for a, b in zip(answers, json.loads(Path(flags.answers).read_text()), strict=True)
    )
    return {
        "tokens_a_cpu_s": sum(map(len, answers)) / seconds,
        "identical": same,
        "tokens": sum(map(len, answers)),
    }


CONTENDERS = {f.__name__: f for f in (one_by_one, hf_batches, continuous, ours, vllm)}

if __name__ == "__main__":
    flags = parser(__doc__, 2)
    flags.add_argument("--prompts", type=int, default=64)
    flags.add_argument("--answers", help=argparse.SUPPRESS)
    given = read(flags, prompts=3)
    with tempfile.TemporaryDirectory() as folder:
        if not given.answers:
            sys.argv += ["--answers", str(Path(folder) / "answers.json")]
        compare(
            {name: partial(measured, name) for name in CONTENDERS},
            given,
            "one_by_one",
            peers=["vllm"],
        )
