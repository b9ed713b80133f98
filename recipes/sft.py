"""Supervised fine-tuning on chats: the mean of -log p over the learned tokens of the whole global batch.

    python recipes/sft.py                                          # built-in tiny model and data
    python recipes/sft.py --model-path MODEL --data chats.jsonl --val-data held_out.jsonl --out runs/mine
    torchrun --nproc-per-node 8 recipes/sft.py ...                 # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from dataclasses import dataclass

from ta.builtin.models import TINY_BATCH
from ta.cli import cli
from ta.train.loop import train
from ta.train.run import RunConfig, evaluate_with, finish, open_run


@dataclass(frozen=True)
class Sft(RunConfig):
    pass


def step(model, batch):
    """Weighted sum of -log p over learned tokens, and their weight: the loop divides once, by the weight of the whole global batch."""
    return model.loss(batch), batch.weights.sum(), {}


def main(config: Sft) -> None:
    batch = TINY_BATCH if config.model.model_path == "builtin" else 64
    with open_run(config, "chat", usual_batch=batch) as run:
        train(
            run.model,
            run.feed,
            step,
            config.loop,
            run.optim,
            identity=run.identity,
            evaluate=evaluate_with(run, config, step),
        )
        finish(run, config)


if __name__ == "__main__":
    cli(main, Sft)
