"""Train a language model to see and hear: a frozen encoder, a trained projector and a language model (whole, by adapter, or frozen).

    python recipes/multimodal.py                                   # built-in tiny model, encoder, generated pictures and questions
    python recipes/multimodal.py --model-path MODEL --image-encoder clip --image-encoder-path CLIP --data pictures.jsonl --image-root DIR
    python recipes/multimodal.py ... --freeze-language-model       # the projector alone; --adapter lora trains an adapter beside it
    python recipes/multimodal.py ... --image-features CACHE        # features made once by recipes/preprocess_images.py
    torchrun --nproc-per-node 8 recipes/multimodal.py ...          # the same losses on 8 devices

A line of data: {"messages": [{"role": "user", "type": "image", "content": "cat.png"}, {"role": "user", "content": "What is this?"},
{"role": "assistant", "content": "A cat."}]}; the content of a message may also be a list of such parts.
"""

from dataclasses import dataclass
from functools import partial

from ta.cli import cli
from ta.data.loader import read_ahead
from ta.folders import SEEING, ModelConfig
from ta.media.settings import MediaConfig, open_media
from ta.parallel import init
from ta.train import run_folder
from ta.train.loop import LoopConfig, train
from ta.train.optim import SEEING_LR
from ta.train.run import RunConfig, evaluate_with, finish, open_parts, open_run


@dataclass(frozen=True)
class Multimodal(RunConfig):
    loop: LoopConfig = LoopConfig(out="runs/multimodal")
    model: ModelConfig = ModelConfig(model_path=SEEING)
    media: MediaConfig = MediaConfig()


def step(fill, model, batch):
    """Weighted sum of -log p over learned tokens, and their weight; pictures and sounds that are not features yet are encoded first."""
    return model.loss(fill(batch)), batch.seqs.weights.sum(), {}


def main(config: Multimodal) -> None:
    from ta.media import multimodal

    run_folder.check_out(config.loop.out, config.loop.resume, config.loop.overwrite)
    if config.media.freeze_language_model and config.adapter.adapter != "none":
        raise ValueError(
            f"--freeze-language-model with --adapter {config.adapter.adapter}, which would train it: give one of the two"
        )
    opened = open_media(config.media, config.data.data, init())
    around = partial(
        multimodal.around, opened, freeze=config.media.freeze_language_model, seed=config.loop.seed
    )
    parts = open_parts(
        config, "media", usual_lr=SEEING_LR, placeholders=opened.placeholders, around=around
    )
    learn = partial(step, partial(multimodal.fill, opened))
    scale = (
        multimodal.projector_lr(config.media, config.model.model_path, parts.optim.lr)
        / parts.optim.lr
    )
    same = multimodal.identity(opened, config.media, parts.data) | {
        "projector_lr": scale * parts.optim.lr
    }
    dress = lambda data: multimodal.dress(opened, data, read=data is parts.data.train)
    with open_run(
        config,
        parts,
        dress=dress,
        identity=same,
        usual_batch=8 if config.model.model_path == SEEING else 64,
    ) as run:
        evaluate = evaluate_with(
            run, config, learn, embed=partial(multimodal.embed_prompts, opened)
        )
        scales = {"projectors.": scale}
        train(
            run.model,
            read_ahead(run.feed),
            learn,
            config.loop,
            run.optim,
            identity=run.identity,
            evaluate=evaluate,
            lr_scales=scales,
        )
        finish(run, config, multimodal.write_parts(opened, run.model))


if __name__ == "__main__":
    cli(main, Multimodal)
