"""Built-in models after fine-tuning on built-in records: where methods start when no model is given."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ta.builtin import data_files, models
from ta.chat.template import ChatConfig, export_template
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.loader import training_feed
from ta.data.prepare import DataConfig, prepare_chats
from ta.folders import READER, SMALL, TUNED, WORDY, ModelConfig, tuned_folder, written
from ta.model.adapter_settings import AdapterConfig
from ta.model.export import export
from ta.model.load import ComputeConfig, load_model
from ta.parallel import barrier, gather_objects, init, rank, say
from ta.rag.index import EncoderConfig, begin, build
from ta.train.loop import LoopConfig, train
from ta.train.optim import OptimConfig

if TYPE_CHECKING:
    from ta.train.run import RunConfig

    Config = TypeVar("Config", bound=RunConfig)


class Warmth(NamedTuple):
    """How a built-in model is fine-tuned first."""

    base: str  # --model-path
    records: str  # the built-in ones it learns
    steps: int
    batch_size: int
    lr: float
    what: str


WARMTH = {
    TUNED: Warmth(
        "builtin",
        "chats",
        models.TINY_STEPS,
        models.TINY_BATCH,
        models.TINY_LR,
        "the built-in model on built-in chats",
    ),
    WORDY: Warmth(
        TUNED,
        "wordy",
        150,
        16,
        3e-4,
        'that model on chats whose answers are mostly wordy ("5, of course!")',
    ),
    READER: Warmth(
        SMALL, "readings", 150, 32, 3e-3, "a small built-in model on questions with their passages"
    ),
}


def warm_start(config: Config, name: str = TUNED) -> Config:
    """The config, with a fine-tuned built-in model in place of the random one: preferences among answers need a model that answers, passages one
    that reads."""
    if config.model.model_path != "builtin":
        return config
    _make(init(), name)
    say(f"no --model-path: starting from the fine-tuned built-in model in {tuned_folder(name)}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_path=name))


def _make(device: str, name: str) -> None:
    """Fine-tune the model of that name where the cache has none, after the one it starts from."""
    if gather_objects(tuned_folder(name).exists())[0]:
        return
    how = WARMTH[name]
    if how.base in WARMTH:
        _make(device, how.base)
    say(f"no --model-path: fine-tuning {how.what} first, once ({how.steps} steps)")
    fine_tune(device, name)


def fine_tune(device: str, name: str = TUNED) -> None:
    """Train a built-in model as recipes/sft.py does, into the cache; all processes take part."""
    folder, how = tuned_folder(name), WARMTH[name]
    work = folder.with_name(f".{folder.name}.{gather_objects(os.getpid())[0]}.tmp")
    start = ModelConfig(model_path=how.base)
    tokenizer = load_chat_tokenizer(start, TokenizerConfig(), ChatConfig())
    sources, _ = data_files.data_or_builtin((), (), how.records)
    prepared = prepare_chats(sources, tokenizer, ChatConfig(), DataConfig())
    model = load_model(start, AdapterConfig(), ComputeConfig(), tokenizer, device)
    loop = LoopConfig(out=str(work), steps=how.steps, batch_size=how.batch_size)
    feed = training_feed(
        prepared,
        batch_size=loop.batch_size,
        max_tokens_per_micro=loop.max_tokens_per_micro,
        seed=loop.seed,
        steps=loop.steps,
        epochs=1,
        packed=model.mode == "packed",
    )
    if rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
    barrier()
    try:
        train(
            model,
            feed,
            lambda model, batch: (model.loss(batch), batch.weights.sum(), {}),
            loop,
            OptimConfig(lr=how.lr),
        )
        export(
            model.inner,
            tokenizer.fast,
            folder,
            export_template(tokenizer.template),
            tokenizer.stop_ids,
        )
    finally:
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)


def builtin_index() -> Path:
    """The index of the built-in passages by the built-in encoder; built once."""

    def write(folder: Path) -> None:
        begin(folder, (str(data_files.passages_file()),), EncoderConfig(), overwrite=True)
        build(folder, "cpu")

    return written("index", write)
