"""A tiny model and prepared records for tests of the loop, made in code."""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ta.data.prepare import Prepared
from ta.model.attention import register
from ta.model.language_model import wrap


def tiny(seed=0, dtype=torch.float32, **more):
    """A wrapped GPT-2 of two layers over 64 tokens, untied and without dropout: all of it computes in `dtype`, unlike Llama's float32 norms."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
    config = GPT2Config(**shape | quiet | more)
    model = GPT2LMHeadModel._from_config(config, attn_implementation=register()).to(dtype)
    return wrap(model)[0]


def prepared(n=48, seed=0, k=1, longest=30, learn=0.5) -> Prepared:
    """n random records of k sequences; from the second token on each is learned with probability `learn`, the last one always."""
    rng = np.random.default_rng(seed)
    ids, weights = [], []
    for _ in range(n):
        prompt = rng.integers(1, 64, rng.integers(1, longest // 2))
        for _ in range(k):
            x = np.concatenate([prompt, rng.integers(1, 64, rng.integers(2, longest // 2))])
            w = (rng.random(len(x)) < learn).astype(np.float32)
            w[: len(prompt)], w[-1] = 0, 1
            ids.append(x)
            weights.append(w)
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    origin = np.stack([np.zeros(n), np.arange(n) + 1], 1).astype(np.int32)
    info = {"sources": [{"path": "made.jsonl"}], "fingerprint": f"{n}-{seed}"}
    return Prepared(
        np.concatenate(ids).astype(np.int32), np.concatenate(weights), offsets, origin, {}, info, k
    )


def sft_step(model, batch):
    """Token mean: the sum of -log p over learned tokens, and their weight."""
    return model.loss(batch), batch.weights.sum(), {}
