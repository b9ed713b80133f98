"""Write a trained vision-language model in transformers' Llava layout, so that plain transformers and vLLM serve it.

    python recipes/to_llava.py --model-path runs/multimodal/final --out runs/multimodal/llava

Where the parts allow it: a CLIP or SigLIP encoder, an mlp projector, a language model that the layout takes (an adapter is merged). The logits of
both forms are compared before anything is published. In a prompt for it a picture is written as the start token, one placeholder and the end token
(<MS><img></MS>).
"""

from dataclasses import dataclass
from pathlib import Path

from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig
from ta.command_line import cli
from ta.folders import ModelConfig, resolve
from ta.media.settings import MediaFiles, reopen_media
from ta.model.load import load_for_inference


@dataclass(frozen=True)
class ToLlava:
    model_path: str
    """Folder of a trained model or adapter: RUN/final of recipes/multimodal.py."""
    out: str
    """Folder to write."""
    image_encoder_path: str | None = None
    """Folder of the encoder, where it is no longer where it was."""


def main(config: ToLlava) -> None:
    from ta.chat.tokenizer import load_chat_tokenizer
    from ta.media.llava import check_llava, write_llava
    from ta.media.multimodal import media_model_for_inference
    from ta.model.export import published

    out = Path(config.out)
    if out.exists():
        raise ValueError(f"--out {out} exists: give a new folder")
    source = ModelConfig(model_path=config.model_path, dtype="float32")
    sources = resolve(source)
    files = MediaFiles(image_root=".", image_encoder_path=config.image_encoder_path)
    media = reopen_media(sources.media or sources.base, files, (), "cpu")
    if media is None:
        raise ValueError(
            f"{config.model_path} has no media.json, so it reads no pictures: give RUN/final of recipes/multimodal.py"
        )
    check_llava(media)
    tokenizer = load_chat_tokenizer(source, TokenizerConfig(), ChatConfig(), media.placeholders)
    model = media_model_for_inference(media, tokenizer, load_for_inference(source))
    with published(out) as folder:
        gap = write_llava(folder, media, model, tokenizer)
        if gap > 1e-3:
            raise ValueError(
                f"the Llava layout gives logits that differ by {gap:.2g}: this language model computes otherwise there"
            )
    print(f"{config.model_path} -> {out} (logits agree to {gap:.1g})")


if __name__ == "__main__":
    cli(main, ToLlava)
