"""What do cached features of pictures save, and how fast are they made?

    python bench/multimodal.py --rounds 3                      # training: tokens a second
    python bench/multimodal.py --what preprocess --rounds 3    # features: pictures a second
    python bench/multimodal.py --what memory --rounds 1        # peak memory, from a cache

Training from a cache stands against encoding on the fly, a folder's features (of the encoder named
in --encoder) against a plain loop, few pictures against many. Pictures are drawn, 640 x 640 JPEG.
The CLIP tower is seeded and of CLIP-base's size (86 million weights, 224 pixels, patches of 32);
the language model is the built-in one for pictures (0.7 million weights), and a c_abstractor makes
16 embeddings of a picture, so that the encoder is what differs. Training is recipes/multimodal.py
itself; its first step is left out of the rate. Rates are by wall time: readers are processes of
their own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read

RECIPE = str(ROOT / "recipes" / "multimodal.py")


def write_clip(folder: Path, tiny: bool) -> None:
    """A seeded vision tower of CLIP-base's shape with its preprocessing."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = (
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        if tiny
        else {}
    )
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=32, **shape)).save_pretrained(
        folder
    )
    sizes = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **sizes})
    )


def write_pictures(folder: Path, count: int) -> None:
    """Drawn pictures of 640 x 640 and one dialogue about each."""
    from PIL import Image

    from ta.builtin.pictures import draw_scene, make_scene, training_record

    (folder / "images").mkdir()
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for i in range(count):
            scene = make_scene(0, i, False)
            Image.fromarray(draw_scene(scene, 640)).save(folder / "images" / f"{i}.jpg")
            file.write(json.dumps(training_record(scene, f"{i}.jpg", 0, i)) + "\n")


def encoder_of(flags):
    from ta.media.encoders import load_with_fingerprint

    return load_with_fingerprint(
        flags.encoder, f"{flags.folder}/clip" if flags.encoder == "clip" else None, "cpu"
    )


def files_of(flags, count: int) -> dict[str, Path]:
    return {f"{i}.jpg": Path(flags.folder) / "images" / f"{i}.jpg" for i in range(count)}


def make_cache(flags, out: str, count: int, workers: int) -> float:
    """Seconds that ta's own way takes for the features of `count` pictures."""
    from ta.media.features import Layout, extract

    encoder, fingerprint = encoder_of(flags)
    start = time.perf_counter()
    extract(
        out,
        files_of(flags, count),
        encoder.read,
        encoder.encode,
        Layout(fingerprint, (encoder.n_modality_embs, encoder.emb_dim), "F32"),
        32,
        workers,
    )
    return time.perf_counter() - start


def ours(flags) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            "pictures_a_s": flags.pictures / make_cache(flags, f"{folder}/c", flags.pictures, 2)
        }


def plain_loop(flags) -> dict[str, float]:
    """Read, encode, keep, one picture after another; saved at the end."""
    import torch
    from safetensors.torch import save_file

    encoder, _ = encoder_of(flags)
    start = time.perf_counter()
    found = {
        key: encoder.encode(torch.from_numpy(encoder.read(path))[None])[0]
        for key, path in files_of(flags, flags.pictures).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(found, f"{folder}/c")
    return {"pictures_a_s": flags.pictures / (time.perf_counter() - start)}


def command(flags, data: str, *more: str) -> list[str]:
    where = [
        "--data",
        f"{flags.folder}/{data}",
        "--image-root",
        f"{flags.folder}/images",
        "--steps",
        str(flags.steps),
        "--batch-size",
        "8",
    ]
    clip = [
        "--image-encoder",
        "clip",
        "--image-encoder-path",
        f"{flags.folder}/clip",
        "--image-projector",
        "c_abstractor",
    ]
    return [
        sys.executable,
        RECIPE,
        *where,
        *clip,
        "--image-embeddings",
        "16",
        "--projector-width",
        "128",
        "--log-every",
        "1",
        *more,
    ]


def train(flags, *more: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command(flags, "train.jsonl", "--out", f"{folder}/run", *more),
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        rows = [
            json.loads(line)
            for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()
        ][1:]
    return {
        "tokens_a_s": sum(row["tokens"] for row in rows) / sum(row["seconds"] for row in rows),
        "loss": rows[-1]["loss"],
    }


def on_the_fly(flags):
    return train(flags)


def cached(flags):
    return train(flags, "--image-features", f"{flags.folder}/cache")


def few(flags):
    return train(
        flags,
        "--image-features",
        f"{flags.folder}/cache",
        "--data",
        f"{flags.folder}/train.jsonl@{flags.steps * 8}",
    )


def prepare(flags) -> None:
    write_pictures(Path(flags.folder), flags.pictures)
    if flags.encoder == "clip":
        write_clip(Path(flags.folder) / "clip", flags.tiny)
    if flags.what != "preprocess":
        make_cache(flags, f"{flags.folder}/cache", flags.pictures, 2)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--what", choices=("train", "preprocess", "memory"), default="train")
    flags.add_argument("--encoder", choices=("clip", "builtin"), default="clip")
    flags.add_argument("--pictures", type=int, default=400)
    flags.add_argument("--steps", type=int, default=12)
    flags.add_argument("--folder", default="", help=argparse.SUPPRESS)
    flags = read(flags, pictures=24, steps=2)
    contenders, against = {
        "train": ({"cached": cached, "on the fly": on_the_fly}, "on the fly"),
        "preprocess": ({"ta": ours, "plain loop": plain_loop}, "plain loop"),
        "memory": ({"all pictures": cached, "few pictures": few}, "few pictures"),
    }[flags.what]
    with tempfile.TemporaryDirectory() as folder:
        if not flags.folder:
            flags.folder = folder
            sys.argv += ["--folder", folder]
            prepare(flags)
        compare(contenders, flags, against)


if __name__ == "__main__":
    main()
