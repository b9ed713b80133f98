"""What every training recipe does around its step: open format, data, model and run folder; evaluate with cherry-picks; export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta import parallel
from ta.builtin import data_files
from ta.chat.encode import encode_chats
from ta.chat.template import ChatConfig, export_template
from ta.chat.tokenizer import ChatTokenizer, TokenizerConfig, disagreement, load_chat_tokenizer
from ta.data.loader import Feed, evaluation_batches, training_feed
from ta.data.prepare import (
    KINDS,
    DataConfig,
    Prepared,
    first_records,
    prepare,
    preview,
    write_drops,
)
from ta.folders import ModelConfig, fingerprint, resolve
from ta.generation.samples import CherryConfig, check_cherries, pick_cherries
from ta.media.dialogue import MEDIA_CHATS, place_media
from ta.model.adapter_settings import AdapterConfig
from ta.model.arguments import check_quantize
from ta.model.export import export
from ta.model.load import ComputeConfig, load_model
from ta.train import run_folder
from ta.train.loop import LoopConfig, check_loop, mean_over
from ta.train.optim import USUAL_LR, OptimConfig, check_optim, with_default_lr
from ta.train.report import write_report
from ta.train.trackers import check_sinks

if TYPE_CHECKING:
    from ta.chat.tokenizer import Placeholder
    from ta.data.loader import Dress
    from ta.generation.samples import Embed
    from ta.model.language_model import LanguageModel


@dataclass(frozen=True)
class RunConfig:
    """The settings that training recipes share; a recipe adds its own."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    adapter: AdapterConfig = AdapterConfig()
    compute: ComputeConfig = ComputeConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    loop: LoopConfig = LoopConfig()
    optim: OptimConfig = OptimConfig()
    cherry: CherryConfig = CherryConfig()


class Data(NamedTuple):
    """Prepared records of one kind."""

    train: Prepared
    held_out: Prepared | None
    held_out_records: list[dict]  # the first ones, as read, for cherry-picks


class Parts(NamedTuple):
    """What a run is made of, before anything is written."""

    model: LanguageModel
    tokenizer: ChatTokenizer
    data: Data
    optim: OptimConfig
    note: str  # about the model, for the user


class Run(NamedTuple):
    """An open run: what `train`, `evaluate_with` and `finish` need."""

    model: LanguageModel
    tokenizer: ChatTokenizer
    data: Data
    feed: Feed
    optim: OptimConfig
    held_out: list  # this process's evaluation batches
    identity: dict[str, Any]  # what must not differ on resume


def open_data(config: RunConfig, tokenizer: ChatTokenizer, kind: str) -> Data:
    """Training and held-out records of a kind: the sources given, or the built-in ones."""
    sources, val_sources = data_files.data_or_builtin(
        config.data.data, config.data.val_data, data_files.NAMES[kind]
    )
    make = lambda files: prepare(
        files,
        tokenizer,
        config.chat,
        config.data,
        config.loop.seed,
        kind=(KINDS | {"media": MEDIA_CHATS})[kind],
    )
    train, held_out = make(sources), make(val_sources)
    shown = first_records(held_out, config.cherry.cherry_records) if held_out else []
    return Data(train, held_out, shown)


def open_parts(
    config: RunConfig,
    kind: str,
    *,
    model_kind: Literal["causal", "seq_cls"] = "causal",
    num_labels: int = 1,
    usual_lr: tuple[float, float, float] = USUAL_LR,
    placeholders: Mapping[str, Placeholder] = {},
    around: Callable[[ChatTokenizer], Callable[[LanguageModel], LanguageModel]] | None = None,
) -> Parts:
    """Format, data and model of a run, in the order of what they cost; writes nothing. `usual_lr` is what `with_default_lr` takes.

    `placeholders` are those of media records; `around(format)` gives what `load_model` puts around the language model.
    """
    check_loop(config.loop)
    check_optim(config.optim)
    adapted = config.adapter.adapter != "none" or resolve(config.model).adapter is not None
    check_quantize(config.compute.quantize, adapted, parallel.world())
    device = parallel.init()
    if config.model.model_path.startswith("builtin"):
        parallel.one_thread()
    loop, optim = (
        config.loop,
        with_default_lr(config.optim, config.model.model_path, config.adapter.adapter, usual_lr),
    )
    run_folder.check_out(loop.out, loop.resume, loop.overwrite)
    check_sinks(loop.log)
    check_cherries(config.cherry)
    tokenizer = load_chat_tokenizer(config.model, config.tokenizer, config.chat, placeholders)
    data = open_data(config, tokenizer, kind)
    more = {"around": around(tokenizer)} if around else {}
    model = load_model(
        config.model,
        config.adapter,
        config.compute,
        tokenizer,
        device,
        num_labels=num_labels if model_kind == "seq_cls" else None,
        seed=loop.seed,
        **more,
    )
    return Parts(model, tokenizer, data, optim, model.note)


