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
    reference: ta.ReferenceConfig = ta.ReferenceConfig()
    vllm: ta.VllmConfig = ta.VllmConfig()
    engine: Literal["hf", "vllm"] = "hf"
    """What answers: the model itself, or vLLM in this process, which gets its weights each step."""
    preset: Literal["grpo", "dapo", "dr-grpo", "rloo", "gspo", "cispo"] = "grpo"
    """The published values of the eight settings below, of which each that is given wins."""
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
    resample: Annotated[int | None, Range(0)] = None
    """How often other prompts are drawn, in place of those whose answers are rewarded alike."""
    overlong: Annotated[float | None, Range(0, 1)] = None
    """The share of --max-new-tokens, at its end, in which longer answers lose up to 1."""
    drop_truncated: bool = False
    """Do not train on answers that reached --max-new-tokens; in their groups they count."""
    kl_coef: Annotated[float, Range(0)] = 0.0
    """Weight of the KL from the reference; above 0 --reference is opened."""
    kl: Literal["reward", "loss"] = "reward"
    """Where it counts: log pi - log ref in the reward (k1), or half its square in the loss (k2)."""
    mismatch: Literal["none", "truncate", "mask"] = "truncate"
    """Weights by which the tokens of a sampler that differs count: trainer's probability over
    sampler's, up to a bound, or 0 outside of it."""
    mismatch_bound: Annotated[float, Range(1, above=True)] = 2.0
    """That bound."""
    max_mismatch: Annotated[float, Range(0)] = 0.1
    """The run stops after three steps in which log-probabilities of sampler and trainer differ by
    more than this on average."""


DEFAULTS = {
    "advantage": "grpo", "level": "token", "divide": "answers", "clip_ratio": "objective",
    "clip_low": 0.2, "clip_high": 0.2, "resample": 0, "overlong": 0.0,
}  # fmt: skip
PRESETS = {
    # arXiv 2402.03300, without its KL
    "grpo": {},
    # arXiv 2503.14476, which draws without end
    "dapo": {"divide": "tokens", "clip_high": 0.28, "resample": 3, "overlong": 0.2},
    # arXiv 2503.20783
    "dr-grpo": {"advantage": "centred", "divide": "constant"},
    # arXiv 2402.14740
    "rloo": {"advantage": "rloo", "level": "sequence"},
    # arXiv 2507.18071
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585, the bound of arXiv 2510.13786
    "cispo": {"divide": "tokens", "clip_ratio": "weight", "clip_low": 1.0, "clip_high": 4.0},
}


def policy_settings(config: Config) -> dict:
    """The eight settings: those of the preset, and over them the flags given."""
    given = {name: getattr(config, name) for name in DEFAULTS}
    given = {name: value for name, value in given.items() if value is not None}
    return DEFAULTS | PRESETS[config.preset] | given


def step(config: Config, settings: dict, watch, model, batch):
    """The sum of the loss over tokens of answers, their number, and sums for the log."""
    sequences = batch.sequences
    logps = model.logprobs(sequences)  # (M,)
    # before the only update of a rollout the policy is the old one
    old = batch.old if config.rollouts.updates > 1 else logps.detach()
    ratios = ta.rl.log_ratios(logps, old, sequences.owners, len(sequences.ends), settings["level"])
    values, clipped = ta.rl.policy_loss(
        logps,
        ratios,
        batch.advantage,
        low=settings["clip_low"],
        high=settings["clip_high"],
        clip=settings["clip_ratio"],
    )  # (M,)
    if config.mismatch != "none":
        bound = config.mismatch_bound
        values = values * ta.rl.mismatch_weights(old, batch.sampled, bound, config.mismatch)
    watch.add(old - batch.sampled)
    figures = {"clipped": clipped.float().sum(), "mismatch": (old - batch.sampled).abs().sum()}
    if config.kl_coef:
        kl = ta.rl.k2(logps, batch.reference) * ratios.detach().exp()
        values = values + config.kl_coef * kl if config.kl == "loss" else values
        figures["kl"] = ta.rl.k3(logps, batch.reference).detach().sum()
    figures |= {name: value * len(logps) for name, value in batch.figures.items()}
    return (values * sequences.weights).sum(), len(logps), figures


