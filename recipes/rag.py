"""Retriever and generator trained together: the likelihood of each answer, mixed over the passages found (RAG-sequence, Lewis et al. 2020).

    python recipes/rag.py                                          # built-in catalogue, questions, encoder and generator
    python recipes/build_index.py --passages passages.jsonl --encoder-path ENCODER --out index
    python recipes/rag.py --model-path MODEL --index index --data questions.jsonl --val-data held_out.jsonl --out runs/rag
    python recipes/generate.py --model-path runs/rag/final --index runs/rag/final/index --data questions.jsonl --out answers.jsonl
    torchrun --nproc-per-node 8 recipes/rag.py ...                 # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "content": "Anna's key?"}, {"role": "assistant", "content": "red tea"}], "gold": ["cat-rain"]};
gold, ids of passages that hold the answer, is optional. A line of passages: {"id": "cat-rain", "title": "Keys", "text": "Anna's is red tea."}.
"""

from dataclasses import dataclass
from functools import partial

from ta.builtin.fine_tuned import READER, builtin_index, warm_start
from ta.cli import cli
from ta.parallel import init, say
from ta.rag.passages import RetrievalConfig, joining
from ta.train.loop import LoopConfig, train
from ta.train.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Rag(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/rag")
    retrieval: RetrievalConfig = RetrievalConfig()
    gold: bool = True
    """While training: where a record names its gold passage and that was not found, it takes the place of the last one found."""
    in_batch: int = 0
    """While training: passages of so many other questions of the batch (their gold, else their best) join the candidates."""
    encoder_lr: float | None = None
    """Learning rate of the encoder; 0 leaves it as it is. Default: 2e-5; 3e-3 for the built-in one."""
    score_scale: float | None = None
    """Factor on scores before their softmax. Default: 20 where vectors have length 1, else 1."""
    reembed_every: int = 0
    """Steps between embedding all passages anew by the encoder as it then is; 0: never, then only questions move."""


def check(config: Rag) -> None:
    """ValueError for numbers that cannot be."""
    for name, least in (
        ("in_batch", 0),
        ("encoder_lr", 0),
        ("reembed_every", 0),
        ("score_scale", 1e-9),
    ):
        if (value := getattr(config, name)) is not None and not value >= least:
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: must be {'above 0' if least else '0 or more'}"
            )
    if config.retrieval.approximate:
        raise ValueError(
            "--approximate in training: the vectors of questions move, and so may those of passages; leave it out"
        )
    if config.retrieval.num_passages == 1 and not config.in_batch and config.encoder_lr != 0:
        say(
            "note: with one candidate a question the encoder has nothing to learn from; give --num-passages 2 or more, or --in-batch"
        )


def main(config: Rag) -> None:
    from ta.chat.encode import encode_prompts
    from ta.rag import joint
    from ta.rag.embedding import open_encoder
    from ta.rag.retrieval import answerable, retriever_of
    from ta.rag.search import open_index

    check(config)
    device, loop = init(), config.loop
    config = warm_start(config, READER)
    index = open_index(config.retrieval.index or builtin_index(), config.retrieval.encoder_path)
    how = joining(config.retrieval, index.manifest)
    k = config.retrieval.num_passages or 4
    encoder, encoder_tokenizer = open_encoder(
        index.encoder, index.reading, device, config.model.dtype, to_shard=True
    )
    encoder_lr = (
        config.encoder_lr
        if config.encoder_lr is not None
        else 2e-5
        if config.retrieval.index
        else 3e-3
    )
    encoder.requires_grad_(encoder_lr > 0)
    scale = (
        config.score_scale
        if config.score_scale is not None
        else 20.0
        if index.reading.normalize
        else 1.0
    )
    around = lambda tokenizer: lambda generator: joint.RagModel(generator, encoder)
    parts = open_parts(config, "question", usual_lr=(2e-5, 2e-4, 1e-3), around=around)
    retriever = retriever_of(
        index, encoder_tokenizer, parts.tokenizer, config.chat, how._replace(num_passages=k), device
    )
    if config.reembed_every:
        retriever = retriever._replace(table=retriever.table.clone())
    one = retriever._replace(
        how=how._replace(num_passages=1)
    )  # as each sequence of training has it
    same = {
        "index": [index.manifest["encoder"], index.manifest["passages_sha256"]],
        "scale": scale,
        **retriever.how._asdict(),
    }
    same |= {name: getattr(config, name) for name in ("gold", "in_batch", "reembed_every")} | {
        "encoder_lr": encoder_lr
    }

    with open_run(
        config,
        parts,
        dress=partial(joint.asked, passages=index.passages, seed=loop.seed),
        identity=same,
        usual_batch=32,
    ) as run:
        prompts = partial(
            encode_prompts,
            tokenizer=run.tokenizer,
            config=config.chat,
        )
        before = partial(
            joint.with_passages, retriever, max_tokens_per_micro=loop.max_tokens_per_micro
        )

        def as_asked(records):
            run.model.eval()
            return [record for record, _ in answerable(one, run.model.embed, records, prompts)]

        def after_step(done):
            if config.reembed_every and done % config.reembed_every == 0:
                retriever.table.copy_(joint.reembedded(retriever, run.model))

        hooks = {
            "before_step": partial(before, gold=config.gold, in_batch=config.in_batch),
            "after_step": after_step,
        }
        hooks |= {
            "extra": {"table": retriever.table} if config.reembed_every else None,
            "identity": run.identity,
        }
        hooks["lr_scales"] = {"encoder.": encoder_lr / run.optim.lr}
        step, more = (
            partial(joint.step, scale),
            lambda _, batches: joint.figures(run.model, batches, k),
        )
        evaluate = evaluate_with(
            run, config, step, more, partial(before, ranked=joint.RANKED), as_asked=as_asked
        )
        train(run.model, run.feed, step, loop, run.optim, evaluate=evaluate, **hooks)
        finish(run, config, joint.write_retriever(run.model.encoder, one, index))


if __name__ == "__main__":
    cli(main, Rag)
