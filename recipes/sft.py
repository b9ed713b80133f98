"""Supervised fine-tuning on chats: the mean of -log p over the learned tokens of the whole global batch.

    python recipes/sft.py                                          # built-in tiny model and data
    python recipes/sft.py --model-path MODEL --data chats.jsonl --val-data held_out.jsonl --out runs/mine
    torchrun --nproc-per-node 8 recipes/sft.py ...                 # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ta import demo, log, parallel
from ta.adapter_settings import AdapterConfig
from ta.chat import encode_chats
from ta.cherry import CherryConfig, pick_cherries
from ta.cli import cli
from ta.dataset import DataConfig, Encoded, prepare, report, write_drops
from ta.export import export
from ta.feed import evaluation_batches, training_feed
from ta.kinds import check_chat
from ta.loop import LoopConfig, mean_over, train
from ta.model import ModelConfig, fingerprint, format_settings, open_format, open_model
from ta.optim import OptimConfig, with_default_lr
from ta.pieces import Tokens, show
from ta.sources import read_records
from ta.templates import ChatConfig, export_template
from ta.tokenizer import TokenizerConfig


@dataclass(frozen=True)
class Sft:
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    adapter: AdapterConfig = AdapterConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    loop: LoopConfig = LoopConfig()
    optim: OptimConfig = OptimConfig()
    cherry: CherryConfig = CherryConfig()


def step(model, batch):
    """Weighted sum of -log p over learned tokens, and their weight: the loop divides once, by the weight of the global batch."""
    return model(batch, "sum"), batch.weights.sum(), {}


def main(config: Sft) -> None:
    device = parallel.init()
    loop, optim = config.loop, with_default_lr(config.optim, config.model.model_path, config.adapter.adapter)
    log.check_out(loop.out, loop.resume, loop.overwrite)
    form = open_format(config.model, config.tokenizer, config.chat, config.adapter.adapter_path)
    sources, val_sources = demo.data_or_builtin(config.data.data, config.data.val_data, "chats")

    def encode_many(records):
        encoded = encode_chats([record["messages"] for record in records], form.template, form.vocabulary, config.chat)
        return [Encoded((tokens,)) if isinstance(tokens, Tokens) else tokens for tokens in encoded]

    settings = format_settings(form, config.chat, "sft")
    make = lambda paths: prepare(paths, check_chat, encode_many, settings, config.data, seed=loop.seed, chat=config.chat, say=parallel.say)  # noqa: E731
    prepared, val = make(sources), make(val_sources) if val_sources else None
    model, note = open_model(config.model, config.adapter, form, device=device, seed=loop.seed)
    packed = model.mode == "packed"
    feed = training_feed(
        prepared,
        batch_size=loop.batch_size,
        max_tokens_per_micro=loop.max_tokens_per_micro,
        seed=loop.seed,
        steps=loop.steps,
        epochs=loop.epochs,
        packed=packed,
    )
    identity = {
        "data": prepared.info["fingerprint"],
        "model": fingerprint(config.model.model_path, config.model.hub),
        "adapter": dataclasses.asdict(config.adapter),
        "optim": dataclasses.asdict(optim),
        **{name: getattr(loop, name) for name in ("batch_size", "seed")},
        "steps": feed.steps,
    }
    if val:
        held_out = [r.data for _, r in zip(range(config.cherry.cherry_records), read_records(val_sources, check_chat), strict=False)]
        batches = evaluation_batches(val, max_tokens_per_micro=loop.max_tokens_per_micro, packed=packed)

    def evaluate(done: int) -> dict[str, float]:
        cherries = pick_cherries(model, held_out, form, config.chat, config.cherry, Path(loop.out), done, loop.seed)
        return mean_over(model, batches, step) | cherries

    with parallel.on_rank_zero(lambda: log.open_run(loop.out, config, loop.resume, loop.overwrite)):
        parallel.say("\n".join([note] * bool(note) + report(prepared.info)))
        first = Tokens(prepared.ids[: prepared.offsets[1]].tolist(), prepared.weights[: prepared.offsets[1]].tolist())
        parallel.say(show(first, form.tokenizer.decode))
        if parallel.rank() == 0:
            write_drops(prepared, str(Path(loop.out) / "drops.jsonl"))
        train(model, feed, step, loop, optim, identity=identity, evaluate=evaluate if val else None)
        export(model.inner, form.tokenizer, Path(loop.out) / "final", export_template(form.template), form.stop_ids)
    parallel.close()


if __name__ == "__main__":
    cli(main, Sft)
