"""Online reinforcement learning: GRPO (Shao et al. 2024) and its relatives, on rewarded answers.

    python recipes/grpo.py                             # built-in model (partly trained) and data
    python recipes/grpo.py --model-path runs/sft/final --data chats.jsonl --rewards number
    python recipes/grpo.py --data prompts.jsonl --rewards my_rewards.py:polite "length:400*0.1"
    torchrun --nproc-per-node 8 recipes/grpo.py ...    # the same rollouts and losses on 8 devices

A step answers --batch-size prompts --num-answers times each, rewards the answers, writes both to
OUT/rollouts (a file a round), and makes answers more likely that are better than the others of
their prompt. The formulas stand in ta/rl/policy.py, the presets in ta/rl/settings.py.

A record, one line of the file; the answer at its end is taken off and becomes the "reference", and
all of the record reaches the reward functions, (messages, answer, record) -> number or None:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import ta
from ta.chat.encode import PROMPT, refuse_idle


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
    tools: ta.rl.ToolConfig = ta.rl.ToolConfig()
    policy: ta.rl.PolicyConfig = ta.rl.PolicyConfig()
    reference: ta.ReferenceConfig = ta.ReferenceConfig()
    vllm: ta.VllmConfig = ta.VllmConfig()
    engine: str = "hf"
    """What answers: the model itself (hf), vLLM in this process (vllm), or a vLLM server (a URL).
    vLLM gets the weights after each update: a server by files of --out that it sees, or by its own
    weight transfer where it was started with one."""


def step(policy: ta.rl.PolicyConfig, watch, model, batch):
    """The sum of the loss over tokens of answers, their number, and sums for the log."""
    sequences, bound = batch.sequences, policy.mismatch_bound
    logps = model.logprobs(sequences)  # (M,)
    # before the only update of a rollout the policy is the old one
    old = batch.old if len(batch.old) else logps.detach()
    log_ratios = ta.rl.log_ratios(logps, old, sequences.owners, len(sequences.ends), policy.level)
    clip = policy.clip_low, policy.clip_high, policy.clip_ratio
    values, clipped = ta.rl.policy_loss(logps, log_ratios, batch.advantage, *clip)  # (M,)
    values = values * ta.rl.mismatch_weights(old, batch.sampled, bound, policy.mismatch)
    figures = {"clipped": clipped.float().sum(), "mismatch": watch.add(old - batch.sampled)}
    if policy.kl_coef:
        figures["kl"] = ta.rl.k3(logps, batch.reference).detach().sum()
        if policy.kl == "loss":
            kl = ta.rl.k2(logps, batch.reference) * log_ratios.detach().exp()
            values = values + policy.kl_coef * kl
    # the weights of tokens are what --divide asks for
    return (values * sequences.weights).sum(), len(logps), figures | batch.figures


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    policy, longest = config.policy.filled(), config.rollouts.max_new_tokens
    ta.check_engine(config.engine, config.vllm)
    refuse_idle(config.chat, PROMPT.idle, "only answers that the model samples are learned")
    if config.rollouts.num_answers < 2:
        raise ValueError("--num-answers 1: answers are compared with each other, give 2 or more")
    if not policy.kl_coef and config.reference != ta.ReferenceConfig():
        raise ValueError("--reference and its flags have no effect without --kl-coef: add it")
    if config.reference.reference == "cached":
        raise ValueError("--reference cached: answers are not known before training, give frozen")
    config = ta.train_builtin_first(config, "builtin-begun")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    sources = config.data.data, config.data.val_data
    files, val_files = ta.data_or_builtin(*sources, "practice", config.model.hub)
    tools = ta.rl.open_tools(config.tools, tokenizer, config.reward)
    asked = (tokenizer, config.chat, config.data, run.seed, tools)
    prompts, data = ta.rl.prepare_prompts(files, *asked)
    held_out, _ = ta.rl.prepare_prompts(val_files, *asked)
    setup = config.model, config.adapter, config.compute
    model = ta.load_model(*setup, tokenizer, run.device, seed=run.seed)
    # the policy that is sampled is the policy that trains
    model.dropout, model.temperature = False, config.rollouts.temperature
    model.eval()
    ta.check_prompts([ids for _, ids in prompts + held_out], *ta.limits_of(model), room=longest)

    batches = ta.train_batches(data, config.batches, packed=model.packed, default_batch_size=32)
    updates = config.rollouts.updates
    batches = ta.rl.rollout_steps(batches, updates, config.batches)
    # which log-probabilities of the answers a rollout's file holds beside the sampler's
    logprobs, reference = {}, None
    if updates > 1:
        logprobs["trainer"] = model.logprobs
    if policy.kl_coef:
        reference = ta.open_reference(config.reference, model, tokenizer, *setup, run.seed)
        logprobs["reference"] = reference.token_logps
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-6, adapted=1e-5, builtin=3e-4
    )
    optimizer = ta.make_optimizer(model, optim)
    # an update waits for the round that a server makes while the step is computed
    optimizer.register_step_pre_hook(lambda *_: rollouts.join())
    ta.rl.end_if_dry_run(config.loop, model, batches, optimizer, config.rollouts)
    pool = ta.rl.RewardPool(config.reward, run.device, batches.max_tokens)
    # where a server reads new weights
    weights = run.folder / "weights"
    engine = ta.rl.start_engine(config.engine, config.vllm, config.model, model, tokenizer, weights)
    made_of = (prompts, batches, tokenizer, config.rollouts, policy)
    rollouts = ta.rl.Rollouts(run.folder, model, *made_of, pool, logprobs, engine, tools)
    # stops the run where sampler and trainer disagree
    watch = ta.rl.MismatchWatch(policy.max_mismatch, run.folder)

    def before_step(number, _):
        watch.check()
        if reference is not None:
            reference.follow(number)
        # generated, rewarded and written to a file, or read from it
        rows = rollouts.at(number)
        rewards = ta.rl.rewards_of(rows)  # (P, G)
        if policy.kl_coef and policy.kl == "reward":
            rewards = rewards - policy.kl_coef * ta.rl.kl_of(rows)
        advantages = ta.rl.advantages(rewards, policy.advantage)  # (P, G)
        # the share of this update in the prompts of the round
        part = slice(number % updates, None, updates)
        figures = ta.rl.figures_of(rows, rollouts.spent)
        limits = longest, batches.max_tokens, model.packed
        return ta.rl.rollout_batches(rows[part], advantages[part], policy, *limits, figures)

    def evaluate(done):
        records = [record for record, _ in held_out]
        made_by = {"reference": reference and reference.of_new, "respond": rollouts.respond}
        return ta.generate_samples(run, model, tokenizer, records, done, longest=longest, **made_by)

    figures = ta.train(
        run,
        model,
        batches,
        partial(step, policy, watch),
        optimizer,
        optim,
        evaluate=evaluate if held_out or config.samples.samples_data else None,
        before_step=before_step,
        more_state=rollouts.state | (reference.state if reference else {}),
        resume_key=asdict(policy),
    )
    rollouts.close()
    return ta.export_run(run, model, tokenizer, data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
