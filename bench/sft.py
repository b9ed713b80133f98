"""How many real tokens a CPU-second does fine-tuning train? Our loop against transformers' Trainer, padded and grouped by length.

    python bench/sft.py --steps 6

A Llama of 26.7 million weights, seeded chats of 32-512 tokens (lognormal) whose answers (about 40 %) are learned, the same batches in the same order,
float32. The first step is left out of the rate and told apart; `loss` of the last step shows that all train the same.
"""

import argparse
import time

try:
    from harness import compare, parser, peak
except ImportError:
    from bench.harness import compare, parser, peak

VOCABULARY = 16_384


def documents(flags: argparse.Namespace):
    """(ids, weights) of every chat: alternating stretches, the second of which is learned."""
    import numpy as np

    generator = np.random.default_rng(0)
    out = []
    for _ in range(flags.batch * flags.steps):
        n = int(np.clip(np.exp(generator.normal(4.9, 0.7)), 32, 512))
        weights = (np.arange(n) % 50 >= 30).astype(np.float32)
        weights[0] = 0
        out.append((generator.integers(5, VOCABULARY, n), weights))
    return out


def model_of(attention: str, flags):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6}
    config = LlamaConfig(vocab_size=VOCABULARY, **shape, max_position_embeddings=1024, pad_token_id=0, tie_word_embeddings=False)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def figures(tokens: list[int], marks: list[tuple[float, float]], start: float, loss: float) -> dict[str, float]:
    seconds = marks[-1][0] - marks[0][0]
    return {"tokens_a_cpu_s": sum(tokens[1:]) / seconds, "first_step_cpu_s": marks[0][0] - start, "peak_mb": peak(), "loss": loss}


def ours(flags) -> dict[str, float]:
    import tempfile

    start = time.process_time()
    import numpy as np

    from ta.attention import register
    from ta.batch import lay_out, split_micro
    from ta.feed import Feed
    from ta.loop import LoopConfig, train
    from ta.optim import OptimConfig
    from ta.wrapper import wrap

    docs, marks, seen = documents(flags), [], []
    model, _ = wrap(model_of(register(), flags))

    def batches(step: int) -> list:
        mine = docs[step * flags.batch : (step + 1) * flags.batch]
        places = split_micro([len(ids) for ids, _ in mine], 4096)[0]
        return [lay_out([mine[i][0] for i in part], [mine[i][1] for i in part]) for part in places]

    def step(model, batch):
        loss = model(batch, "sum")
        seen.append((loss.item(), len(batch.targets)))
        return loss, batch.weights.sum(), {}

    with tempfile.TemporaryDirectory() as out:
        config = LoopConfig(out=out)
        optim = OptimConfig(lr=1e-4, schedule="constant", warmup=0, beta2=0.999)
        train(model, Feed(flags.steps, batches), step, config, optim, after_step=lambda _: marks.append((time.process_time(),)))
    tokens = [int(np.sum([len(ids) for ids, _ in docs[s * flags.batch : (s + 1) * flags.batch]])) for s in range(flags.steps)]
    return figures(tokens, marks, start, seen[-1][0] / seen[-1][1])


def trainer(flags, group: bool) -> dict[str, float]:
    import tempfile

    start = time.process_time()
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    docs, marks, losses = documents(flags), [], []
    rows = [{"input_ids": ids.tolist(), "labels": [t if w else -100 for t, w in zip(ids, weights, strict=True)]} for ids, weights in docs]
    if group:  # what grouping by length does, kept inside each batch's records so that the work is the same
        rows = [
            row
            for s in range(flags.steps)
            for row in sorted(rows[s * flags.batch : (s + 1) * flags.batch], key=lambda r: len(r["input_ids"]))
        ]

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        fill = lambda key, value: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])  # noqa: E731
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
        return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": mask}

    class Marks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append((time.process_time(),))

        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.append(logs.get("loss", losses[-1] if losses else 0.0))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out,
            per_device_train_batch_size=flags.batch // (4 if group else 1),
            gradient_accumulation_steps=4 if group else 1,
            max_steps=flags.steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            weight_decay=0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        InOrder(model_of("sdpa", flags), settings, train_dataset=rows, data_collator=collate, callbacks=[Marks()]).train()
    tokens = [sum(len(row["input_ids"]) for row in rows[s * flags.batch : (s + 1) * flags.batch]) for s in range(flags.steps)]
    return figures(tokens, marks, start, losses[flags.steps - 1])


def hf_padded(flags):
    return trainer(flags, group=False)


def hf_grouped(flags):
    return trainer(flags, group=True)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=6)
    flags.add_argument("--batch", type=int, default=16, help="chats a step")
    compare({"HF Trainer, padded": hf_padded, "HF Trainer, grouped": hf_grouped, "ours": ours}, flags.parse_args(), "HF Trainer, padded")
