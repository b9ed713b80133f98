"""Which share of a GPU's matrix rate does training reach? Random models in the shape of 1B and 8B Llamas, bfloat16, packed chats; the head alone.

    python bench/mfu.py                                           # any CUDA card
    python bench/mfu.py --only "1B full, compiled" "8B LoRA, compiled"

`share` is of 989 TFLOP/s (H100, H200 without sparsity), `share_of_measured` of what this card reaches on a large bfloat16 product in the same run.
FLOPs are those the documents ask for: 6 a weight and token (4 where the base is frozen), attention inside each document, the head at learned tokens
only, nothing for what is computed twice. The first two steps are left out. A contender that does not fit says so. Without a GPU tiny shapes run on
the CPU, which only shows that the script works: its figures are not yet measured.
"""

import itertools
import tempfile
import time

try:
    from harness import Figures, compare, parser, read
except ImportError:
    from bench.harness import Figures, compare, parser, read

from bench.work import in_order, lora, marks_of, settings, train_timed

SHAPES = {  # those of Llama 3.2 1B and 3.1 8B
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
PEAK = 989e12  # FLOP/s


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def build(flags, size: str, attention: str):
    """A random model with float32 weights on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = device() == "cpu"
    vocabulary = 1024 if small else 128_256
    config = LlamaConfig(
        **SHAPES["tiny" if small else size],
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        pad_token_id=0,
    )
    config.tie_word_embeddings = size == "1B"
    with torch.device(device()):
        return LlamaForCausalLM._from_config(
            config, attn_implementation=attention, dtype=torch.float32
        )


def chats(flags, vocabulary: int) -> list[list[tuple]]:
    """For each step documents of lognormal lengths of --tokens in all; the last 60 % of each is learned.

    With `flags.uneven` every step after the first two has fewer than the one before it.
    """
    import numpy as np

    generator, steps = np.random.default_rng(0), []
    for number in range(flags.steps):
        less = max(0, number - 1) / 16 if getattr(flags, "uneven", False) else 0
        left, step = int(flags.tokens * (1 - less)), []
        while left >= 32:
            n = min(left, int(np.clip(np.exp(generator.normal(5.5, 0.8)), 32, 2048)))
            step.append(
                (generator.integers(5, vocabulary, n), (np.arange(n) >= 0.4 * n).astype(np.float32))
            )
            left -= n
        steps.append(step)
    return steps


def counted(model, steps: list, frozen: bool) -> float:
    """FLOPs of these steps; `model` before it gets an adapter."""
    c, k = model.config, 4 if frozen else 6
    body = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2
    )
    documents = [document for step in steps for document in step]
    lengths, learned = (
        [len(ids) for ids, _ in documents],
        sum(weights[1:].sum() for _, weights in documents),
    )
    head_dim = c.hidden_size // c.num_attention_heads
    attention = (
        12
        * c.num_hidden_layers
        * c.num_attention_heads
        * head_dim
        * sum(n * (n + 1) / 2 for n in lengths)
    )
    return k * body * sum(lengths) + attention + k * c.hidden_size * c.vocab_size * float(learned)


def attention_of(config, batch) -> float:
    """FLOPs of one layer's attention over a packed batch, forward."""
    prefixes = batch.prefixes or (0,) * len(batch.lengths)
    seen = sum(n * p + n * (n + 1) / 2 for n, p in zip(batch.lengths, prefixes, strict=True))
    return 4 * config.hidden_size * seen


def wanted(config, body: int, batch, adapted: bool, reference: bool = False) -> float:
    """FLOPs that a packed batch asks for, as `counted`, and the forward pass of a reference.

    `body` is the number of weights in the blocks' matrices.
    """
    k = (2 if reference else 0) + (4 if adapted else 6)
    head = config.hidden_size * config.vocab_size * len(batch.targets)
    attention = config.num_hidden_layers * attention_of(config, batch)
    return k * (body * sum(batch.lengths) + head) + (4 if reference else 3) * attention


def matrix_rate() -> float:
    """FLOP/s of a large product in bfloat16."""
    import torch

    side = 8192 if device() == "cuda" else 256
    a, b = (torch.randn(side, side, device=device(), dtype=torch.bfloat16) for _ in range(2))
    a @ b
    start = now()
    for _ in range(20):
        a @ b
    return 20 * 2 * side**3 / (now() - start)


def rates(flops: float, tokens: int, seconds: float) -> Figures:
    import torch

    memory = torch.cuda.max_memory_allocated() / 2**30 if device() == "cuda" else 0.0
    measured = matrix_rate()
    shares = {
        "share": flops / seconds / PEAK,
        "share_of_measured": flops / seconds / measured,
        "measured_tflops": measured / 1e12,
    }
    return {"tokens_a_s": tokens / seconds, **shares, "gib": memory}


def fits(work):
    """The contender; where it fails (too little memory, most often) it says so, and the others keep their figures."""

    def run(flags) -> Figures:
        import torch

        try:
            return work(flags)
        except torch.OutOfMemoryError:
            return {"out_of_memory": 1.0}
        except Exception:
            # at the head of the file it would take bench/tokenize.py for Python's own
            import traceback

            traceback.print_exc()
            return {"failed": 1.0}

    return run


def ours(
    flags,
    size: str,
    adapted: bool = False,
    compiled: bool = False,
    checkpointing: bool = False,
    kept: bool = False,
    small: bool = False,
    float8: bool = False,
    micro: int = 1,
    seconds: list[float] | None = None,
) -> Figures:
    """Our loop; `seconds` is filled with those of each step after the first, so that late compilations show.

    `kept` is --keep-products, `small` --optimizer adamw8bit --weights bfloat16; it and `float8` need
    torchao and are left out without a GPU. A step has `micro` micro-batches of --tokens.
    """
    from argparse import Namespace

    import torch

    from ta import parallel
    from ta.data.batch import lay_out
    from ta.model.attention import register
    from ta.model.language_model import wrap
    from ta.model.load import multiply_in_float8
    from ta.training.optim import OptimConfig

    assert not (kept and compiled), "compiled blocks choose themselves what they keep"
    model = build(flags, size, register())
    many = Namespace(**vars(flags) | {"steps": micro * flags.steps})
    batches = chats(many, model.config.vocab_size)
    flops = counted(model, batches[2 * micro :], adapted)
    model, note = wrap(lora(model) if adapted else model, autocast=torch.bfloat16)
    assert model.mode == "packed", note
    parallel.frozen_to_bfloat16(model)
    if compiled and device() == "cuda":
        parallel.compile_blocks(model)
    if checkpointing:
        parallel.checkpoint_activations(model, kept)
    optim = OptimConfig(lr=1e-5)
    if device() == "cuda":
        model.half_precision = True
        if float8:
            multiply_in_float8(model)
        if small:
            optim = OptimConfig(lr=1e-5, optimizer="adamw8bit", weights="bfloat16")
    marks = train_timed(
        model,
        flags.steps,
        lambda number: [
            lay_out(*map(list, zip(*batch, strict=True)))
            for batch in batches[micro * number : micro * (number + 1)]
        ],
        lambda model, batch: (model.loss(batch), batch.weights.sum(), {}),
        optim=optim,
    )
    if seconds is not None:
        seconds.extend(b - a for a, b in itertools.pairwise(marks))
    tokens = sum(len(ids) for batch in batches[2 * micro :] for ids, _ in batch)
    return rates(flops, tokens, marks[-1] - marks[2])


def hf(flags, size: str) -> Figures:
    """transformers' Trainer on the same documents, padded to the longest of each of its micro-batches of eight."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainingArguments

    model, losses, marks = build(flags, size, "sdpa"), [], []
    steps = chats(flags, model.config.vocab_size)
    per_step = min(len(step) for step in steps) // 8 * 8 or 1
    steps = [step[:per_step] for step in steps]
    flops = counted(model, steps[2:], False)

    def collate(rows):
        ids, weights = ([torch.as_tensor(row[key]) for row in rows] for key in ("ids", "weights"))
        labels = [torch.where(w > 0, i, -100) for i, w in zip(ids, weights, strict=True)]
        mask = pad_sequence([torch.ones(len(i), dtype=torch.long) for i in ids], batch_first=True)
        return {
            "input_ids": pad_sequence(ids, True),
            "labels": pad_sequence(labels, True, -100),
            "attention_mask": mask,
        }

    small = device() == "cpu"
    with tempfile.TemporaryDirectory() as out:
        size = min(8, per_step)
        given = settings(flags, out, size) | {
            "gradient_accumulation_steps": per_step // size,
            "bf16": not small,
            "use_cpu": small,
        }
        rows = [{"ids": ids, "weights": weights} for step in steps for ids, weights in step]
        given |= {"remove_unused_columns": False}
        in_order(Trainer)(
            model,
            TrainingArguments(**given),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[marks_of(losses, marks, now)],
        ).train()
    return rates(
        flops, sum(len(ids) for step in steps[2:] for ids, _ in step), marks[-1] - marks[1]
    )


def head(flags, compiled: bool = False) -> Figures:
    """Cross-entropy and both gradients at 8,192 x 4096 x 152k in bfloat16, and the memory it takes beside its inputs and the weight's gradient."""
    import torch

    from ta.model.logprobs import Head, cross_entropy_sum

    tokens, width, vocabulary = (8192, 4096, 152_064) if device() == "cuda" else (64, 32, 512)
    hidden, weight = (
        torch.randn(n, width, device=device(), dtype=torch.bfloat16).requires_grad_()
        for n in (tokens, vocabulary)
    )
    targets, weights = (
        torch.randint(0, vocabulary, (tokens,), device=device()),
        torch.ones(tokens, device=device()),
    )
    times, before = [], torch.cuda.memory_allocated() if device() == "cuda" else 0
    for _ in range(6):
        hidden.grad = weight.grad = None
        start = now()
        cross_entropy_sum(hidden, Head(weight, compiled=compiled), targets, weights).backward()
        times.append(now() - start)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30 if device() == "cuda" else 0.0
    return {"ms": 1000 * min(times), "gib": memory}


CONTENDERS = {
    "1B full": lambda flags: ours(flags, "1B"),
    "1B full, compiled": lambda flags: ours(flags, "1B", compiled=True),
    "HF padded 1B full": lambda flags: hf(flags, "1B"),
    "8B LoRA": lambda flags: ours(flags, "8B", adapted=True),
    "8B LoRA, compiled": lambda flags: ours(flags, "8B", adapted=True, compiled=True),
    "8B full, checkpointing": lambda flags: ours(flags, "8B", checkpointing=True),
    "head": head,
}

if __name__ == "__main__":
    flags = parser(__doc__, rounds=1)
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--tokens", type=int, default=16_384, help="tokens a step, one packed row")
    given = read(flags, steps=4, tokens=256)
    if device() == "cpu":
        vars(given).update(steps=4, tokens=256)
        print("no GPU here: tiny shapes on the CPU; the figures of a GPU are not yet measured")
    compare({name: fits(work) for name, work in CONTENDERS.items()}, given, "1B full")
