"""Run a frozen encoder over all pictures (or sounds) of a folder once: one safetensors file of features that training and generation read.

    python recipes/preprocess_images.py --root pictures --encoder clip --encoder-path CLIP --out clip.safetensors
    python recipes/multimodal.py ... --image-encoder clip --image-encoder-path CLIP --image-features clip.safetensors

A stopped run goes on where it was when it is started again. The file's keys are the files' paths below --root; it also holds the encoder's
fingerprint and a hash of every file's content, so that a changed picture or another encoder is refused, never read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ta.command_line import cli
from ta.parallel import say


@dataclass(frozen=True)
class Preprocess:
    root: str
    """Folder below which the pictures (or sounds) lie: what --image-root names in training."""
    out: str
    """File to write."""
    encoder: str = "builtin"
    """builtin, clip, siglip, imagebind or whisper."""
    encoder_path: str | None = None
    """Folder of the encoder's weights; builtin needs none."""
    batch_size: int = 32
    """Files encoded at once; the features do not depend on it."""
    workers: int = 2
    """Processes that read and decode; 0 reads in this one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What is computed and stored; auto is bfloat16 on accelerators and float32 on CPU."""
    on_bad_file: Literal["error", "skip"] = "error"
    """Stop at a file that cannot be read, or count and leave it out."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(config: Preprocess) -> None:
    import torch
    from tqdm import tqdm

    from ta.media.feature_file import Layout
    from ta.media.features import extract
    from ta.media.images import ENDINGS, find_files, media_path
    from ta.media.settings import load_marked

    out = Path(config.out)
    if out.exists() and not config.overwrite:
        raise ValueError(f"--out {out} exists: give another file, or --overwrite to replace it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device == "cuda")
    encoder, mark = load_marked(config.encoder, config.encoder_path, device, half)
    paths, skipped = {}, []
    for key in find_files(config.root, ENDINGS if encoder.modality == "image" else (".wav",)):
        try:
            paths[key] = media_path(config.root, key)
        except ValueError as error:
            if config.on_bad_file == "error":
                raise
            skipped.append((key, str(error)))
    if not paths:
        raise ValueError(
            f"--root {config.root}: no {encoder.modality} file in it; give the folder that holds them"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    layout = Layout(mark, (encoder.n_modality_embs, encoder.emb_dim), "BF16" if half else "F32")
    with tqdm(
        total=len(paths), desc="encode", unit=f" {encoder.modality}s", dynamic_ncols=True
    ) as bar:
        how = {
            "batch_size": config.batch_size,
            "workers": config.workers,
            "skip_bad": config.on_bad_file == "skip",
        }
        tell = lambda done, total: bar.update(done - bar.n)
        done = extract(
            out,
            paths,
            encoder.read,
            encoder.encode,
            layout,
            **how,
            progress=tell,
            overwrite=config.overwrite,
        )
    skipped += done.skipped
    for key, why in skipped[:10]:
        say(f"left out {key}: {why}")
    more = f", {len(skipped):,} left out" if skipped else ""
    say(
        f"{out}: features of {done.done:,} files, {done.done - done.encoded:,} of them from before{more}"
    )


if __name__ == "__main__":
    cli(main, Preprocess)
