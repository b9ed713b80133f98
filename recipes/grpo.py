"""Online reinforcement learning: GRPO (Shao et al. 2024) and its relatives, on rewarded answers.

    python recipes/grpo.py                             # built-in model (partly trained) and data
    python recipes/grpo.py --model-path runs/sft/final --data chats.jsonl --rewards number
    python recipes/grpo.py --data prompts.jsonl --rewards my_rewards.py:polite "length:400*0.1"
    torchrun --nproc-per-node 8 recipes/grpo.py ...    # the same rollouts and losses on 8 devices

A step answers --batch-size prompts --num-answers times each, rewards the answers, writes both to
OUT/rollouts/STEP.jsonl, and makes answers more likely that are better than the others of their
prompt. The formulas stand in ta/rl/policy.py.

A record, one line of the file; the answer at its end is taken off and becomes the "reference", and
all of the record reaches the reward functions, (messages, answer, record) -> number or None:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

from dataclasses import dataclass
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
    optim: ta.OptimConfig = ta.OptimConfig(schedule="constant")
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/grpo", log_every=1)
    samples: ta.SamplesConfig = ta.SamplesConfig(sample_records=256)
    rollouts: ta.rl.RolloutConfig = ta.rl.RolloutConfig()
    reward: ta.rl.RewardConfig = ta.rl.RewardConfig()
    preset: Literal["grpo", "dapo", "dr-grpo", "rloo", "gspo", "cispo"] = "grpo"
    """The published values of the six settings below, of which each that is given wins."""
    advantage: Literal["grpo", "centred", "rloo", "batch"] | None = None
    """By how much an answer is better: reward minus the mean of its group, over the standard
    deviation of the group (grpo), as it is (centred), minus the mean of the others (rloo), or over
    the standard deviation of the step (batch)."""
    level: Literal["token", "sequence"] | None = None
    """Whether the ratio of new to old probability is that of a token or the geometric mean of its
    answer."""
    divide: Literal["tokens", "answers", "constant"] | None = None
    """The loss is a mean over the tokens of a step, over its answers of the means over their
    tokens, or a sum over answers times --max-new-tokens."""
    clip_ratio: Literal["objective", "weight"] | None = None
    """A ratio out of bounds takes the gradient away (PPO), or is a weight that stays in bounds
    (CISPO)."""
    clip_low: Annotated[float | None, Range(0, 1)] = None
    """A ratio counts from 1 - this."""
    clip_high: Annotated[float | None, Range(0)] = None
    """A ratio counts up to 1 + this."""


# arXiv 2402.03300; 2503.14476; 2503.20783; 2402.14740; 2507.18071; 2506.13585 with the bound of
# arXiv 2510.13786
PRESETS = {
    "grpo": ("grpo", "token", "answers", "objective", 0.2, 0.2),
    "dapo": ("grpo", "token", "tokens", "objective", 0.2, 0.28),
    "dr-grpo": ("centred", "token", "constant", "objective", 0.2, 0.2),
    "rloo": ("rloo", "sequence", "answers", "objective", 0.2, 0.2),
    "gspo": ("grpo", "sequence", "answers", "objective", 3e-4, 4e-4),
    "cispo": ("grpo", "token", "tokens", "weight", 1.0, 4.0),
}
NAMES = ("advantage", "level", "divide", "clip_ratio", "clip_low", "clip_high")


def policy_settings(config: Config) -> dict:
    """The settings of the policy's loss: the flags given, and the preset's for the others."""
    given = {name: getattr(config, name) for name in NAMES}
    preset = dict(zip(NAMES, PRESETS[config.preset], strict=True))
    return preset | {name: value for name, value in given.items() if value is not None}


def step(settings: dict, model, batch):
    """The sum of the loss over tokens of answers, the number of tokens, and sums for the log."""
    sequences = batch.sequences
    logps = model.logprobs(sequences)  # (M,)
    log_ratio = ta.rl.log_ratios(
        logps, batch.sampled, sequences.owners, len(sequences.ends), settings["level"]
    )
    values, clipped = ta.rl.policy_loss(
        logps,
        log_ratio,
        batch.advantage,
        low=settings["clip_low"],
        high=settings["clip_high"],
        clip=settings["clip_ratio"],
    )
    gaps = (logps - batch.sampled).detach()
    figures = {"clipped": clipped.float().sum(), "mismatch": gaps.abs().sum()}
    figures |= {name: value * len(logps) for name, value in batch.figures.items()}
    return (values * sequences.weights).sum(), len(logps), figures


def main(config: Config) -> None:
    settings = policy_settings(config)
    config = ta.with_fine_tuned_model(config, "builtin-begun")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat)
    files, val_files = ta.data_or_builtin(config.data.data, config.data.val_data, "practice")
    prompts, data = ta.rl.prepare_prompts(files, tokenizer, config.chat, config.data, run.seed)
    val_data = ta.prepare_chats(val_files, tokenizer, config.chat, config.data, run.seed)
    model = ta.load_model(
        config.model, config.adapter, config.compute, tokenizer, run.device, seed=run.seed
    )
    # the policy that is sampled is the policy that trains
    model.dropout, model.temperature = False, config.rollouts.temperature
    model.eval()

    batches = ta.train_batches(data, config.batches, packed=model.packed, default_batch_size=32)
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-6, adapted=1e-5, builtin=3e-4
    )
    rewards = ta.rl.RewardPool(config.reward)
    rollouts = ta.rl.Rollouts(
        run.folder / "rollouts", prompts, batches, tokenizer, config.rollouts, rewards
    )

    def before_step(number, _):
        rows = rollouts.at(model, number)
        advantages = ta.rl.advantages(ta.rl.rewards_of(rows), settings["advantage"])  # (P, G)
        return ta.rl.rollout_batches(
            rows,
            advantages,
            settings["divide"],
            config.rollouts.max_new_tokens,
            config.batches.max_tokens_per_micro,
            model.packed,
            ta.rl.figures_of(rows) | rollouts.seconds,
        )

    def evaluate(done):
        return ta.generate_samples(
            model, tokenizer, val_data, config.chat, config.samples, run.folder, done, seed=run.seed
        )

    ta.train(
        run,
        model,
        batches,
        partial(step, settings),
        ta.adamw(model, optim),
        optim,
        evaluate=evaluate if val_data else None,
        before_step=before_step,
        resume_key=settings,
    )
    ta.export(model, tokenizer, run.folder / "final")


if __name__ == "__main__":
    ta.cli(main, Config)
