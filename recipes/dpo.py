"""Preference optimization on pairs of answers, after Rafailov et al. 2023 (DPO) and fourteen other losses of ta/losses.py.

    python recipes/dpo.py                                          # built-in model (fine-tuned first) and data
    python recipes/dpo.py --model-path runs/sft/final --data pairs.jsonl --val-data held_out.jsonl --out runs/dpo
    python recipes/dpo.py --adapter lora --loss ipo --beta 0.2 ... # the reference is then the base under the adapter
    torchrun --nproc-per-node 8 recipes/dpo.py ...                 # the same losses on 8 devices

Without flags the model mostly says "5, of course!" at first, and the built-in pairs prefer few words.
The samples' accuracy counts right answers in few words, contains those in any number of words.

A line of data: {"context": [{"role": "user", "content": "2 + 2?"}], "answer_w": {"role": "assistant", "content": "4"},
"answer_l": {"role": "assistant", "content": "5"}, "precomputed_margin": 0.5}, the margin being optional; or prompt, chosen, rejected.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

from ta.builtin.data_files import WORDY, data_or_builtin
from ta.builtin.fine_tuned import warm_start
from ta.cli import cli
from ta.generation.samples import CherryConfig
from ta.parallel import say, sum_over_ranks
from ta.reference import (
    Reference,
    ReferenceConfig,
    dressed,
    learned_tokens,
    never_synced,
    open_reference,
    sequence_logps,
    with_reference,
)
from ta.train.loop import LoopConfig, train
from ta.train.optim import PREFERENCE_LR
from ta.train.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Dpo(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/dpo")
    cherry: CherryConfig = CherryConfig(cherry_metrics=("accuracy", "contains"))
    reference: ReferenceConfig = ReferenceConfig()
    loss: str = "sigmoid"
    """sigmoid (DPO's), sigmoid_with_margin, hinge, ipo, kto_pair, slic_hf, cpo, orpo, simpo, apo_zero, apo_down, asft, dpop, nca_pair or cal_dpo.
    What each computes, and where it is from, stands in ta/losses.py."""
    beta: float | None = None
    """Of the losses that have it: how much the policy may leave its reference. Default, here and below: the one published with the loss."""
    label_smoothing: float | None = None
    """Of sigmoid: the share of pairs believed to be labelled the wrong way round."""
    gamma: float | None = None
    """Of simpo: the margin that is wanted between the rewards."""
    alpha: float | None = None
    """Of slic_hf and cpo: the weight of the likelihood of the chosen answer."""
    delta: float | None = None
    """Of slic_hf: the margin that is wanted between the log-probabilities."""
    penalty: float | None = None
    """Of dpop: the weight of the chosen answer's loss of likelihood."""
    average: bool | None = None
    """Of ipo: means over tokens instead of sums."""


def step(loss, model, batch):
    """Sum of the loss over pairs, their number, and what is logged."""
    from ta.losses import Pair, preference_metrics, rewards

    logps, tokens = batch.both(partial(sequence_logps, model)), batch.both(learned_tokens)  # (P, 2)
    policy, ref = (
        Pair(*logps.unbind(1), *tokens.unbind(1)),
        Pair(*batch.ref.unbind(1)) if "ref" in loss.inputs else None,
    )
    data = {
        "policy": policy,
        "ref": ref,
        "margin": batch.margin,
        "kl_chosen": batch.kl[0],
        "kl_rejected": batch.kl[1],
    }
    values = loss.value(**{name: data[name] for name in loss.inputs})  # (P,)
    return (
        values.sum(),
        len(values),
        preference_metrics(
            policy, rewards(policy, ref, loss.settings.get("beta", 1.0), loss.per_token)
        ),
    )


def with_kl(reference: Reference, model, batches):
    """The batches with the reference and, for kto_pair, with the reference points of all pairs of all processes."""
    import torch

    from ta.objectives import kl_estimate

    batches = with_reference(reference, batches)
    with torch.no_grad():
        ratios = torch.cat(
            [batch.both(partial(sequence_logps, model)) - batch.ref for batch in batches]
        ).double()  # (P, 2)
    *sums, count = sum_over_ranks(torch.stack([*ratios.sum(0), ratios.new_tensor(len(ratios))]))
    kl = torch.stack([kl_estimate(total, count) for total in sums])
    return [batch._replace(kl=kl) for batch in batches]


def main(config: Dpo) -> None:
    from ta.data.answer_batches import pairs
    from ta.losses import choose

    names = ("beta", "label_smoothing", "gamma", "alpha", "delta", "penalty", "average")
    loss = choose(config.loss, **{name: getattr(config, name) for name in names})
    if "ref" not in loss.inputs and config.reference != ReferenceConfig():
        raise ValueError(
            f"--loss {config.loss} has no reference: leave --reference, --ref-path and --sync-... out"
        )
    config = warm_start(config, WORDY)
    files, val_files = data_or_builtin(config.data.data, config.data.val_data, "concise")
    data = dataclasses.replace(config.data, data=files, val_data=val_files)
    config = dataclasses.replace(config, data=data)
    parts = open_parts(config, "pair", usual_lr=PREFERENCE_LR)
    at = {
        "seed": config.loop.seed,
        "max_tokens_per_micro": config.loop.max_tokens_per_micro,
        "folder": config.data.cache_dir,
    }
    reference = Reference()
    if "ref" in loss.inputs:
        reference = open_reference(
            config.reference,
            parts.model,
            parts.tokenizer,
            config.model,
            config.adapter,
            config.compute,
            **at,
        )
    before = (
        partial(with_kl, reference)
        if "kl_chosen" in loss.inputs
        else lambda model, batches: with_reference(reference, batches)
    )
    same = {"loss": config.loss, **loss.settings, **dataclasses.asdict(config.reference)}

    def dress(prepared):
        return dressed(
            reference, prepared, pairs(prepared, "needed" if "margin" in loss.inputs else "unused")
        )

    with open_run(
        config,
        parts,
        dress=dress,
        identity=same,
        usual_batch=32 if config.model.model_path == WORDY else 64,
    ) as run:
        say(never_synced(config.reference, run.feed.steps))
        hooks = {
            "before_step": before,
            "after_step": reference.after_step,
            "extra": reference.extra,
            "identity": run.identity,
        }
        evaluate = evaluate_with(run, config, partial(step, loss), before_step=before)
        train(
            run.model,
            run.feed,
            partial(step, loss),
            config.loop,
            run.optim,
            evaluate=evaluate,
            **hooks,
        )
        finish(run, config)


if __name__ == "__main__":
    cli(main, Dpo)
