"""Frozen encoders of pictures and sounds: each reads its files and makes features of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from ta.folders import loading, local_folder, read_json
from ta.media.audio import fbank_clips, whisper_mels
from ta.media.imagebind import load_trunk
from ta.media.images import CLIP, SIGLIP, Preprocessing, read_pixels, read_preprocessing
from ta.model.load import check_tensors, from_pretrained


class Encoder(NamedTuple):
    """A frozen encoder. Letters: I inputs, F features of one, E width of a feature."""

    modality: Literal["image", "audio"]
    emb_dim: int  # E
    n_modality_embs: int  # F
    # (rows, columns) of the F features, None where they lie on no grid
    grid: tuple[int, int] | None
    # one file to one input; it pickles, because other processes run it
    read: Callable[[str | Path], np.ndarray]
    # inputs to (I, F, E)
    module: nn.Module
    # all that decides the features besides the weights, in JSON values
    settings: dict[str, Any]

    def encode(self, inputs: Tensor) -> Tensor:
        """(I, F, E) features of a batch of inputs, without gradient, on the module's device."""
        parameter = next(self.module.parameters(), inputs)
        # train() of a parent may have reached it, and a cache would not repeat what dropout makes
        self.module.eval()
        with torch.no_grad():
            return self.module(inputs.to(parameter.device, parameter.dtype))


def load_encoder(name: str, folder: str | Path | None = None) -> Encoder:
    """The encoder `name` of ENCODERS with the weights in `folder`, frozen; builtin needs no folder.

    ValueError for an unknown name and for a folder that does not hold such an encoder.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is not known; give one of {', '.join(ENCODERS)}")
    if name != "builtin" and not (folder and Path(folder).is_dir()):
        why = f"{str(folder)!r} is not a folder" if folder else "no folder is given"
        raise ValueError(
            f"encoder {name}: {why}; give the folder with the model's weights and "
            "preprocessor_config.json, or add --hub to look the name up on the hub"
        )
    encoder = ENCODERS[name](Path(folder) if folder else Path())
    encoder.module.float().eval().requires_grad_(False)
    return encoder


def load_with_fingerprint(
    name: str, folder: str | None, device: str, half: bool = False, hub: bool = False
) -> tuple[Encoder, str]:
    """The encoder on `device`, in bfloat16 with `half`, and its fingerprint in float32.

    With `hub` the folder may be a name on the hub.
    """
    if folder is not None:
        folder = local_folder(folder, hub)
    encoder = load_encoder(name, folder)
    fingerprint = encoder_fingerprint(encoder)
    encoder.module.to(device, torch.bfloat16 if half else torch.float32)
    return encoder, fingerprint


def encoder_fingerprint(encoder: Encoder) -> str:
    """Hex SHA-256 of settings and weights in their dtype: equal ones give the same features."""
    digest = hashlib.sha256(json.dumps(encoder.settings, sort_keys=True).encode())
    for name, tensor in sorted(encoder.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def builtin(folder: Path) -> Encoder:
    """The seeded encoder of 48 x 48 pictures; it needs no files."""
    module = SeededPatches()
    how = Preprocessing((48, 48), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    width, side = module.colours + module.forms + 2 * module.side, module.side
    read, settings = partial(read_pixels, how=how), _settings("builtin", how)
    return Encoder("image", width, side * side, (side, side), read, module, settings)


def imagebind(folder: Path) -> Encoder:
    """ImageBind's trunk of pictures or sounds, as the config.json of its folder says.

    The folder is one that `imagebind.write_trunk` wrote.
    """
    trunk = load_trunk(folder)
    config, how = trunk.config, None
    if config.modality == "image":
        how = CLIP._replace(size=min(config.size), crop=config.size)
        read = partial(read_pixels, how=how)
    else:
        mels, frames = config.size
        read = partial(fbank_clips, mels=mels, frames=frames, clips=config.clips)
    grid = (config.clips * config.grid[0], config.grid[1]) if config.output == "tokens" else (1, 1)
    settings = _settings("imagebind", how, trunk=vars(config))
    return Encoder(config.modality, trunk.out_dim, trunk.n_tokens, grid, read, trunk, settings)


def whisper(folder: Path) -> Encoder:
    """Whisper's audio encoder (arXiv 2212.04356): its last hidden state.

    A sound shorter than the window is padded with silence. The features lie on a line; the grid
    cuts the line into rows of equal length, as near to a square as possible.
    """
    from transformers import WhisperFeatureExtractor, WhisperModel

    config = _config(WhisperModel, folder, "whisper")
    config.decoder_layers = 0
    with loading(folder, "a feature extractor (with Whisper's preprocessor_config.json)"):
        extractor = WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True)
    frames = extractor.nb_max_frames
    count = config.max_source_positions
    if (extractor.feature_size, frames) != (config.num_mel_bins, 2 * count):
        raise ValueError(
            f"{folder}: the extractor gives {extractor.feature_size} x {frames} mels, the encoder "
            f"reads {config.num_mel_bins} x {2 * count}"
        )
    if extractor.dither or extractor.padding_value or extractor.padding_side != "right":
        raise ValueError(
            f"{folder}: its feature extractor adds noise (dither) or pads with something else than "
            "silence behind a sound: set dither and padding_value to 0, padding_side to right"
        )
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    module = LastState(load_tower(WhisperModel, folder, config).encoder, "input_features")
    grid, read = (rows, count // rows), partial(whisper_mels, extractor=extractor)
    sizes = "encoder_layers encoder_attention_heads activation_function scale_embedding"
    hearing = "feature_size sampling_rate hop_length n_fft chunk_length"
    more = {"config": _values(config, sizes), "extractor": _values(extractor, hearing)}
    return Encoder("audio", config.d_model, count, grid, read, module, _settings("whisper", **more))


def _settings(name: str, how: Preprocessing | None = None, **more: Any) -> dict[str, Any]:
    """What a fingerprint covers besides the weights; `version` is raised when features change."""
    return {"encoder": name, "version": 1, "preprocessing": how and list(how), **more}


def _values(settings: Any, names: str) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in names.split()}


def _vision(name: str, folder: Path) -> Encoder:
    """An encoder whose features are those of transformers' model without its last layer."""
    vision = VISION[name]
    kind = getattr(transformers, vision.model)
    config = _config(kind, folder, name, f"{name}_vision_model")
    # the state before the last layer is the last state of a model with one layer fewer
    config.num_hidden_layers -= 1
    module = vision.patches(load_tower(kind, folder, config))
    how = read_preprocessing(folder, vision.preprocessing)
    given, edge = how.crop or (how.size if isinstance(how.size, tuple) else None), config.image_size
    if given != (edge, edge):
        raise ValueError(
            f"{folder}: preprocessor_config.json makes pictures of {given or 'any size'}, "
            f"the encoder reads {edge} x {edge}; make them equal"
        )
    side, read = edge // config.patch_size, partial(read_pixels, how=how)
    sizes = "num_hidden_layers num_attention_heads hidden_act layer_norm_eps image_size patch_size"
    settings = _settings(name, how, config=_values(config, sizes))
    return Encoder("image", config.hidden_size, side * side, (side, side), read, module, settings)