def start_engine(config: Config, model, tokenizer):
    """A started vLLM for the rollouts, or None where the model itself answers."""
    if config.engine == "hf":
        return None
    if model.inner.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "--engine vllm: the head of this model is its table of embeddings, and vLLM would go "
            "on with the old head after an update; give --engine hf"
        )
    if tokenizer.new_tokens or config.vllm.tensor_parallel_size > 1 or model.mode == "native":
        raise ValueError(
            "--engine vllm in rollouts takes whole weights on one device: no added tokens, no "
            "--tensor-parallel-size, no prompt learning; leave them or --engine out"
        )
    base = ta.ModelConfig(ta.resolve(config.model).base, dtype=config.model.dtype)
    return ta.start_vllm(base, tokenizer.fast, config.vllm, rollouts=True)


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    settings = policy_settings(config)
    updates, longest = config.rollouts.updates, config.rollouts.max_new_tokens
    ta.check_engine(config.engine, config.vllm)
    if config.rollouts.num_answers < 2:
        raise ValueError("--num-answers 1: answers are compared with each other, give 2 or more")
    if not config.kl_coef and config.reference != ta.ReferenceConfig():
        raise ValueError("--reference and its flags have no effect without --kl-coef: add it")
    config = ta.with_fine_tuned_model(config, "builtin-begun")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "practice", config.model.hub
    )
    asked = (tokenizer, config.chat, config.data, run.seed)
    prompts, data = ta.rl.prepare_prompts(files, *asked)
    held_out = ta.rl.prepare_prompts(val_files, *asked)[0] if val_files else []
    model = ta.load_model(
        config.model, config.adapter, config.compute, tokenizer, run.device, seed=run.seed
    )
    # the policy that is sampled is the policy that trains
    model.dropout, model.temperature = False, config.rollouts.temperature
    model.eval()
    ta.check_prompts([ids for _, ids in prompts + held_out], *ta.limits_of(model), room=longest)

    batches = ta.rl.rollout_steps(
        ta.train_batches(data, config.batches, packed=model.packed, default_batch_size=32),
        updates,
        config.batches,
    )
    # which log-probabilities of the answers a rollout's file holds beside the sampler's
    logprobs, reference = {}, None
    if updates > 1:
        logprobs["trainer"] = model.logprobs
    if config.kl_coef:
        reference = ta.open_reference(
            config.reference,
            model,
            tokenizer,
            config.model,
            config.adapter,
            config.compute,
            run.seed,
        )
        logprobs["reference"] = partial(reference.token_logps, model)
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-6, adapted=1e-5, builtin=3e-4
    )
    optimizer = ta.adamw(model, optim)
    pool = ta.rl.RewardPool(config.reward, run.device, config.batches.max_tokens_per_micro)
    rollouts = ta.rl.Rollouts(
        run.folder,
        prompts,
        batches,
        tokenizer,
        config.rollouts,
        pool,
        settings["resample"],
        settings["overlong"],
        logprobs,
        start_engine(config, model, tokenizer),
    )
    watch = ta.rl.MismatchWatch(config.max_mismatch)

    def before_step(number, _):
        watch.check()
        if reference is not None:
            reference.follow(number)
        rows = rollouts.at(model, number)
        rewards = ta.rl.rewards_of(rows)  # (P, G)
        if config.kl_coef and config.kl == "reward":
            rewards = rewards - config.kl_coef * ta.rl.kl_of(rows)
        advantages = ta.rl.advantages(rewards, settings["advantage"])  # (P, G)
        part = slice(number % updates, None, updates)
        return ta.rl.rollout_batches(
            rows[part],
            advantages[part],
            settings["divide"],
            config.rollouts,
            config.batches.max_tokens_per_micro,
            model.packed,
            ta.rl.figures_of(rows) | rollouts.seconds,
            keep_flat=config.kl_coef > 0,
            drop_truncated=config.drop_truncated,
        )

    def evaluate(done):
        samples = ta.generate_samples(
            model,
            tokenizer,
            [ta.rl.with_reference(record) for record, _ in held_out],
            config.chat,
            config.samples,
            run.folder,
            done,
            seed=run.seed,
            reference=reference and reference.of_new,
        )
        rewarded = held_out[: config.samples.sample_records]
        return ta.join_figures(rollouts.held_out_reward(model, rewarded, longest), samples)

    ta.rl.report_memory(config.loop, model, batches, optimizer, config.rollouts)
    figures = ta.train(
        run,
        model,
        batches,
        partial(step, config, settings, watch),
        optimizer,
        optim,
        evaluate=evaluate if held_out or config.samples.samples_data else None,
        before_step=before_step,
        more_state=rollouts.state | (reference.state if reference else {}),
        resume_key=settings,
    )
    pool.close()
    card = ta.model_card(run, data, figures)
    ta.export(model, tokenizer, run.folder / "final", card=card)
    return run.folder / "final", figures


if __name__ == "__main__":
    ta.cli(main, Config)
