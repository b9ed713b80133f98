"""KTO (Ethayarajh et al. 2024): preference optimization on answers labelled desirable or not.

    python recipes/kto.py                              # built-in model (fine-tuned first) and data
    python recipes/kto.py --model-path runs/sft/final --data labelled.jsonl --val-data test.jsonl
    python recipes/kto.py --adapter lora ...           # the base under the adapter is the reference
    torchrun --nproc-per-node 8 recipes/kto.py ...     # the same losses on 8 devices

Without flags the model mostly says "5, of course!" at first, and the built-in labels prefer few
words. Of the samples' metrics, accuracy counts right answers in few words, and contains counts
right answers in any number of words.

A record, one line of the file:

    {"context": [{"role": "user", "content": "2 + 2?"}],
     "answer": {"role": "assistant", "content": "4"}, "is_desirable": true}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import ta
from ta import Range


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
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/kto")
    samples: ta.SamplesConfig = ta.SamplesConfig(sample_metrics=("accuracy", "contains"))
    reference: ta.ReferenceConfig = ta.ReferenceConfig()
    beta: Annotated[float, Range(0, above=True)] = 0.1
    """How much the policy may leave its reference."""
    desirable_weight: Annotated[float, Range(0, above=True)] = 1.0
    """Weight of desirable answers. With d of them and u others, d * weight should be 1 to 4/3 of u
    * the weight of the others."""
    undesirable_weight: Annotated[float, Range(0, above=True)] = 1.0
    """Weight of the others."""


def step(config: Config, model, batch):
    """The sum of the loss over answers, the number of answers, and sums for the log."""

    logps, ref = ta.sequence_logps(model, batch.sequences), batch.reference[:, 0]  # (N,)
    values = ta.losses.kto(
        logps,
        ref,
        batch.desirable,
        batch.kl,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    logps, good = logps.detach(), batch.desirable
    reward = config.beta * (logps - ref)
    # the mean of a side is its sum over its own number; without that side there is no figure
    better = reward.where(good, 0).sum(), good.sum()
    worse = reward.where(~good, 0).sum(), (~good).sum()
    metrics = {
        "reward_desirable": [better],
        "reward_undesirable": [worse],
        "reward_margin": [better, (-worse[0], worse[1])],
        "reward_accuracy": ((reward > config.beta * batch.kl) == good).sum(),
        "logp": logps.sum(),
        "kl": batch.kl * len(values),
    }
    return values.sum(), len(values), metrics


def with_kl(model, batches):
    """The batches with the reference point, estimated on all answers of all processes."""
    import torch

    with torch.no_grad():
        ratios = [ta.sequence_logps(model, b.mismatched) - b.reference[:, 1] for b in batches]
    ratios = torch.cat(ratios).double()  # (N,)
    matched = torch.cat([batch.matched for batch in batches]).to(ratios)
    sums = torch.stack([(ratios * matched).sum(), matched.sum()])
    kl = ta.losses.kl_estimate(*ta.parallel.sum_over_ranks(sums))
    return [batch._replace(kl=kl) for batch in batches]


def preference(model, batches) -> dict[str, float]:
    """The share of held-out pairs whose desirable answer has the higher reward; ties count half.

    A pair is any desirable and any undesirable answer. Chance, and the start of training, is 0.5.
    {} where one of the two sides is missing.
    """
    import torch

    pairs = []
    with torch.no_grad():
        for batch in batches:
            ratio = ta.sequence_logps(model, batch.sequences) - batch.reference[:, 0]
            pairs += zip(ratio.tolist(), batch.desirable.tolist(), strict=True)
    every = [pair for share in ta.parallel.gather_objects(pairs) for pair in share]
    both = len({label for _, label in every}) == 2
    return {"preference": ta.roc_auc(*zip(*every, strict=True))} if both else {}


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    config = ta.train_builtin_first(config, "builtin-wordy")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "labelled", config.model.hub
    )
    asked = (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = (ta.prepare_labelled(some, *asked) for some in (files, val_files))
    setup = config.model, config.adapter, config.compute
    model = ta.load_model(*setup, tokenizer, run.device, seed=run.seed)
    ta.check_context(model, train_data, val_data)

    reference = ta.open_reference(config.reference, model, tokenizer, *setup, run.seed)
    train_data, collate = with_collate(config, reference, train_data, model)
    batches = ta.train_batches(train_data, config.batches, packed=model.packed, collate=collate)
    ta.note_sync(config.reference, batches.steps)
    val_batches = []
    if val_data:
        val_data, collate = with_collate(config, reference, val_data, model)
        val_batches = ta.val_batches(val_data, config.batches, packed=model.packed, collate=collate)
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-6, adapted=1e-5, builtin=1e-4
    )
    learn = partial(step, config)

    def before_step(done, micro_batches):
        reference.follow(done)
        return with_kl(model, reference.add_to(micro_batches))

    def evaluate(done):
        held_out = with_kl(model, reference.add_to(val_batches)) if val_batches else []
        figures = ta.mean_over(model, held_out, learn)
        samples = ta.generate_samples(
            run,
            model,
            tokenizer,
            val_data,
            done,
            reference=reference.of_new,
        )
        return ta.join_figures(figures, samples, preference(model, held_out))

    ta.preview(train_data, tokenizer, val_data)
    if len(sides := set(train_data.extras["desirable"].tolist())) == 1:
        side = "desirable" if 1.0 in sides else "undesirable"
        ta.parallel.say(f"note: every answer is {side}, so nothing says what is better than what")
    figures = ta.train(
        run,
        model,
        batches,
        learn,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate,
        before_step=before_step,
        more_state=reference.state,
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


def with_collate(config: Config, reference, data, model):
    """The data, with the values of a cached reference, and the function that makes its batches."""
    seed = config.batches.seed
    collate = ta.labelled_collate(data, seed)
    cached = (reference, collate, config.batches, model.packed, config.data.cache_dir)
    return ta.with_cached_reference(data, *cached, depends=["mismatched by", seed]), collate


if __name__ == "__main__":
    ta.cli(main, Config)
