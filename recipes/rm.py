"""Reward model: one score a dialogue, such that chosen answers score above rejected ones.

The score is read at the last token; the loss is Bradley-Terry's.

    python recipes/rm.py                               # built-in model (fine-tuned first) and data
    python recipes/rm.py --model-path MODEL --data pairs.jsonl --val-data held_out.jsonl
    python recipes/rm.py --adapter lora ...            # the adapter is saved with the trained head
    torchrun --nproc-per-node 8 recipes/rm.py ...      # the same losses on 8 devices

A record, one line of the file (a margin is optional and asks for a wider gap of the scores):

    {"context": [{"role": "user", "content": "2 + 2?"}],
     "answer_w": {"role": "assistant", "content": "4"},
     "answer_l": {"role": "assistant", "content": "5"}, "precomputed_margin": 0.5}

The export loads with transformers' AutoModelForSequenceClassification.
"""

from __future__ import annotations

from dataclasses import dataclass

import ta


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig()
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    adapter: ta.AdapterConfig = ta.AdapterConfig()
    compute: ta.ComputeConfig = ta.ComputeConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    data: ta.DataConfig = ta.DataConfig()
    batches: ta.BatchConfig = ta.BatchConfig()
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/rm")
    samples: ta.SamplesConfig = ta.SamplesConfig()


def step(model, batch):
    """The sum of -log s(score of chosen - score of rejected - margin) over pairs, and their number.

    The third value holds sums for the log.
    """

    chosen, rejected = model.scores(batch.sequences).view(-1, 2).unbind(1)  # (P,) each
    values = ta.losses.reward_loss(chosen, rejected, batch.margin)  # (P,)
    chosen, rejected = chosen.detach(), rejected.detach()
    metrics = {
        "ranking_accuracy": (chosen > rejected).sum(),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "reward_gap": (chosen - rejected).sum(),
    }
    return values.sum(), len(values), metrics


def show_pairs(config: Config, run, tokenizer, model, pairs, done: int) -> None:
    """Score the first held-out pairs, append them to samples.jsonl and print some of them."""

    n, rows = config.samples.sample_records, []
    scores = ta.scores_of(model, pairs, n, config.batches.max_tokens_per_micro)  # (n, 2, 1)
    for i, both in enumerate(scores.squeeze(2).tolist() if ta.parallel.rank() == 0 else []):
        ids, weights = ta.sequence(pairs, 2 * i)
        other, other_weights = ta.sequence(pairs, 2 * i + 1)
        texts = (ids[weights == 0], ids[weights != 0], other[other_weights != 0])
        asked, chosen, rejected = (
            tokenizer.fast.decode(text, skip_special_tokens=True).strip() for text in texts
        )
        sample = {"step": done, "line": int(pairs.origin[i][1]), "prompt": asked}
        sample |= {"chosen": chosen, "rejected": rejected, "scores": both}
        ta.append_line(run.folder / "samples.jsonl", sample)
        rows.append((asked, chosen, f"{both[0]:.3f}", rejected, f"{both[1]:.3f}"))
    header = ("prompt", "chosen", "score", "rejected", "score")
    shown = ta.table(rows[: config.samples.sample_show], header)
    ta.parallel.say(f"\nsamples at step {done}\n{shown}\n" if rows else "")


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    config = ta.train_builtin_first(config)
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "preferences", config.model.hub
    )
    asked = (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = (ta.prepare_pairs(some, *asked) for some in (files, val_files))
    for data in (train_data, val_data):
        ta.check_margins(data, "used")
    tokenizer = ta.with_own_pad_token(tokenizer, train_data, val_data)
    model = ta.load_model(
        config.model,
        config.adapter,
        config.compute,
        tokenizer,
        run.device,
        num_labels=1,
        seed=run.seed,
    )
    ta.check_context(model, train_data, val_data)

    batches = ta.train_batches(
        train_data,
        config.batches,
        packed=model.packed,
        collate=ta.collate_pairs,
        default_batch_size=32 if config.model.model_path.startswith("builtin") else 64,
    )
    val_batches = ta.val_batches(
        val_data, config.batches, packed=model.packed, collate=ta.collate_pairs
    )
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=2e-5, adapted=2e-4, builtin=1e-3
    )

    def evaluate(done):
        figures = ta.mean_over(model, val_batches, step)
        show_pairs(config, run, tokenizer, model, val_data, done)
        return figures

    ta.preview(train_data, tokenizer, val_data)
    figures = ta.train(
        run,
        model,
        batches,
        step,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate if val_data else None,
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
