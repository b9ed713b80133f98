"""Reward model: one score a dialogue, read at its last token, so that chosen answers score above rejected ones (Bradley-Terry).

    python recipes/rm.py                                           # built-in model (fine-tuned first) and data
    python recipes/rm.py --model-path MODEL --data pairs.jsonl --val-data held_out.jsonl --out runs/rm
    python recipes/rm.py --adapter lora ...                        # the head is trained and saved with the adapter
    torchrun --nproc-per-node 8 recipes/rm.py ...                  # the same losses on 8 devices

A line of data: {"context": [{"role": "user", "content": "2 + 2?"}], "answer_w": {"role": "assistant", "content": "4"},
"answer_l": {"role": "assistant", "content": "5"}, "precomputed_margin": 0.5}; a margin is optional and widens the gap that is wanted.
The export loads with transformers' AutoModelForSequenceClassification.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ta.builtin.data_files import TUNED
from ta.builtin.fine_tuned import warm_start
from ta.cli import cli
from ta.parallel import rank, say
from ta.train import run_folder
from ta.train.loop import LoopConfig, train
from ta.train.optim import REWARD_LR
from ta.train.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Rm(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/rm")


def step(model, batch):
    """Sum of -log s(score of chosen - score of rejected - margin) over pairs, their number, and what is logged."""
    from ta.objectives import reward_loss

    chosen, rejected = model.scores(batch.seqs).view(-1, 2).unbind(1)  # (P,) each
    values, gap = reward_loss(chosen, rejected, batch.margin), (chosen - rejected).detach()
    figures = {
        "reward_chosen": chosen.detach().sum(),
        "reward_rejected": rejected.detach().sum(),
        "reward_gap": gap.sum(),
    }
    return values.sum(), len(gap), {"ranking_accuracy": (gap > 0).sum(), **figures}


def show(run, config: Rm, done: int, _batches) -> dict[str, float]:
    """Score the first held-out pairs, append them to samples.jsonl and print some."""
    from ta.data.answer_batches import scores_of
    from ta.data.prepare import sequence

    pairs, rows = run.data.held_out, []
    scores = (
        scores_of(run.model, pairs, config.cherry.cherry_records, config.loop.max_tokens_per_micro)
        .squeeze(2)
        .tolist()
    )
    for i, both in enumerate(scores if rank() == 0 else []):
        parts = [sequence(pairs, 2 * i + j) for j in (0, 1)]
        asked, chosen, rejected = (
            run.tokenizer.fast.decode(ids, skip_special_tokens=True).strip()
            for ids in (
                parts[0][0][parts[0][1] == 0],
                *(ids[weights != 0] for ids, weights in parts),
            )
        )
        sample = {
            "step": done,
            "line": int(pairs.origin[i][1]),
            "prompt": asked,
            "chosen": chosen,
            "rejected": rejected,
            "scores": both,
        }
        run_folder.append(Path(config.loop.out) / "samples.jsonl", sample)
        rows.append((asked, chosen, f"{both[0]:.3f}", rejected, f"{both[1]:.3f}"))
    header = ("prompt", "chosen", "score", "rejected", "score")
    say(
        f"\nsamples at step {done}\n{run_folder.table(rows[: config.cherry.cherry_show], header)}\n"
        if rows
        else ""
    )
    return {}


def main(config: Rm) -> None:
    from ta.data.answer_batches import pairs

    config = warm_start(config)
    parts = open_parts(config, "pair", model_kind="seq_cls", usual_lr=REWARD_LR)
    with open_run(
        config, parts, dress=pairs, usual_batch=32 if config.model.model_path == TUNED else 64
    ) as run:
        evaluate = evaluate_with(run, config, step, partial(show, run, config))
        train(
            run.model,
            run.feed,
            step,
            config.loop,
            run.optim,
            identity=run.identity,
            evaluate=evaluate,
        )
        finish(run, config)


if __name__ == "__main__":
    cli(main, Rm)
