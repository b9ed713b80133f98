"""Preference optimization on pairs of answers: DPO (Rafailov et al. 2023) and 14 other losses.

    python recipes/dpo.py                              # built-in model (fine-tuned first) and data
    python recipes/dpo.py --model-path runs/sft/final --data pairs.jsonl --val-data held_out.jsonl
    python recipes/dpo.py --adapter lora --loss ipo    # the base under the adapter is the reference
    torchrun --nproc-per-node 8 recipes/dpo.py ...     # the same losses on 8 devices

Without flags the model mostly says "5, of course!" at first, and the built-in pairs prefer few
words. Of the samples' metrics, accuracy counts right answers in few words, and contains counts
right answers in any number of words. The losses stand in ta/losses.py.

A record, one line of the file (the margin is optional; prompt, chosen, rejected work too):

    {"context": [{"role": "user", "content": "2 + 2?"}],
     "answer_w": {"role": "assistant", "content": "4"},
     "answer_l": {"role": "assistant", "content": "5"}, "precomputed_margin": 0.5}
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

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
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/dpo")
    samples: ta.SamplesConfig = ta.SamplesConfig(sample_metrics=("accuracy", "contains"))
    reference: ta.ReferenceConfig = ta.ReferenceConfig()
    loss: Literal[
        "sigmoid", "sigmoid_with_margin", "hinge", "ipo", "kto_pair", "slic_hf", "cpo", "orpo",
        "simpo", "apo_zero", "apo_down", "asft", "dpop", "nca_pair", "cal_dpo",
    ] = "sigmoid"  # fmt: skip
    """Which loss; sigmoid is DPO's. What each computes, and where it is from, stands in
    ta/losses.py."""
    beta: Annotated[float | None, Range(0, above=True)] = None
    """Only for losses that have it: how much the policy may leave its reference. Default, here and
    below: the one published with the loss, which is 0.1 but for hinge 0.05, simpo 2, dpop 0.3,
    nca_pair 0.01 and cal_dpo 0.002."""
    label_smoothing: Annotated[float | None, Range(0, below=0.5)] = None
    """Only for sigmoid: the share of pairs believed to be labelled the wrong way round. Default:
    0."""
    gamma: Annotated[float | None, Range(0)] = None
    """Only for simpo: the margin that is wanted between the rewards. Default: 1."""
    alpha: Annotated[float | None, Range(0)] = None
    """Only for slic_hf and cpo: the weight of the likelihood of the chosen answer. Default: 1."""
    delta: Annotated[float | None, Range(0, above=True)] = None
    """Only for slic_hf: the margin that is wanted between the log-probabilities. Default: 1."""
    penalty: Annotated[float | None, Range(0)] = None
    """Only for dpop: the weight of the chosen answer's loss of likelihood. Default: 50."""
    average: bool | None = None
    """Only for ipo: means over tokens instead of sums. Default: sums."""


# the flags of each loss, with the values that were published with it
FLAGS = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0},
    "sigmoid_with_margin": {"beta": 0.1},
    "hinge": {"beta": 0.05},
    "ipo": {"beta": 0.1, "average": False},
    "kto_pair": {"beta": 0.1},
    "slic_hf": {"delta": 1.0, "alpha": 1.0},
    "cpo": {"beta": 0.1, "alpha": 1.0},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "asft": {"beta": 0.1},
    "dpop": {"beta": 0.3, "penalty": 50.0},
    "nca_pair": {"beta": 0.01},
    "cal_dpo": {"beta": 0.002},
}
WITHOUT_REFERENCE = ("slic_hf", "cpo", "orpo", "simpo", "asft")
# losses whose rewards are means over tokens
PER_TOKEN = ("orpo", "simpo", "asft")


def loss_settings(config: Config) -> dict:
    """The settings of the loss: the flags given, and the published values for the others.

    ValueError for a flag that the loss does not take.
    """
    settings = dict(FLAGS[config.loss])
    every_flag = dict.fromkeys(name for flags in FLAGS.values() for name in flags)
    own = {setting.name for setting in fields(Config) if setting.default is None}
    if unknown := own ^ set(every_flag):
        raise ValueError(f"FLAGS must name the losses that take {', '.join(sorted(unknown))}")
    for name in every_flag:
        if (value := getattr(config, name)) is not None:
            if name not in settings:
                flags = ["--" + taken.replace("_", "-") for taken in (name, *settings)]
                raise ValueError(
                    f"{flags[0]} {value} would have no effect: --loss {config.loss} takes "
                    f"{', '.join(flags[1:])}; leave {flags[0]} out"
                )
            settings[name] = value
    return settings


