"""Reward model: one score a dialogue, read at its last token, so that chosen answers score above rejected ones (Bradley-Terry).

    python recipes/rm.py                                           # built-in tiny model and data
    python recipes/rm.py --model-path MODEL --data pairs.jsonl --val-data held_out.jsonl --out runs/rm
    python recipes/rm.py --adapter lora ...                        # the head is trained and saved with the adapter
    torchrun --nproc-per-node 8 recipes/rm.py ...                  # the same losses on 8 devices

A line of data: {"context": [{"role": "user", "content": "2 + 2?"}], "answer_w": {"role": "assistant", "content": "4"},
"answer_l": {"role": "assistant", "content": "5"}, "precomputed_margin": 0.5}; a margin is optional and widens the gap that is wanted.
The export loads with transformers' AutoModelForSequenceClassification.
"""

from dataclasses import dataclass

from ta.cli import cli
from ta.loop import LoopConfig, train
from ta.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Rm(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/rm")


def step(model, batch):
    """Sum of -log s(score of chosen - score of rejected - margin) over pairs, their number, and what is logged."""
    from ta.objectives import reward_loss

    chosen, rejected = model(batch.seqs, "scores").view(-1, 2).unbind(1)  # (P,) each
    values, gap = reward_loss(chosen, rejected, batch.margin), (chosen - rejected).detach()
    figures = {"reward_chosen": chosen.detach().sum(), "reward_rejected": rejected.detach().sum(), "reward_gap": gap.sum()}
    return values.sum(), len(gap), {"ranking_accuracy": (gap > 0).sum(), **figures}


def main(config: Rm) -> None:
    from ta.answered import pairs

    with open_run(config, open_parts(config, "pair", model_kind="seq_cls"), dress=pairs) as run:
        train(run.model, run.feed, step, config.loop, run.optim, identity=run.identity, evaluate=evaluate_with(run, config, step))
        finish(run, config)


if __name__ == "__main__":
    cli(main, Rm)
