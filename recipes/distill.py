"""Distillation: a student learns a teacher's whole distribution at each token of an answer.

    python recipes/distill.py                          # built-in teacher and student
    python recipes/distill.py --model-path STUDENT --teacher-path TEACHER --data chats.jsonl
    python recipes/distill.py --no-on-policy ...       # on the answers of the data
    python recipes/distill.py --teacher-url http://HOST:8000 --divergence reverse ...

On policy (GKD, arXiv 2306.13649) the answers are the student's own, written to
OUT/rollouts (a file a round) before the update; the answers of the data are then not read. Held-out
figures are those of the data's answers, on policy too. The divergences stand in
ta/model/logprobs.py; no tensor of tokens times vocabulary exists.

A record, one line of the file:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import ta
from ta import Range
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
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/distill")
    samples: ta.SamplesConfig = ta.SamplesConfig(sample_records=256)
    rollouts: ta.rl.RolloutConfig = ta.rl.RolloutConfig(num_answers=1)
    teacher_path: str | None = None
    """Folder of the teacher (a model, an adapter or a run), of the student's vocabulary. Default:
    the fine-tuned built-in model."""
    teacher_url: str | None = None
    """A vLLM server as the teacher, which gives the log-probabilities of sampled tokens alone."""
    on_policy: bool = True
    """Learn on answers that the student samples, not on those of the data."""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon."""
    js_beta: Annotated[float, Range(0, below=1, above=True)] = 0.5
    """Only for js: the share of the teacher in the mixture that both are compared with."""


def step(config: Config, teacher, model, batch):
    """The sum of the divergence over learned tokens, and the weight by which it is divided."""
    import torch

    with torch.no_grad():
        predictions = teacher.predictions(batch)
    values = model.divergences(batch, predictions, config.divergence, config.js_beta)  # (M,)
    return (values * batch.weights).sum(), batch.weights.sum(), {}


def sampled_step(model, batch):
    """The same of reverse, of the tokens that the student sampled alone.

    Half the squared gap of the log-probabilities has in the mean the gradient of the KL.
    """
    logps = model.logprobs(batch.sequences)  # (M,)
    kl = ta.rl.k3(logps, batch.reference).detach().sum()
    return ta.rl.k2(logps, batch.reference).sum(), len(logps), {"kl": kl}


def load_teacher(config: Config, path: ta.ModelConfig, tokenizer, model):
    """The teacher, frozen and whole on every process, which computes as the student does."""
    ta.check_same_vocabulary("--teacher-path", ta.resolve(path).tokenizer, tokenizer)
    teacher, note = ta.wrap(ta.load_for_inference(path, model.device))
    teacher.temperature = config.rollouts.temperature
    if "native" in (model.mode, teacher.mode):
        raise ValueError(
            f"a head cannot be separated, of which all logits are compared: {model.note or note}"
        )
    slower = max(model.mode, teacher.mode, key=("packed", "padded").index)
    model.set_mode(slower), teacher.set_mode(slower)
    return teacher


def main(config: Config):
    """Distil; returns the folder of the export and the last figures of held-out records."""
    if config.divergence != "js" and config.js_beta != 0.5:
        raise ValueError("--js-beta has no effect without --divergence js: leave it out")
    plain = dataclasses.replace(Config().rollouts, temperature=config.rollouts.temperature)
    if not config.on_policy and config.rollouts != plain:
        raise ValueError(
            "--num-answers, --max-new-tokens, --slots, --updates and --ahead have no effect with "
            "--no-on-policy: leave them out"
        )
    sampled = config.teacher_url is not None
    if sampled and not (config.divergence == "reverse" and config.rollouts.temperature == 1):
        raise ValueError(
            "--teacher-url tells of sampled tokens alone, at temperature 1: give --divergence "
            "reverse, and leave --temperature out"
        )
    if sampled and (config.teacher_path or not config.on_policy):
        raise ValueError("--teacher-url: leave --teacher-path and --no-on-policy out")
    path = ta.ModelConfig(config.teacher_path or "builtin", dtype=config.model.dtype)
    if not sampled:
        teacher = dataclasses.replace(config, model=path)
        path = ta.train_builtin_first(teacher, flag="--teacher-path").model
    config = ta.train_builtin_first(config, "builtin-begun")
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "practice", config.model.hub
    )
    # on policy the answers of the data are read for held-out figures alone
    if config.on_policy and (sampled or not val_files):
        refuse_idle(config.chat, PROMPT.idle, "only answers that the student samples are learned")
    asked = (tokenizer, config.chat, config.data, run.seed)
    prompts = []
    if config.on_policy:
        prompts, train_data = ta.rl.prepare_prompts(files, *asked)
    else:
        train_data = ta.prepare_chats(files, *asked)
    val_data = ta.prepare_chats(val_files, *asked)
    model = ta.load_model(
        config.model, config.adapter, config.compute, tokenizer, run.device, seed=run.seed
    )
    # what the student samples is what it learns
    model.dropout, model.temperature = False, config.rollouts.temperature
    model.eval()
    ta.check_context(model, train_data, val_data)
    logprobs = {}
    if sampled:
        teacher = ta.open_server(config.teacher_url, "--teacher-url", tokenizer)
        logprobs["reference"], learn, key = teacher.logprobs, sampled_step, config.teacher_url
    else:
        teacher = load_teacher(config, path, tokenizer, model)
        learn, key = partial(step, config, teacher), ta.fingerprint(ta.resolve(path).base)

    batches = ta.train_batches(
        train_data, config.batches, packed=model.packed, default_batch_size=32
    )
    updates = config.rollouts.updates
    batches = ta.rl.rollout_steps(batches, updates, config.batches)
    val_batches = ta.val_batches(val_data, config.batches, packed=model.packed)
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=1e-5, adapted=1e-4, builtin=1e-3
    )
    made_of = (prompts, batches, tokenizer, config.rollouts)
    rollouts = ta.rl.Rollouts(run.folder, model, *made_of, logprobs=logprobs)

    def before_step(number, _):
        rows = rollouts.at(number)[number % updates :: updates]
        made = ta.rl.answer_batches(ta.rl.sampled(rows), batches.max_tokens, model.packed)
        return made if sampled else [batch.sequences for batch in made]

    def evaluate(done):
        samples = ta.generate_samples(run, model, tokenizer, val_data, done)
        # a server tells nothing of answers that the student did not sample
        figures = {} if sampled else ta.mean_over(model, val_batches, learn)
        return ta.join_figures(figures, samples)

    figures = ta.train(
        run,
        model,
        batches,
        learn,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate,
        before_step=before_step if config.on_policy else None,
        more_state=rollouts.state if config.on_policy else None,
        resume_key={"teacher": key},
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