def _config(kind: Any, folder: Path, *types: str) -> Any:
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    if model_type not in types:
        raise ValueError(
            f"{folder}: its config.json is of model type {model_type!r}; this encoder reads "
            f"{' or '.join(types)}"
        )
    with loading(folder, f"an encoder of type {model_type}"):
        return kind.config_class.from_pretrained(str(folder), local_files_only=True)


def load_tower(kind: Any, folder: Path, config: Any) -> nn.Module:
    """transformers' model with every weight from the folder; weights of other parts are not read.

    ValueError where a weight is missing or a file cannot be read.
    """
    with loading(folder, f"an encoder ({kind.__name__})"):
        options = {"local_files_only": True, "trust_remote_code": False}
        dtype = torch.float32
        model, info = from_pretrained(kind, str(folder), config=config, dtype=dtype, **options)
    check_tensors(str(folder), info, unread=("",))
    return model


class LastState(nn.Module):
    """The last hidden state of a transformers model, without its first `skip` tokens."""

    def __init__(self, model: nn.Module, name: str, skip: int = 0):
        super().__init__()
        self.model = model
        # of the argument that takes the inputs
        self.name, self.skip = name, skip

    def forward(self, inputs: Tensor) -> Tensor:
        """Pixels (I, 3, H, W) or log-mel spectrograms (I, mels, frames) -> features (I, F, E)."""
        return self.model(**{self.name: inputs}).last_hidden_state[:, self.skip :]


