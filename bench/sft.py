"""How many real tokens a CPU-second does fine-tuning train, the whole model and LoRA?

    python bench/sft.py --peer-python PYTHON_WITH_TRL

Our loop against transformers' Trainer and TRL's SFTTrainer. A Llama of 26.7 million weights, seeded
chats of 32-2048 tokens (lognormal) whose answers (about 40 %) are learned, the same batches in the
same order (TRL's packing makes its own), float32, no activation checkpointing. The first step is
left out of the rate and told apart, from the start of the process; `loss` of the last step shows
that all train the same. `gflops` counts what the documents ask for; `bare` is the rate of the
model's matrix products alone.
"""

import itertools
import tempfile
import time

try:
    from harness import compare, parser, read
except ImportError:
    from bench.harness import compare, parser, read

from bench.work import (
    documents,
    flops,
    in_order,
    lora,
    marks_of,
    model_of,
    packed_batches,
    packed_model,
    settings,
    sft_step,
    shape,
    train_timed,
)


def figures(
    steps: list[list], marks: list[float], losses: list[float], flags, frozen: bool = False
) -> dict[str, float]:
    """Rates over all steps but the first; `steps` holds the documents of each."""
    seconds = marks[-1] - marks[0]
    later = [document for step in steps[1:] for document in step]
    tokens, learned = (
        sum(len(ids) for ids, _ in later),
        sum(int(weights[1:].sum()) for _, weights in later),
    )
    done = flops([len(ids) for ids, _ in later], learned, flags, frozen)
    rates = {
        "tokens_a_cpu_s": tokens / seconds,
        "learned_a_cpu_s": learned / seconds,
        "gflops": done / seconds / 1e9,
    }
    return rates | {
        "first_step_cpu_s": marks[0],
        "first_loss": losses[0],
        "loss": losses[flags.steps - 1],
    }


def by_step(docs: list, flags) -> list[list]:
    return [docs[s * flags.batch : (s + 1) * flags.batch] for s in range(flags.steps)]


def train_ours(flags, adapted: bool = False, compiled: bool = False) -> dict[str, float]:
    from ta import parallel
    from ta.training.optim import OptimConfig

    parallel.init()
    steps, sums = by_step(documents(flags), flags), []
    model = packed_model(flags, adapted)
    if compiled:
        parallel.compile_blocks(model)

    def step(model, batch) -> tuple:
        loss, count, metrics = sft_step(model, batch)
        sums[-1].append((loss.item(), count.item()))
        return loss, count, metrics

    def begin(done: int, micro_batches: list) -> list:
        sums.append([])
        return micro_batches

    marks = train_timed(
        model,
        flags.steps,
        lambda number: packed_batches(steps[number], flags.micro),
        step,
        begin,
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup=0, beta2=0.999),
        clock=time.process_time,
    )
    losses = [sum(x for x, _ in rows) / sum(n for _, n in rows) for rows in sums]
    return figures(steps, marks[1:], losses, flags, adapted)


