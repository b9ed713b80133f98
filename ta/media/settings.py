"""What a user says of pictures and sounds: files, encoders, projectors and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ta.command_line import Range


@dataclass(frozen=True)
class MediaFiles:
    """Where pictures, sounds, encoders and caches lie."""

    image_root: str = ""
    """Folder below which all pictures and sounds lie; records name them relative to it. Default:
    the folder of the data."""
    image_encoder_path: str | None = None
    """Folder of the picture encoder's weights; builtin needs none."""
    audio_encoder_path: str | None = None
    """Folder of the sound encoder's weights."""
    image_features: str | None = None
    """Cache made by recipes/preprocess_images.py, read in place of running the picture encoder."""
    audio_features: str | None = None
    """The same for sounds."""


@dataclass(frozen=True)
class MediaConfig:
    files: MediaFiles = MediaFiles()
    image_encoder: str | None = None
    """builtin, clip, siglip or imagebind. Default: that of a model that sees already, else builtin
    on built-in data, and with --data none."""
    audio_encoder: str | None = None
    """whisper or imagebind. Default: that of a model that hears already, else none."""
    image_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] | None = None
    """What turns features into embeddings: mlp keeps their number, c_abstractor can reduce it.
    Default, here and below: that of a model that sees already, else mlp."""
    audio_projector: Literal["mlp", "llava", "c_abstractor", "c_abs"] | None = None
    """The same for sounds."""
    image_embeddings: Annotated[int | None, Range(1, 65536)] = None
    """Embeddings that stand for one picture. Default: as many as the encoder gives features."""
    audio_embeddings: Annotated[int | None, Range(1, 65536)] = None
    """Embeddings that stand for one sound."""
    image_projector_path: str | None = None
    """Safetensors file of weights that a new picture projector starts from, or the folder of a run
    that trained one."""
    audio_projector_path: str | None = None
    """The same for sounds."""
    projector_width: Annotated[int | None, Range(1, 65536)] = None
    """Channels of a c_abstractor (1024)."""
    projector_depth: Annotated[int | None, Range(1, 1024)] = None
    """Blocks in each of its two stages (3)."""
    projector_lr: Annotated[float | None, Range(0, above=True)] = None
    """Peak learning rate of the projectors. Default: 1e-3, or --lr where a projector goes on or the
    model is built in."""
    freeze_language_model: bool = False
    """Train the projectors alone."""
    media_tokens: tuple[str, str] | None = None
    """Tokens before and after the placeholders of one picture or sound (<MS> </MS>)."""
    image_token: str | None = None
    """Placeholder of a picture's embeddings (<img>)."""
    audio_token: str | None = None
    """Placeholder of a sound's embeddings (<audio>)."""
