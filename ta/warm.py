"""The built-in model after fine-tuning on the built-in chats: where preference methods start when no model is given."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, TypeVar

from ta import builtin, demo
from ta.adapter_settings import AdapterConfig
from ta.dataset import DataConfig
from ta.encode import prepare_kind
from ta.export import export
from ta.feed import training_feed
from ta.loop import LoopConfig, train
from ta.model import ModelConfig, open_format, open_model
from ta.optim import OptimConfig
from ta.parallel import barrier, gather_objects, init, rank, say
from ta.templates import ChatConfig, export_template
from ta.tokenizer import TokenizerConfig

if TYPE_CHECKING:
    from ta.run import RunConfig

    Config = TypeVar("Config", bound=RunConfig)


def warm_start(config: Config) -> Config:
    """The config, with the fine-tuned built-in model in place of the random one: preferences among answers need a model that answers."""
    if config.model.model_path != "builtin":
        return config
    device = init()
    if not gather_objects(demo.tuned_folder().exists())[0]:
        say(f"no --model-path: fine-tuning the built-in model on built-in chats first, once ({builtin.TINY_STEPS} steps)")
        fine_tune(device)
    say(f"no --model-path: starting from the fine-tuned built-in model in {demo.tuned_folder()}")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, model_path=demo.TUNED))


def fine_tune(device: str) -> None:
    """Train the built-in model on the built-in chats as recipes/sft.py does, into the cache; all processes take part."""
    folder = demo.tuned_folder()
    work = folder.with_name(f".tuned.{gather_objects(os.getpid())[0]}.tmp")
    form = open_format(ModelConfig(), TokenizerConfig(), ChatConfig())
    sources, _ = demo.data_or_builtin((), (), "chats")
    prepared = prepare_kind("chat", sources, form, ChatConfig(), DataConfig(), say=say)
    model, _ = open_model(ModelConfig(), AdapterConfig(), form, device=device)
    loop = LoopConfig(out=str(work), steps=builtin.TINY_STEPS, batch_size=builtin.TINY_BATCH)
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
        train(model, feed, lambda model, batch: (model(batch, "sum"), batch.weights.sum(), {}), loop, OptimConfig(lr=builtin.TINY_LR))
        export(model.inner, form.tokenizer, folder, export_template(form.template), form.stop_ids)
    finally:
        if rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
