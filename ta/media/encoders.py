"""Frozen encoders of pictures and sounds: each tells its width and number of features, reads its own files, and encodes without gradient."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ta.media.audio import fbank_clips, whisper_mels
from ta.media.encoder_files import ClipPatches, SeededPatches, SiglipPatches, WhisperStates
from ta.media.imagebind import load_trunk
from ta.media.images import CLIP, SIGLIP, Preprocessing, read_pixels, read_preprocessing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np


class Encoder(NamedTuple):
    """What a vision-language model needs of an encoder. Letters: I inputs, F features of one, E width of a feature."""

    modality: Literal["image", "audio"]
    emb_dim: int  # E
    n_modality_embs: int  # F
    grid: (
        tuple[int, int] | None
    )  # (rows, columns) of the F features, None where they lie on no grid
    read: Callable[
        [str | Path], np.ndarray
    ]  # one file to one input; pickles, and runs without torch where the reader does
    module: nn.Module  # inputs to (I, F, E); frozen
    settings: dict[str, Any]  # all that shapes the features besides the weights, in JSON values

    def encode(self, inputs: Tensor) -> Tensor:
        """(I, F, E) features of a batch of inputs, in evaluation mode and without gradient, on the module's device and in its dtype."""
        place = next(self.module.parameters())
        self.module.eval()  # a parent's train() may have reached it, and dropout would make features that no cache repeats
        with torch.no_grad():
            return self.module(inputs.to(place.device, place.dtype))


