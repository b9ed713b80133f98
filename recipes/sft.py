"""Supervised fine-tuning on chats: the mean of -log p over the learned tokens of a global batch.

    python recipes/sft.py                              # built-in tiny model and data
    python recipes/sft.py --model-path MODEL --data chats.jsonl --val-data held_out.jsonl
    torchrun --nproc-per-node 8 recipes/sft.py ...     # the same losses on 8 devices

A record, one line of the file:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
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
    context: ta.ContextConfig = ta.ContextConfig()
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/sft")
    samples: ta.SamplesConfig = ta.SamplesConfig()


def step(model, batch):
    """The sum of the loss, and the weight by which the sum over the global batch is divided."""
    return model.loss(batch), batch.weights.sum(), {}


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    # device, seed and run folder; nothing is written yet
    run = ta.start_run(config)
    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "chats", config.model.hub
    )
    train_data = ta.prepare_chats(files, tokenizer, config.chat, config.data, run.seed)
    val_data = ta.prepare_chats(val_files, tokenizer, config.chat, config.data, run.seed)
    setup = config.model, config.adapter, config.compute
    model = ta.load_model(*setup, tokenizer, run.device, seed=run.seed)
    ta.check_context(model, train_data, val_data)
    # processes that share a row (--context-parallel)
    parts = ta.row_parts(config.context, model)

    batches = ta.train_batches(
        train_data,
        config.batches,
        packed=model.packed,
        default_batch_size=8 if config.model.model_path == "builtin" else 64,
        parts=parts,
    )
    val_batches = ta.val_batches(val_data, config.batches, packed=model.packed, parts=parts)
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=2e-5, adapted=2e-4, builtin=1.5e-3
    )

    reference = None
    if "kl_to_reference" in config.samples.sample_metrics:
        # the model at its start; dropout is off beside it
        reference = ta.open_reference(ta.ReferenceConfig(), model, tokenizer, *setup)

    def evaluate(done):
        figures = ta.mean_over(model, val_batches, step)
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
        step,
        ta.make_optimizer(model, optim),
        optim,
        evaluate=evaluate,
    )
    records = ta.first_records(val_data, config.samples.sample_records)
    return ta.export_run(run, model, tokenizer, train_data, figures, records)


if __name__ == "__main__":
    ta.cli(main, Config)