@contextmanager
def open_run(
    config: RunConfig,
    parts: str | Parts,
    *,
    dress: Callable[[Prepared], Dress] | None = None,
    identity: dict[str, Any] | None = None,
    usual_batch: int = 64,
) -> Iterator[Run]:
    """Everything up to the first step; nothing is written before the settings, the data and the model have proved sound, and nothing is left of
    what proves wrong before the first figure.

    `parts` comes of `open_parts`, or is the kind of record to open it with. `dress(prepared)`, called for training and for held-out records, gives
    the function that makes the method's own batch of a Batch and its records; `identity` adds what must not differ on resume.
    """
    model, tokenizer, data, optim, note = (
        parts if isinstance(parts, Parts) else open_parts(config, parts)
    )
    loop = config.loop
    shape = {"max_tokens_per_micro": loop.max_tokens_per_micro, "packed": model.mode == "packed"}
    dress = dress or (lambda prepared: lambda batch, records: batch)
    batch_size = usual_batch if loop.batch_size is None else loop.batch_size
    length = {
        "batch_size": batch_size,
        "seed": loop.seed,
        "steps": loop.steps,
        "epochs": loop.epochs,
    }
    feed = training_feed(data.train, **length, **shape, dress=dress(data.train))
    held_out = (
        evaluation_batches(data.held_out, **shape, dress=dress(data.held_out))
        if data.held_out
        else []
    )
    same = {
        "data": data.train.info["fingerprint"],
        "model": fingerprint(config.model.model_path, config.model.hub),
        "quantize": config.compute.quantize,
        **dataclasses.asdict(config.adapter),
        "adapter_path": config.model.adapter_path,
        "steps": feed.steps,
        "batch_size": batch_size,
        "seed": loop.seed,
        **dataclasses.asdict(optim),
        **(identity or {}),
    }
    about = {"identity": same, "machine": parallel.machine()}
    opening = lambda: run_folder.open_run(loop.out, config, loop.resume, loop.overwrite, about)
    with nullcontext() if loop.dry_run else parallel.on_rank_zero(opening):
        parallel.say(note)
        preview(data.train, tokenizer)
        if parallel.rank() == 0 and not loop.dry_run:
            write_drops(data.train, str(Path(loop.out) / "drops.jsonl"))
        try:
            yield Run(model, tokenizer, data, feed, optim, held_out, same)
        except ValueError:
            if parallel.rank() == 0 and not loop.dry_run:
                run_folder.forget(Path(loop.out))
            raise
    parallel.close()


def evaluate_with(
    run: Run,
    config: RunConfig,
    step,
    more: Callable[[int, list], dict[str, float]] | None = None,
    before_step: Callable[[LanguageModel, list], list] | None = None,
    embed: Embed | None = None,
    as_asked: Callable[[list[dict]], list[dict]] = lambda records: records,
) -> Callable[[int], dict] | None:
    """evaluate(step number) for `train`: held-out loss and metrics of `step`, cherry-picks, and `more(step number, batches)`.

    None without held-out data. `before_step` is the one given to `train`: it then sees all held-out batches at once. `embed` gives the
    embeddings of prompts with media. `as_asked` gives the records of cherry-picks as the model is to see them, on all processes at once.
    """
    if not run.held_out:
        return None
    from ta.data.batch import to_device

    def evaluate(done: int) -> dict[str, float]:
        """Figures after step `done`."""
        device = next(run.model.parameters()).device
        batches = [to_device(batch, device) for batch in run.held_out]
        batches = before_step(run.model, batches) if before_step else batches
        figures = mean_over(run.model, batches, step)
        if config.cherry.cherry_records and run.model.generates:
            records = as_asked(run.data.held_out_records)
            figures |= pick_cherries(
                run.model,
                records,
                run.tokenizer,
                config.chat,
                config.cherry,
                Path(config.loop.out),
                done,
                config.loop.seed,
                embed,
            )
        return figures | (more(done, batches) if more else {})

    return evaluate


def finish(run: Run, config: RunConfig, write: Callable[[Path], None] | None = None) -> None:
    """Export the trained model (or adapter) to OUT/final, and say where its template would not give the ids that were trained.

    `write(folder)` adds what else belongs to the model.
    """
    tokenizer, whole = run.tokenizer, dataclasses.replace(config.chat, max_tokens=None)
    if not (whole.system_prompt or whole.ignore_system_prompt):
        chats = [
            place_media(record["messages"], tokenizer.placeholders)[0]
            for record in run.data.held_out_records
            if "messages" in record
        ]
        ids = [getattr(tokens, "ids", None) for tokens in encode_chats(chats, tokenizer, whole)]
        kept = [i for i, known in enumerate(ids) if known]
        gap = disagreement(
            tokenizer.fast, tokenizer.template, [chats[i] for i in kept], [ids[i] for i in kept]
        )
        parallel.say(
            gap
            and f"note: apply_chat_template of the export differs from training where pieces of text meet: {gap}"
        )
    if parallel.rank() == 0:
        write_report(Path(config.loop.out))
    final = Path(config.loop.out) / "final"
    export(
        run.model.inner,
        run.tokenizer.fast,
        final,
        export_template(run.tokenizer.template),
        run.tokenizer.stop_ids,
        write,
    )
    parallel.say(f"done: {final}")
