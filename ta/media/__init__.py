"""Pictures and sounds: encoders, projectors, features. What recipes need of it, loaded on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ta.media.dialogue import prepare_media_chats as prepare_media_chats
    from ta.media.multimodal import Table as Table
    from ta.media.multimodal import collate_media as collate_media
    from ta.media.multimodal import embed_media_prompts as embed_media_prompts
    from ta.media.multimodal import embed_modalities as embed_modalities
    from ta.media.multimodal import encode_media_prompts as encode_media_prompts
    from ta.media.multimodal import media_model_for_inference as media_model_for_inference
    from ta.media.multimodal import media_resume_key as media_resume_key
    from ta.media.multimodal import projector_lr as projector_lr
    from ta.media.multimodal import with_features as with_features
    from ta.media.multimodal import with_projectors as with_projectors
    from ta.media.settings import MediaConfig as MediaConfig
    from ta.media.settings import MediaFiles as MediaFiles
    from ta.media.settings import open_media as open_media
    from ta.media.settings import reopen_media as reopen_media

_HOME = {
    "prepare_media_chats": "dialogue",
    "MediaConfig": "settings",
    "MediaFiles": "settings",
    "open_media": "settings",
    "reopen_media": "settings",
    **dict.fromkeys(
        [
            "Table",
            "collate_media",
            "embed_media_prompts",
            "embed_modalities",
            "encode_media_prompts",
            "media_model_for_inference",
            "media_resume_key",
            "projector_lr",
            "with_features",
            "with_projectors",
        ],
        "multimodal",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ta.media' has no attribute {name!r}")
    return getattr(import_module(f"ta.media.{_HOME[name]}"), name)
