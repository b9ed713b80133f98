"""KTO (Ethayarajh et al. 2024): preference optimization on single answers that are called desirable or not.

    python recipes/kto.py                                          # built-in model (fine-tuned first) and data
    python recipes/kto.py --model-path runs/sft/final --data labelled.jsonl --val-data held_out.jsonl --out runs/kto
    python recipes/kto.py --adapter lora ...                       # the reference is then the base under the adapter
    torchrun --nproc-per-node 8 recipes/kto.py ...                 # the same losses on 8 devices

Without flags the model mostly says "5, of course!" at first, and the built-in labels prefer few words.
The samples' accuracy counts right answers in few words, contains those in any number of words.

A line of data: {"context": [{"role": "user", "content": "2 + 2?"}], "answer": {"role": "assistant", "content": "4"}, "is_desirable": true}
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

from ta.builtin.data_files import WORDY
from ta.builtin.fine_tuned import warm_start
from ta.cli import cli
from ta.generation.samples import CherryConfig
from ta.parallel import gather_objects, say, sum_over_ranks
from ta.reference import (
    Reference,
    ReferenceConfig,
    dressed,
    never_synced,
    open_reference,
    sequence_logps,
    with_reference,
)
from ta.train.loop import LoopConfig, train
from ta.train.optim import PREFERENCE_LR
from ta.train.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Kto(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/kto")
    cherry: CherryConfig = CherryConfig(cherry_metrics=("accuracy", "contains"))
    reference: ReferenceConfig = ReferenceConfig()
    beta: float = 0.1
    """How much the policy may leave its reference."""
    desirable_weight: float = 1.0
    """Weight of desirable answers. With d of them and u others, d * weight should be 1 to 4/3 of u * the weight of the others."""
    undesirable_weight: float = 1.0
    """Weight of the others."""


def step(config, model, batch):
    """Sum of the loss over answers, their number, and what is logged."""
    from ta.objectives import kto

    logps, ref = sequence_logps(model, batch.seqs), batch.ref[:, 0]  # (N,)
    weights = {
        "desirable_weight": config.desirable_weight,
        "undesirable_weight": config.undesirable_weight,
    }
    values = kto(logps, ref, batch.desirable, batch.kl, beta=config.beta, **weights)
    logps, reward = logps.detach(), config.beta * (logps.detach() - ref)
    better = (
        reward * batch.desirable.to(reward) / batch.share.clamp(min=1e-9)
    )  # over all answers, the mean of desirable ones'
    worse = reward * (~batch.desirable).to(reward) / (1 - batch.share).clamp(min=1e-9)
    right = (reward > config.beta * batch.kl) == batch.desirable
    figures = {
        "reward_desirable": better.sum(),
        "reward_undesirable": worse.sum(),
        "reward_margin": (better - worse).sum(),
    }
    return (
        values.sum(),
        len(values),
        {
            **figures,
            "reward_accuracy": right.sum(),
            "logp": logps.sum(),
            "kl": batch.kl * len(values),
        },
    )


def with_kl(reference: Reference, model, batches):
    """The batches with the reference, and with the reference point and the share of desirable answers over all answers of all processes."""
    import torch

    from ta.objectives import kl_estimate

    batches = with_reference(reference, batches)
    with torch.no_grad():
        ratios = torch.cat(
            [sequence_logps(model, batch.mismatched) - batch.ref[:, 1] for batch in batches]
        ).double()  # (N,)
    matched, desirable = (
        torch.cat([getattr(batch, name) for batch in batches]).to(ratios)
        for name in ("matched", "desirable")
    )
    sums = torch.stack(
        [(ratios * matched).sum(), matched.sum(), desirable.sum(), ratios.new_tensor(len(ratios))]
    )
    total, count, good, n = sum_over_ranks(sums)
    return [
        batch._replace(kl=kl_estimate(total, count), share=good / n.clamp(min=1))
        for batch in batches
    ]


def preference(model, batches) -> dict[str, float]:
    """How often a held-out desirable answer is rewarded above an undesirable one, ties half: 0.5 is chance, and where training starts."""
    import torch

    from ta.generation.metrics import roc_auc

    with torch.no_grad():
        mine = [
            ((sequence_logps(model, b.seqs) - b.ref[:, 0]).tolist(), b.desirable.tolist())
            for b in batches
        ]
    shares = [batch for share in gather_objects(mine) for batch in share]
    return {
        "preference": roc_auc(*([value for batch in shares for value in batch[i]] for i in (0, 1)))
    }


def main(config: Kto) -> None:
    from ta.data.answer_batches import labelled

    if min(config.beta, config.desirable_weight, config.undesirable_weight) <= 0:
        raise ValueError("--beta, --desirable-weight and --undesirable-weight must be above 0")
    config = warm_start(config, WORDY)
    parts = open_parts(config, "labelled", usual_lr=PREFERENCE_LR)
    at = {
        "seed": config.loop.seed,
        "max_tokens_per_micro": config.loop.max_tokens_per_micro,
        "folder": config.data.cache_dir,
    }
    reference = open_reference(
        config.reference,
        parts.model,
        parts.tokenizer,
        config.model,
        config.adapter,
        config.compute,
        **at,
    )
    before, of_config = partial(with_kl, reference), partial(step, config)
    same = {
        name: getattr(config, name) for name in ("beta", "desirable_weight", "undesirable_weight")
    }

    def dress(prepared):
        return dressed(
            reference,
            prepared,
            labelled(prepared, config.loop.seed),
            depends=["mismatched by", config.loop.seed],
        )

    with open_run(
        config, parts, dress=dress, identity=same | dataclasses.asdict(config.reference)
    ) as run:
        say(never_synced(config.reference, run.feed.steps))
        hooks = {
            "before_step": before,
            "after_step": reference.after_step,
            "extra": reference.extra,
            "identity": run.identity,
        }
        evaluate = evaluate_with(
            run, config, of_config, lambda _, batches: preference(run.model, batches), before
        )
        train(run.model, run.feed, of_config, config.loop, run.optim, evaluate=evaluate, **hooks)
        finish(run, config)


if __name__ == "__main__":
    cli(main, Kto)
