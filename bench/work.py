"""The model, the chats and the peers' settings that several benches share."""

from __future__ import annotations

import argparse
import time

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 16_384, 384, 1024, 8, 6


def shape(flags: argparse.Namespace) -> dict[str, int]:
    """Sizes of a Llama of 26.7 million weights, or with --tiny of one of 0.3 million."""
    layers, vocabulary = (2, 1024) if flags.tiny else (LAYERS, VOCABULARY)
    width, inner, heads = (64, 128, 2) if flags.tiny else (WIDTH, INNER, HEADS)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def model_of(attention: str, flags: argparse.Namespace):
    """A seeded Llama of that shape, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape(flags), max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def lora(model):
    """A LoRA adapter of rank 16 on every linear layer of the blocks."""
    import peft
    import torch

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    )


def documents(flags: argparse.Namespace) -> list[tuple]:
    """(ids, weights) of every chat.

    Lengths are lognormal, 32 to --longest tokens; of every 50 tokens the last 20 are learned.
    """
    import numpy as np

    generator, vocabulary, out = np.random.default_rng(0), shape(flags)["vocab_size"], []
    for _ in range(flags.batch * flags.steps):
        n = int(np.clip(np.exp(generator.normal(4.9, 0.7)), 32, flags.longest))
        weights = (np.arange(n) % 50 >= 30).astype(np.float32)
        weights[0] = 0
        out.append((generator.integers(5, vocabulary, n), weights))
    return out


def flops(
    lengths: list[int], learned: int, flags: argparse.Namespace, frozen: bool = False
) -> float:
    """Multiplications and additions that training these documents asks for.

    6 a weight and token (4 where the base is frozen), attention inside each document, the head at
    learned tokens only, nothing for what is computed twice.
    """
    s, k = shape(flags), 4 if frozen else 6
    body = s["num_hidden_layers"] * (
        4 * s["hidden_size"] ** 2 + 3 * s["hidden_size"] * s["intermediate_size"]
    )
    attention = (
        12 * s["num_hidden_layers"] * s["hidden_size"] * sum(n * (n + 1) / 2 for n in lengths)
    )
    return k * body * sum(lengths) + attention + k * s["hidden_size"] * s["vocab_size"] * learned


def marks_of(losses: list[float], marks: list[float], clock=time.process_time):
    """A callback of transformers' Trainer: notes the time after every step, and the losses."""
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            marks.append(clock())

        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    return Marks()


def in_order(trainer_class: type) -> type:
    """The trainer, taking records in their order and data as it is."""
    import torch

    class InOrder(trainer_class):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder


def settings(flags: argparse.Namespace, out: str, batch: int) -> dict:
    """Arguments of TrainingArguments and its children: our arithmetic, nothing written."""
    return {
        "output_dir": out,
        "per_device_train_batch_size": batch,
        "max_steps": flags.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


class GivenBatches:
    """What `train` takes for batches; at(step) gives the micro-batches of a step."""

    def __init__(self, steps: int, at):
        from types import SimpleNamespace

        self.steps, self.at, self.batch_size, self.seed = steps, at, 1, 0
        self.prepared = SimpleNamespace(info={"fingerprint": ""})

    def names(self, step: int) -> list[str]:
        return []


def packed_model(flags: argparse.Namespace, adapted: bool = False):
    """That model as a root module over packed documents; `adapted` puts the LoRA adapter on it."""
    from ta.model.attention import register
    from ta.model.language_model import wrap

    model = model_of(register(), flags)
    return wrap(lora(model) if adapted else model)[0]


def packed_batches(documents: list[tuple], max_tokens: int) -> list:
    """This process's micro-batches of at most `max_tokens` tokens of documents (ids, weights)."""
    from ta.data.batch import lay_out
    from ta.data.micro import split_micro
    from ta.parallel import rank, world

    parts = split_micro([len(ids) for ids, _ in documents], max_tokens, world())[rank()]
    chosen = [[documents[place] for place in part] for part in parts]
    return [lay_out([ids for ids, _ in part], [w for _, w in part]) for part in chosen]


def sft_step(model, batch) -> tuple:
    """The summed loss and the weight it is divided by."""
    return model.loss(batch), batch.weights.sum(), {}


def train_timed(
    model, steps: int, at, step, before_step=None, *, optim=None, clock=time.perf_counter
) -> list[float]:
    """Seconds at the beginning of each of `steps` steps of `train`, and at the end of the last.

    at(step) gives a step's micro-batches; before_step is as in `train`, with its time counted.
    The loop ends before it writes a checkpoint: large weights on the disk are not what is timed.
    """
    import tempfile

    import torch

    from ta.parallel import gather_objects
    from ta.training.loop import train
    from ta.training.optim import OptimConfig, make_optimizer
    from ta.training.run_folder import LoopConfig, Run

    marks: list[float] = []

    def mark(done, micro_batches):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(clock())
        if done == steps:
            raise StopIteration
        return before_step(done, micro_batches) if before_step else micro_batches

    batches = GivenBatches(steps + 1, lambda number: at(min(number, steps - 1)))
    optim = optim or OptimConfig(lr=1e-5)
    with tempfile.TemporaryDirectory() as mine:
        run = Run(LoopConfig(out=gather_objects(mine)[0]))
        try:
            train(run, model, batches, step, make_optimizer(model, optim), optim, before_step=mark)
        except StopIteration:
            pass
    return marks
