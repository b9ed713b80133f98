"""Train retriever and generator together: the likelihood of each answer, mixed over passages.

RAG-sequence of Lewis et al. 2020.

    python recipes/rag.py                       # built-in catalogue, questions, encoder, generator
    python recipes/build_index.py --passages passages.jsonl --encoder-path ENCODER --out index
    python recipes/rag.py --model-path MODEL --index index --out runs/rag \\
        --data questions.jsonl --val-data held_out.jsonl
    python recipes/generate.py --model-path runs/rag/final --index runs/rag/final/index \\
        --data questions.jsonl --out answers.jsonl
    torchrun --nproc-per-node 8 recipes/rag.py ...     # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "content": "Anna's key?"}, {"role": "assistant",
"content": "red tea"}], "gold": ["cat-rain"]}; gold, ids of passages that hold the answer, is
optional. Passages are found for the last question whose answer is learned, and only that answer is
learned; what follows it is left out. A line of passages: {"id": "cat-rain", "title": "Keys",
"text": "Anna's is red tea."}.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

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
    optim: ta.OptimConfig = ta.OptimConfig()
    loop: ta.LoopConfig = ta.LoopConfig(out="runs/rag")
    samples: ta.SamplesConfig = ta.SamplesConfig()
    retrieval: ta.rag.RetrievalConfig = ta.rag.RetrievalConfig()
    gold: bool = True
    """While training: where a record names its gold passage and that was not found, it takes the
    place of the last one found."""
    in_batch: Annotated[int, ta.Range(0)] = 0
    """While training: passages of so many other questions of the batch (their gold, else their
    best) join the candidates."""
    encoder_lr: Annotated[float | None, ta.Range(0)] = None
    """Learning rate of the encoder; 0 leaves it as it is. Default: 2e-5; 3e-3 for the built-in
    one."""
    score_scale: Annotated[float | None, ta.Range(0, above=True)] = None
    """Factor on scores before their softmax. Default: 20 where vectors have length 1, else 1."""
    reembed_every: Annotated[int, ta.Range(0)] = 0
    """Steps between embedding all passages anew by the encoder as it then is; 0: never, then only
    questions move."""


def main(config: Config):
    """Train; returns the folder of the export and the last figures of held-out records."""
    if config.retrieval.approximate:
        raise ValueError(
            "--approximate in training: the vectors of questions move, and so may those of "
            "passages; leave it out"
        )
    if config.samples.samples_data:
        raise ValueError("--samples-data: here the held-out questions are answered; leave it out")
    if config.retrieval.num_passages == 1 and not config.in_batch and config.encoder_lr != 0:
        ta.parallel.say(
            "note: with one candidate a question the encoder has nothing to learn from; "
            "give --num-passages 2 or more, or --in-batch"
        )
    config = ta.train_builtin_first(config, "builtin-reader")
    run = ta.start_run(config)
    index = ta.rag.open_index(
        config.retrieval.index or ta.rag.builtin_index(),
        config.retrieval.encoder_path,
        config.model.hub,
        config.retrieval.verify_index,
    )
    encoder, encoder_tokenizer = ta.rag.open_encoder(
        index.encoder, index.embedding_settings, run.device, config.model.dtype, to_shard=True
    )
    encoder_lr = config.encoder_lr
    if encoder_lr is None:
        encoder_lr = 2e-5 if config.retrieval.index else 3e-3
    encoder.requires_grad_(encoder_lr > 0)
    scale = config.score_scale
    if scale is None:
        scale = 20.0 if index.embedding_settings.normalize else 1.0

    tokenizer = ta.load_chat_tokenizer(config.model, config.tokenizer, config.chat, day=run.day)
    files, val_files = ta.data_or_builtin(
        config.data.data, config.data.val_data, "questions", config.model.hub
    )
    asked = (tokenizer, config.chat, config.data, run.seed)
    train_data, val_data = (ta.prepare_questions(some, *asked) for some in (files, val_files))
    model = ta.load_model(
        config.model,
        config.adapter,
        config.compute,
        tokenizer,
        run.device,
        seed=run.seed,
        around=partial(ta.rag.RagModel, encoder=encoder),
    )

    k = config.retrieval.num_passages or 4
    settings = ta.rag.passage_settings(config.retrieval, index.manifest)
    settings = settings._replace(num_passages=k)
    retriever = ta.rag.retriever_of(
        index, encoder_tokenizer, tokenizer, config.chat, settings, run.device
    )
    if config.reembed_every:
        retriever = retriever._replace(table=retriever.table.clone())
    # each sequence of training has one passage, and so has an answer afterwards
    one_passage = retriever._replace(passage_settings=settings._replace(num_passages=1))
    model.retriever = one_passage

    def collate(data):
        return ta.rag.question_collate(data, index.passages)

    batches = ta.train_batches(
        train_data,
        config.batches,
        packed=model.packed,
        collate=collate(train_data),
        default_batch_size=32,
    )
    val_batches = []
    if val_data:
        val_batches = ta.val_batches(
            val_data, config.batches, packed=model.packed, collate=collate(val_data)
        )
    optim = ta.with_default_lr(
        config.optim, config.model, config.adapter, full=2e-5, adapted=2e-4, builtin=1e-3
    )
    optimizer = ta.make_optimizer(model, optim, {"encoder.": encoder_lr / optim.lr})
    learn = partial(ta.rag.rag_step, scale)
    with_passages = partial(
        ta.rag.with_passages,
        retriever,
        model,
        max_tokens_per_micro=config.batches.max_tokens_per_micro,
    )

    def before_step(done, micro_batches):
        if config.reembed_every and done and done % config.reembed_every == 0:
            retriever.table.copy_(ta.rag.reembedded(retriever, model))
        return with_passages(micro_batches, gold=config.gold, in_batch=config.in_batch)

    def evaluate(done):
        held_out = with_passages(val_batches, ranked=ta.rag.RANKED)
        figures = ta.mean_over(model, held_out, learn)
        model.eval()
        records = ta.first_records(val_data, config.samples.sample_records)
        prompts = ta.rag.prompts_with_passages(one_passage, model.embed, records)
        asked = [record for record, _ in prompts]
        samples = ta.generate_samples(run, model, tokenizer, asked, done)
        return ta.join_figures(figures, samples, ta.rag.retrieval_figures(model, held_out, k))

    key = {
        "index": [index.manifest["encoder"], index.manifest["passages_sha256"]],
        "scale": scale,
        "encoder_lr": encoder_lr,
        **retriever.passage_settings._asdict(),
    }
    ta.preview(train_data, tokenizer, val_data)
    figures = ta.train(
        run,
        model,
        batches,
        learn,
        optimizer,
        optim,
        evaluate=evaluate if val_data else None,
        before_step=before_step,
        more_state={"table": retriever.table} if config.reembed_every else None,
        resume_key=key,
    )
    return ta.export_run(run, model, tokenizer, train_data, figures)


if __name__ == "__main__":
    ta.cli(main, Config)
