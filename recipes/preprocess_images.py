"""Run a frozen encoder over all pictures (or sounds) of a folder once: a file of their features.

Training and generation read the features in place of running the encoder.

    python recipes/preprocess_images.py --root pictures --encoder clip --encoder-path CLIP \\
        --out clip.safetensors
    python recipes/multimodal.py ... --image-encoder clip --image-encoder-path CLIP \\
        --image-features clip.safetensors

A run that was stopped goes on when it is started again. The keys of the file are the paths of the
pictures below --root. It also holds the encoder's fingerprint and a hash of each picture, so that a
changed picture or another encoder is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import ta


@dataclass(frozen=True)
class Config:
    root: str
    """Folder below which the pictures (or sounds) lie: what --image-root names in training."""
    out: str
    """File to write."""
    encoder: str = "builtin"
    """builtin, clip, siglip, imagebind or whisper."""
    encoder_path: str | None = None
    """Folder of the encoder's weights; builtin needs none."""
    hub: bool = False
    """Take an --encoder-path that is no folder from the Hugging Face hub, or from its cache where
    there is no network."""
    batch_size: Annotated[int, ta.Range(1)] = 32
    """Files encoded at once; the features do not depend on it."""
    workers: Annotated[int, ta.Range(0)] = 2
    """Processes that read and decode; 0 reads in this one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed and stored; auto is bfloat16 on accelerators and float32 on CPU."""
    on_bad_file: Literal["error", "skip"] = "error"
    """Stop at a file that cannot be read, or count and leave it out."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(config: Config) -> None:
    out, skip = Path(config.out), config.on_bad_file == "skip"
    ta.media.check_absent(out, config.overwrite)
    device = ta.parallel.pick_device()
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device != "cpu")
    encoder, fingerprint = ta.media.load_with_fingerprint(
        config.encoder, config.encoder_path, device, half, config.hub
    )
    paths, skipped = ta.media.find_media(config.root, encoder.modality, skip)
    if not paths:
        raise ValueError(
            f"--root {config.root}: no {encoder.modality} file in it; "
            "give the folder that holds them"
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    shape = (encoder.n_modality_embs, encoder.emb_dim)
    with ta.progress(len(paths), "encode", encoder.modality) as bar:
        done, before, unread = ta.media.extract(
            out,
            paths,
            encoder.read,
            encoder.encode,
            ta.media.Layout(fingerprint, shape, "BF16" if half else "F32"),
            config.batch_size,
            config.workers,
            skip,
            lambda done, total: bar.update(done - bar.n),
            config.overwrite,
        )

    skipped += unread
    for key, why in skipped[:10]:
        ta.parallel.say(f"left out {key}: {why}")
    left_out = f", {len(skipped):,} left out" if skipped else ""
    ta.parallel.say(f"{out}: features of {done:,} files, {before:,} of them from before{left_out}")


if __name__ == "__main__":
    ta.cli(main, Config)