def load_encoder(
    name: str,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The encoder `name` of ENCODERS with the weights in `folder` (builtin needs none), frozen, on `device` in `dtype`."""
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is not known; give one of {', '.join(ENCODERS)}")
    if name != "builtin" and not (folder and Path(folder).is_dir()):
        raise ValueError(
            f"encoder {name}: {folder!r} is not a folder; give the folder with the model's weights and preprocessor_config.json"
        )
    encoder = ENCODERS[name](Path(folder) if folder else Path())
    encoder.module.to(device, dtype).eval().requires_grad_(False)
    return encoder


def fingerprint(encoder: Encoder) -> str:
    """Hex SHA-256 of settings and weights in their dtype: two encoders of one fingerprint give the same features."""
    seen = hashlib.sha256(json.dumps(encoder.settings, sort_keys=True).encode())
    for name, tensor in sorted(encoder.module.state_dict().items()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return seen.hexdigest()


def builtin(folder: Path) -> Encoder:
    """The demo's seeded encoder of 48 x 48 pictures; it needs no files."""
    module = SeededPatches()
    how = Preprocessing((48, 48), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    width, side = module.colours + module.forms + 2 * module.side, module.side
    return Encoder(
        "image",
        width,
        side * side,
        (side, side),
        partial(read_pixels, how=how),
        module,
        _settings("builtin", how=how),
    )


def clip(folder: Path) -> Encoder:
    """CLIP's vision tower (a whole CLIP folder or the tower alone), as LLaVA reads it (arXiv 2310.03744): hidden_states[-2][:, 1:]."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = _config(CLIPVisionConfig, folder, "clip", "clip_vision_model")
    config.num_hidden_layers -= (
        1  # the state before the last layer is the last state of a model with one layer fewer
    )
    return _patches(
        "clip", folder, CLIP, config, ClipPatches(load_tower(CLIPVisionModel, folder, config))
    )


def siglip(folder: Path) -> Encoder:
    """SigLIP's vision tower (arXiv 2303.15343), all patches of hidden_states[-2]; it has no class token."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = _config(SiglipVisionConfig, folder, "siglip", "siglip_vision_model")
    config.num_hidden_layers -= 1
    return _patches(
        "siglip",
        folder,
        SIGLIP,
        config,
        SiglipPatches(load_tower(SiglipVisionModel, folder, config)),
    )


def imagebind(folder: Path) -> Encoder:
    """A trunk of ImageBind, pictures or sounds as its config.json says, from a folder that imagebind.convert_checkpoint wrote."""
    trunk = load_trunk(folder)
    config = trunk.config
    if config.modality == "image":
        how = CLIP._replace(size=min(config.size), crop=config.size)
        read: Callable[..., np.ndarray] = partial(read_pixels, how=how)
    else:
        how, read = (
            None,
            partial(fbank_clips, mels=config.size[0], frames=config.size[1], clips=config.clips),
        )
    grid = (config.clips * config.grid[0], config.grid[1]) if config.output == "tokens" else (1, 1)
    settings = _settings("imagebind", how=how, trunk={**config.__dict__, "size": list(config.size)})
    return Encoder(config.modality, trunk.out_dim, trunk.n_tokens, grid, read, trunk, settings)


def whisper(folder: Path) -> Encoder:
    """Whisper's audio encoder (arXiv 2212.04356), its last hidden state; a sound shorter than the window is padded with silence.

    Its features lie on a line; the grid folds the line into rows of equal length, as near to a square as they go.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = _config(WhisperConfig, folder, "whisper")
    config.decoder_layers = 0
    if not (folder / "preprocessor_config.json").is_file():
        raise ValueError(
            f"{folder}: no preprocessor_config.json; save Whisper's feature extractor into its folder"
        )
    extractor = WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    frames = extractor.nb_max_frames
    count = config.max_source_positions
    if (extractor.feature_size, frames) != (config.num_mel_bins, 2 * count):
        raise ValueError(
            f"{folder}: the extractor gives {extractor.feature_size} x {frames} mels, the encoder reads {config.num_mel_bins} x {2 * count}"
        )
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    module = WhisperStates(load_tower(WhisperModel, folder, config).encoder)
    sizes = {
        key: getattr(config, key)
        for key in (
            "encoder_layers",
            "encoder_attention_heads",
            "activation_function",
            "scale_embedding",
        )
    }
    hearing = {
        key: getattr(extractor, key)
        for key in ("feature_size", "sampling_rate", "hop_length", "n_fft", "chunk_length")
    }
    read = partial(whisper_mels, extractor=extractor)
    return Encoder(
        "audio",
        config.d_model,
        count,
        (rows, count // rows),
        read,
        module,
        _settings("whisper", config=sizes, extractor=hearing),
    )


def _settings(name: str, how: Preprocessing | None = None, **more: Any) -> dict[str, Any]:
    return {
        "encoder": name,
        "version": 1,
        "preprocessing": list(how) if how else None,
        **more,
    }  # raise version when features change


def _patches(
    name: str, folder: Path, default: Preprocessing, config: Any, module: nn.Module
) -> Encoder:
    how = read_preprocessing(folder, default)
    given = how.crop or (how.size if isinstance(how.size, tuple) else None)
    if given != (config.image_size, config.image_size):
        wants = f"{config.image_size} x {config.image_size}"
        raise ValueError(
            f"{folder}: preprocessor_config.json makes pictures of {given or 'any size'}, the encoder reads {wants}; make them equal"
        )
    side = config.image_size // config.patch_size
    keys = (
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "layer_norm_eps",
        "image_size",
        "patch_size",
    )
    settings = _settings(name, how=how, config={key: getattr(config, key) for key in keys})
    return Encoder(
        "image",
        config.hidden_size,
        side * side,
        (side, side),
        partial(read_pixels, how=how),
        module,
        settings,
    )


def _config(kind: Any, folder: Path, *types: str) -> Any:
    path = folder / "config.json"
    found = json.loads(path.read_text()).get("model_type") if path.is_file() else None
    if found not in types:
        raise ValueError(
            f"{folder}: its config.json is of model type {found!r}; this encoder reads {' or '.join(types)}"
        )
    return kind.from_pretrained(str(folder), local_files_only=True)


def load_tower(kind: Any, folder: Path, config: Any) -> nn.Module:
    """transformers' model with every weight from the folder; weights it has no use for (the text tower, the last layer) are passed over."""
    from safetensors import SafetensorError

    with _quiet():
        try:
            model, info = kind.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{folder}: the encoder's weights cannot be loaded: {error}"
            ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"{folder}: {len(info['missing_keys'])} weights are missing, the first is {min(info['missing_keys'])}; give a whole model"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a table of every weight it passes over; here that is all of the text tower."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


ENCODERS: dict[str, Callable[[Path], Encoder]] = {
    "builtin": builtin,
    "clip": clip,
    "siglip": siglip,
    "imagebind": imagebind,
    "whisper": whisper,
}
