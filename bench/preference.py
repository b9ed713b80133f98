"""How many pairs a CPU-second does DPO train, the prompt laid down once or twice?

    python bench/preference.py --peer-python PYTHON_WITH_TRL
    python bench/preference.py --prompt 400 --answer 30 --only whole

Our step against TRL's DPOTrainer. A Llama of 26.7 million weights, pairs of random tokens in the
same order, the sigmoid loss, steps with AdamW, float32. The reference is a frozen second model,
computed on the fly, or numbers computed before (not timed). The first step is left out; `loss` of
the last shows that all train the same. `whole` lays the prompt down twice, once for each answer;
prompts vary by a quarter, answers too.
"""

import tempfile
import time

try:
    from harness import compare, parser, read
except ImportError:
    from bench.harness import compare, parser, read

from bench.work import (
    in_order,
    lora,
    marks_of,
    model_of,
    packed_model,
    settings,
    shape,
    train_timed,
)


def pairs(flags) -> list[tuple]:
    """(prompt, chosen, rejected) ids."""
    import numpy as np

    generator, vocabulary = np.random.default_rng(0), shape(flags)["vocab_size"]
    draw = lambda mean: generator.integers(5, vocabulary, int(mean * generator.uniform(0.75, 1.25)))
    return [
        (draw(flags.prompt), draw(flags.answer), draw(flags.answer))
        for _ in range(flags.pairs * flags.steps)
    ]


def figures(marks: list[float], losses: list[float], flags) -> dict[str, float]:
    rate = (flags.steps - 1) * flags.pairs / (marks[-1] - marks[0])
    return {"pairs_a_cpu_s": rate, "first_loss": losses[0], "loss": losses[flags.steps - 1]}


def train_ours(flags, kind: str, shared: bool = True) -> dict[str, float]:
    """`kind` is that of the reference; `shared` lays the prompt of both answers down once."""
    import numpy as np
    import torch

    from recipes.dpo import FLAGS, step
    from ta import parallel
    from ta.data.batch import PairBatch, lay_out
    from ta.reference import Reference
    from ta.training.optim import OptimConfig

    parallel.init()
    records, losses = pairs(flags), []
    model = packed_model(flags, adapted=kind == "adapter_off")
    model.dropout = False
    other = model
    if kind != "adapter_off":
        other = packed_model(flags).requires_grad_(False).eval()

    def at(number: int) -> list[PairBatch]:
        ids, weights, same = [], [], []
        for prompt, *answers in records[number * flags.pairs : (number + 1) * flags.pairs]:
            ids += [np.concatenate([prompt, answer]) for answer in answers]
            weights += [(np.arange(len(x)) >= len(prompt)).astype(np.float32) for x in ids[-2:]]
            same += [0, len(prompt)]
        sequences = lay_out(ids, weights, True, same if shared else ())
        return [PairBatch(sequences, torch.zeros(flags.pairs))]

    reference = Reference(kind, other, adapter_off=other is model)
    if kind == "cached":
        known = [Reference("frozen", other).add_to(at(number)) for number in range(flags.steps)]
        at, other, reference.model = known.__getitem__, None, None

    def noted(model, batch) -> tuple:
        loss, count, metrics = step("sigmoid", FLAGS["sigmoid"], model, batch)
        losses.append(loss.item() / count)
        return loss, count, metrics

    marks = train_timed(
        model,
        flags.steps,
        at,
        noted,
        lambda done, made: reference.add_to(made),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup=0, beta2=0.999),
        clock=time.process_time,
    )
    return figures(marks[1:], losses, flags)


def train_trl(flags, reference: str) -> dict[str, float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from ta.builtin.models import tiny_tokenizer

    marks, losses, model = [], [], model_of("sdpa", flags)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: ids.tolist() for name, ids in zip(names, record, strict=True)}
        for record in pairs(flags)
    ]

    class Prepared(in_order(DPOTrainer)):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    with tempfile.TemporaryDirectory() as out:
        given = settings(flags, out, flags.pairs) | {"max_length": None, "beta": 0.1}
        trainer = Prepared(
            lora(model) if reference == "adapter_off" else model,
            ref_model=model_of("sdpa", flags) if reference == "frozen" else None,
            args=DPOConfig(**given, precompute_ref_log_probs=reference == "cached"),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
            callbacks=[marks_of(losses, marks)],
        )
        trainer.train()
    return figures(marks, losses, flags)


CONTENDERS = {
    "ours": lambda flags: train_ours(flags, "frozen"),
    "whole": lambda flags: train_ours(flags, "frozen", shared=False),
    "TRL": lambda flags: train_trl(flags, "frozen"),
    "ours, cached": lambda flags: train_ours(flags, "cached"),
    "TRL, precomputed": lambda flags: train_trl(flags, "cached"),
    "ours, LoRA": lambda flags: train_ours(flags, "adapter_off"),
    "TRL, LoRA": lambda flags: train_trl(flags, "adapter_off"),
}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--prompt", type=int, default=160, help="tokens of a prompt")
    flags.add_argument("--answer", type=int, default=90, help="tokens of an answer")
    flags.add_argument("--pairs", type=int, default=4, help="pairs a step")
    flags.add_argument("--steps", type=int, default=3)
    given = read(flags, prompt=16, answer=8, pairs=2, steps=2)
    compare(CONTENDERS, given, "ours", [name for name in CONTENDERS if name.startswith("TRL")])
