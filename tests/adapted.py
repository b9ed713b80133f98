"""Bases of several architectures made in code, and one training step, for the tests of adapters."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ta.chat.tokenizer import NewToken
from ta.model.adapters import AdapterConfig
from ta.model.new_rows import set_rows

ROWS = 20
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": ROWS,
    "intermediate_size": 24,
    "pad_token_id": 0,
}
GATED = {"num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "llama": {**SMALL, **GATED},
    "llama-tied": {**SMALL, **GATED, "tie_word_embeddings": True},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": ROWS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "phi": SMALL,  # the output layer has a bias
    "gemma": {**SMALL, **GATED},  # tied, embeddings scaled in the lookup
    "qwen3": {**SMALL, **GATED},
    "opt": {**SMALL, "word_embed_proj_dim": 8, "ffn_dim": 24},  # embeddings narrower than layers
}
KINDS = ("lora", "prefix", "prompt", "p-tuning")
NEW = (20, 21)
LORA = AdapterConfig(adapter="lora", lora_rank=2)


def base(name="llama", new=(), seed=0, head=AutoModelForCausalLM, dtype=torch.float32, **settings):
    torch.manual_seed(seed)
    model = head.from_config(
        CONFIG_MAPPING[name.removesuffix("-tied")](**{**MODELS[name], **settings}), dtype=dtype
    )
    with torch.no_grad():
        for parameter in model.parameters():
            # drawn in float32: some versions of torch draw other numbers in bfloat16
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.3))
    set_rows(model, [NewToken(str(i), i, (1, 2, i - 15), True) for i in new])
    return model.eval()


def train_a_step(model, ids=((3, 20, 21, 5, 7),)):
    """One large SGD step on everything that trains; returns the names of what changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(2):  # LoRA's A gets its first gradient once B is not zero
        out = model(
            input_ids=torch.tensor(ids) % model.get_input_embeddings().weight.shape[0],
            use_cache=False,
        )
        out.logits.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def same(left, right):
    return torch.allclose(left, right, rtol=1e-5, atol=1e-5)