class SiglipPatches(nn.Module):
    """A SigLIP vision model without its last layer, final norm and pooling: its patches."""

    def __init__(self, model: nn.Module):
        super().__init__()
        inner = getattr(model, "vision_model", model)
        self.embeddings, self.layers = inner.embeddings, inner.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (I, 3, H, W) -> features (I, F, E)."""
        return self.layers(inputs_embeds=self.embeddings(pixels)).last_hidden_state


class SeededPatches(nn.Module):
    """The built-in encoder: fixed random filters on 4 x 4 tiles of a small picture.

    Each tile gives the mean rectified answers of 32 colour filters and of 96 filters on the
    foreground, and its row and column, one-hot. The foreground is how far a pixel is from the
    picture's median colour, so that a shape looks the same in every colour. A linear map reads
    colour, shape and place off these features.
    """

    side, colours, forms = 4, 32, 96

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def filters(count: int, channels: int, edge: int, bias: float) -> nn.Conv2d:
            """Random filters of unit norm; the global generator is not used."""
            layer = nn.utils.skip_init(
                nn.Conv2d, channels, count, edge, stride=3, padding=edge // 2
            )
            weight = torch.randn(layer.weight.shape, generator=generator)
            if channels == 1:  # a form is where the foreground changes
                weight = weight - weight.mean((1, 2, 3), keepdim=True)
            layer.weight.data = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
            layer.bias.data = (2 * torch.rand(count, generator=generator) - 1) * bias
            return layer

        self.colour = filters(self.colours, 3, 3, 0.3)
        self.form = filters(self.forms, 1, 9, 0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (I, 3, H, W) -> features (I, 16, 136), the same bits in any batch.

        float32 rounds otherwise in another batch: this computes in float64 and keeps 8 bits after
        the point.
        """
        exact = pixels.double()
        ordered = exact.flatten(2).sort(dim=2).values
        median = ordered[:, :, (ordered.shape[2] - 1) // 2, None, None]
        distance = (exact - median).abs().amax(1, keepdim=True)  # (I, 1, H, W)
        foreground = distance / distance.amax((2, 3), keepdim=True).clamp(min=1e-6)
        answers = []
        for layer, seen in ((self.colour, exact), (self.form, 2 * foreground - 1)):
            weight, bias = layer.weight.double(), layer.bias.double()
            answer = F.conv2d(seen, weight, bias, layer.stride, layer.padding).relu()
            answers.append(F.adaptive_avg_pool2d(answer, self.side).flatten(2).transpose(1, 2))
        colour, form = answers  # (I, 16, filters)
        # what sets the filters apart says the shape more than what they have in common
        form = 4 * form - 3 * form.mean(2, keepdim=True)
        rows = 4 * torch.eye(self.side, dtype=exact.dtype, device=exact.device) - 1
        row, column = rows.repeat_interleave(self.side, 0), rows.repeat(self.side, 1)
        place = torch.cat([row, column], dim=1)  # (16, 8)
        place = place.expand(len(exact), -1, -1)
        # the scales suit the first layer of a projector
        features = torch.cat([16 * colour - 4, 4 * form - 1, place], dim=2)
        return (features * 256).round().div(256).to(pixels.dtype)


class Vision(NamedTuple):
    """A vision model of transformers, alone in its folder or in a whole CLIP or SigLIP."""

    # transformers' class
    model: str
    preprocessing: Preprocessing
    # the model without its last layer to (pixels -> features)
    patches: Callable[[nn.Module], nn.Module]
    # what the Llava layout calls the features, and the class tokens that it leaves out of them
    select: str
    class_tokens: int


VISION = {
    # hidden_states[-2][:, 1:], as LLaVA reads CLIP (arXiv 2310.03744): the class token comes first
    "clip": Vision(
        "CLIPVisionModel", CLIP, partial(LastState, name="pixel_values", skip=1), "default", 1
    ),
    # hidden_states[-2] (arXiv 2303.15343); there is no class token
    "siglip": Vision("SiglipVisionModel", SIGLIP, SiglipPatches, "full", 0),
}
ENCODERS: dict[str, Callable[[Path], Encoder]] = {
    "builtin": builtin,
    **{name: partial(_vision, name) for name in VISION},
    "imagebind": imagebind,
    "whisper": whisper,
}