def preference_loss(loss: str, settings: dict, policy, ref, batch):
    """(P,) values of the loss, computed from the log-probabilities and the flags that it takes."""
    both = (policy,) if loss in WITHOUT_REFERENCE else (policy, ref)
    match loss:
        case "sigmoid_with_margin":
            settings = settings | {"margin": batch.margin}
        case "kto_pair":
            settings = settings | {"kl_chosen": batch.kl[0], "kl_rejected": batch.kl[1]}
    # the function of that name
    return getattr(ta.losses, loss)(*both, **settings)


def step(loss: str, settings: dict, model, batch):
    """The sum of the loss over pairs, the number of pairs, and sums for the log."""
    logps = batch.both(partial(ta.sequence_logps, model))  # (P, 2)
    tokens = batch.both(ta.count_learned)  # (P, 2)
    policy = ta.losses.Pair(*logps.unbind(1), *tokens.unbind(1))
    ref = None if loss in WITHOUT_REFERENCE else ta.losses.Pair(*batch.reference.unbind(1))
    values = preference_loss(loss, settings, policy, ref, batch)  # (P,)
    per_token = loss in PER_TOKEN or settings.get("average", False)
    reward = ta.losses.rewards(policy, ref, settings.get("beta", 1.0), per_token)
    return values.sum(), len(values), ta.losses.preference_metrics(policy, reward)


def with_kl(model, batches):
    """The batches with kto_pair's reference points, estimated on all pairs of all processes."""
    import torch

    with torch.no_grad():
        ratios = [b.both(partial(ta.sequence_logps, model)) - b.reference for b in batches]
    ratios = torch.cat(ratios).double()  # (P, 2)
    sums = torch.stack([*ratios.sum(0), ratios.new_full((), len(ratios))])
    *totals, count = ta.parallel.sum_over_ranks(sums)
    kl = torch.stack([ta.losses.kl_estimate(total, count) for total in totals])
    return [batch._replace(kl=kl) for batch in batches]


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    settings = loss_settings(config)
    if config.loss in WITHOUT_REFERENCE and config.reference != ta.ReferenceConfig():
        raise ValueError(
            f"--loss {config.loss} has no reference: leave --reference, --ref-path, --sync-every "
            "and --sync-alpha out"
        )
    config = ta.train_builtin_first(config, "builtin-wordy")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "concise", config.model.hub
    )
    asked = (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = (ta.prepare_pairs(some, *asked) for some in (files, val_files))
    for data in (train_data, val_data):
        ta.check_margins(data, "needed" if config.loss == "sigmoid_with_margin" else "unused")
    setup = config.model, config.adapter, config.compute
    model = ta.load_model(*setup, tokenizer, run.device, seed=run.seed)
    ta.check_context(model, train_data, val_data)

    reference = None
    if config.loss not in WITHOUT_REFERENCE:
        reference = ta.open_reference(config.reference, model, tokenizer, *setup, run.seed)
        # with --reference cached its log-probabilities are computed here, once
        cached = (reference, ta.collate_pairs, config.batches, model.packed, config.data.cache_dir)
        train_data = ta.with_cached_reference(train_data, *cached)
        val_data = ta.with_cached_reference(val_data, *cached)
    batches = ta.train_batches(
        train_data,
        config.batches,
        packed=model.packed,
        collate=ta.collate_pairs,
        default_batch_size=32 if config.model.model_path.startswith("builtin") else 64,
    )
    ta.note_sync(config.reference, batches.steps)
    val_batches = ta.val_batches(
        val_data, config.batches, packed=model.packed, collate=ta.collate_pairs
    )
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-6, adapted=1e-5, builtin=1e-4
    )
    # step(model, batch) with this run's loss
    learn = partial(step, config.loss, settings)

    def before_step(done, micro_batches):
        if reference is not None:
            # a synced reference moves every --sync-every steps
            reference.follow(done)
            micro_batches = reference.add_to(micro_batches)
        needs_kl = config.loss == "kto_pair" and micro_batches
        return with_kl(model, micro_batches) if needs_kl else micro_batches

    def evaluate(done):
        # at step 0 no reference moves
        figures = ta.mean_over(model, before_step(0, val_batches), learn)
        samples = ta.generate_samples(
            run,
            model,
            tokenizer,
            val_data,
            done,
            reference=reference and reference.of_new,
        )
        return ta.join_figures(figures, samples)

    ta.preview(train_data, tokenizer, val_data)
    figures = ta.train(
        run,
        model,
        batches,
        learn,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate,
        before_step=before_step,
        more_state=reference.state if reference else None,
        resume_key=settings,
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