def train_hf(flags, group: bool) -> dict[str, float]:
    import torch
    from transformers import Trainer, TrainingArguments

    steps, marks, losses = by_step(documents(flags), flags), [], []
    # what grouping by length does, inside each batch's records so that the work is the same
    if group:
        steps = [sorted(step, key=lambda document: len(document[0])) for step in steps]
    rows = [row(document) for step in steps for document in step]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = lambda key, value: torch.tensor(
            [row[key] + [value] * (width - len(row[key])) for row in rows]
        )
        mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        )
        return {
            "input_ids": fill("input_ids", 0),
            "labels": fill("labels", -100),
            "attention_mask": mask,
        }

    parts = 4 if group else 1
    with tempfile.TemporaryDirectory() as out:
        given = settings(flags, out, flags.batch // parts) | {"gradient_accumulation_steps": parts}
        callbacks = [marks_of(losses, marks)]
        model = model_of("sdpa", flags)
        in_order(Trainer)(
            model,
            TrainingArguments(**given),
            train_dataset=rows,
            data_collator=collate,
            callbacks=callbacks,
        ).train()
    return figures(steps, marks, losses, flags)


def train_trl(flags, adapted: bool = False, **more) -> dict[str, float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ta.builtin.models import tiny_tokenizer

    docs, marks, losses = documents(flags), [], []
    model = model_of("sdpa", flags)
    with tempfile.TemporaryDirectory() as out:
        given = (
            settings(flags, out, flags.batch)
            | {"max_length": None if more.get("padding_free") else flags.longest}
            | more
        )
        rows = Dataset.from_list([row(document) for document in docs])
        trainer = in_order(SFTTrainer)(
            lora(model) if adapted else model,
            SFTConfig(**given),
            train_dataset=rows,
            processing_class=tiny_tokenizer(),
            callbacks=[marks_of(losses, marks)],
        )
        trainer.train()
        if not more.get("packing"):
            return figures(by_step(docs, flags), marks, losses, flags, adapted)
        import numpy as np

        packed = []
        for pack in trainer.train_dataset:
            bounds = np.cumsum([0, *pack["seq_lengths"]])
            learned = (np.array(pack["labels"]) != -100).astype(np.float32)
            packed.append(
                [(pack["input_ids"][a:b], learned[a:b]) for a, b in itertools.pairwise(bounds)]
            )
    size = given["per_device_train_batch_size"]
    steps = [
        [document for pack in packed[s * size : (s + 1) * size] for document in pack]
        for s in range(flags.steps)
    ]
    return figures(steps, marks, losses, flags, adapted)


def row(document: tuple) -> dict[str, list[int]]:
    ids, weights = document
    return {
        "input_ids": ids.tolist(),
        "labels": [t if w else -100 for t, w in zip(ids.tolist(), weights, strict=True)],
    }


def trl_packing(flags) -> dict[str, float]:
    """Packs of --longest tokens, of which a step has about the tokens of a step of the others."""
    size = max(1, sum(len(ids) for ids, _ in documents(flags)) // flags.steps // flags.longest)
    return train_trl(flags, packing=True, per_device_train_batch_size=size)


def bare(flags) -> dict[str, float]:
    """Forward and backward products of every linear layer for the tokens of one step.

    The head's are those of its learned tokens.
    """
    import torch

    torch.set_num_threads(flags.threads)
    steps, s = by_step(documents(flags), flags), shape(flags)
    tokens = sum(len(ids) for step in steps for ids, _ in step) // len(steps)
    learned = int(sum(weights.sum() for step in steps for _, weights in step)) // len(steps)
    width, inner = s["hidden_size"], s["intermediate_size"]
    layers = [(tokens, width, width)] * 4 + [(tokens, width, inner)] * 2 + [(tokens, inner, width)]
    layers = layers * s["num_hidden_layers"] + [(256, width, s["vocab_size"])] * (learned // 256)
    parts = {
        key: (torch.randn(key[0], key[1]), torch.randn(key[2], key[1]), torch.randn(key[0], key[2]))
        for key in layers
    }

    def turn() -> float:
        start = time.process_time()
        for key in layers:
            x, weight, d = parts[key]
            x @ weight.t(), d @ weight, d.t() @ x
        return time.process_time() - start

    turn()  # warms up
    return {
        "gflops": 3 * sum(6 * n * a * b for n, a, b in layers) / sum(turn() for _ in range(3)) / 1e9
    }


def profile(flags) -> None:
    """What the CPU time of one step's forward and backward passes goes to (torch profiler)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    from ta import parallel

    parallel.init()
    model = packed_model(flags)
    parts = packed_batches(by_step(documents(flags), flags)[0], flags.micro)

    def turn() -> None:
        for part in parts:
            model.loss(part).backward()

    turn()  # warms up
    with record(activities=[ProfilerActivity.CPU]) as seen:
        turn()
    print(
        seen.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=48
        )
    )


CONTENDERS = {
    "ours": train_ours,
    "ours, compiled": lambda flags: train_ours(flags, compiled=True),
    "HF padded": lambda flags: train_hf(flags, group=False),
    "HF grouped": lambda flags: train_hf(flags, group=True),
    "TRL default": train_trl,
    "TRL padding-free": lambda flags: train_trl(flags, padding_free=True),
    "TRL packing": trl_packing,
    "bare": bare,
    "ours, LoRA": lambda flags: train_ours(flags, adapted=True),
    "TRL LoRA padding-free": lambda flags: train_trl(flags, adapted=True, padding_free=True),
}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--batch", type=int, default=16, help="chats a step")
    flags.add_argument("--longest", type=int, default=2048, help="tokens of the longest chat")
    flags.add_argument("--micro", type=int, default=1024, help="our tokens in one forward pass")
    flags.add_argument(
        "--profile", action="store_true", help="show what our step's time goes to, and end"
    )
    given = read(flags, steps=2, batch=4, longest=64)
    if given.profile:
        raise SystemExit(profile(given))
    peers = [name for name in CONTENDERS if name.startswith("TRL")]
    compare(CONTENDERS, given, "ours", peers)
