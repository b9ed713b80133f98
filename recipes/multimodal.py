"""Train a language model to see and hear: a projector from a frozen encoder's features.

The language model is trained whole, by an adapter, or not at all.

    python recipes/multimodal.py                             # built-in model, encoder and pictures
    python recipes/multimodal.py --model-path MODEL --data pictures.jsonl --image-root DIR \\
        --image-encoder clip --image-encoder-path CLIP
    python recipes/multimodal.py ... --freeze-language-model  # the projector alone
    python recipes/multimodal.py ... --adapter lora           # an adapter beside it
    python recipes/multimodal.py --model-path runs/see/final ...  # goes on with its projector
    python recipes/multimodal.py ... --image-features CACHE   # made by recipes/preprocess_images.py
    torchrun --nproc-per-node 8 recipes/multimodal.py ...     # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "type": "image", "content": "cat.png"},
{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]}; the
content of a message may also be a list of such parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import ta


@dataclass(frozen=True)
class Config:
    model: ta.ModelConfig = ta.ModelConfig(model_path="builtin-pictures")
    tokenizer: ta.TokenizerConfig = ta.TokenizerConfig()
    adapter: ta.AdapterConfig = ta.AdapterConfig()
    compute: ta.ComputeConfig = ta.ComputeConfig()
    chat: ta.ChatConfig = ta.ChatConfig()
    data: ta.DataConfig = ta.DataConfig()
    batches: ta.BatchConfig = ta.BatchConfig()
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/multimodal")
    samples: ta.SamplesConfig = ta.SamplesConfig()
    media: ta.media.MediaConfig = ta.media.MediaConfig()


def step(media, model, batch):
    """Weighted sum of -log p over learned tokens, and their weight.

    Pictures and sounds that are not features yet are encoded first.
    """
    batch = ta.media.with_features(media, batch)
    return model.loss(batch), batch.sequences.weights.sum(), {}


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    if config.media.freeze_language_model and config.adapter.adapter != "none":
        raise ValueError(
            f"--freeze-language-model with --adapter {config.adapter.adapter}, which would train "
            "it: give one of the two"
        )
    run = ta.start_run(config)
    # a model that sees or hears already goes on with its encoders and projectors
    media = ta.media.open_media(
        config.media,
        config.data.data,
        run.device,
        folder=ta.resolve(config.model).media,
        hub=config.model.hub,
    )
    if "image" in media:
        run.pictures = media["image"].root
    tokenizer = ta.load_chat_tokenizer(
        config.model, config.tokenizer, config.chat, media.placeholders, run.day
    )
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "pictures", config.model.hub
    )
    prepare, asked = ta.media.prepare_media_chats, (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = prepare(files, *asked), prepare(val_files, *asked)
    model = ta.load_model(
        config.model,
        config.adapter,
        config.compute,
        tokenizer,
        run.device,
        seed=run.seed,
        around=partial(
            ta.media.with_projectors,
            media,
            tokenizer,
            freeze=config.media.freeze_language_model,
            seed=run.seed,
        ),
    )
    ta.check_context(model, train_data, val_data)

    builtin = config.model.model_path == "builtin-pictures"
    batches = ta.train_batches(
        train_data,
        config.batches,
        packed=model.packed,
        collate=partial(ta.media.collate_media, media),
        default_batch_size=8 if builtin else 64,
    )
    val_batches = ta.val_batches(
        val_data,
        config.batches,
        packed=model.packed,
        collate=partial(ta.media.collate_media, media, read=False),
    )
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=2e-5, adapted=2e-4, builtin=8e-4
    )
    projector_lr = ta.media.projector_lr(config.media, media, config.model.model_path, optim.lr)
    optimizer = ta.make_optimizer(model, optim, {"projectors.": projector_lr / optim.lr})
    learn = partial(step, media)

    def evaluate(done):
        figures = ta.mean_over(model, val_batches, learn)
        samples = ta.generate_samples(
            run,
            model,
            tokenizer,
            val_data,
            done,
            encode=ta.media.encode_media_prompts,
            embed=partial(ta.media.embed_media_prompts, media, tokenizer),
        )
        return ta.join_figures(figures, samples)

    key = ta.media.media_resume_key(media, config.media, train_data, val_data)
    ta.preview(train_data, tokenizer, val_data)
    figures = ta.train(
        run,
        model,
        ta.read_ahead(batches),
        learn,
        optimizer,
        optim,
        evaluate=evaluate,
        resume_key=key | {"projector_lr": projector_lr},
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
