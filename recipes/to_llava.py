"""Write a trained vision-language model in transformers' Llava layout.

Plain transformers and vLLM serve it.

    python recipes/to_llava.py --model-path runs/multimodal/final --out runs/multimodal/llava

The layout holds a CLIP or SigLIP encoder, an mlp projector and most language models (an adapter is
merged). The logits of both forms are compared before anything is published. In a prompt for it a
picture is the start token, one placeholder and the end token (<MS><img></MS>).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ta
from ta.files import locked


@dataclass(frozen=True)
class Config:
    model_path: str
    """Folder of a trained model or adapter: RUN/final of recipes/multimodal.py."""
    out: str
    """Folder to write."""
    image_encoder_path: str | None = None
    """Folder of the encoder, where it is no longer where it was."""
    hub: bool = False
    """Take a name that is no folder from the Hugging Face hub, or from its cache where there is no
    network."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that are written. Default: the one in which the base is stored."""


def main(config: Config) -> None:
    out = Path(config.out)
    with locked(out):
        if out.exists():
            raise ValueError(f"--out {out} exists: give a new folder")
        source = ta.ModelConfig(model_path=config.model_path, dtype="float32", hub=config.hub)
        files = ta.media.MediaFiles(image_root=".", image_encoder_path=config.image_encoder_path)
        folders = ta.resolve(source)
        media = ta.media.reopen_media(
            folders.media or folders.base, files, (), "cpu", hub=config.hub
        )
        if media is None:
            raise ValueError(
                f"{config.model_path} has no media.json, so it reads no pictures: "
                "give RUN/final of recipes/multimodal.py"
            )
        ta.media.check_llava(media)
        tokenizer = ta.load_chat_tokenizer(
            source, ta.TokenizerConfig(), ta.ChatConfig(), media.placeholders
        )
        model = ta.media.media_model_for_inference(media, tokenizer, ta.load_for_inference(source))
        dtype = ta.model.export.stored_dtype(folders.base, config.export_dtype)
        gap = ta.media.export_llava(media, model, tokenizer, out, dtype)
    name = str(dtype).removeprefix("torch.")
    ta.parallel.tell(f"{config.model_path} -> {out} ({name}; logits agree to {gap:.1g})")


if __name__ == "__main__":
    ta.cli(main, Config)
