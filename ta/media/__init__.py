"""Pictures and sounds: encoders, caches of their features, projectors, and models that read them.

What recipes need of it is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ta.faces import face

if TYPE_CHECKING:  # what the package gives, listed here for editors and for face()
    from ta.media.dialogue import (
        encode_media_prompts as encode_media_prompts,
        prepare_media_chats as prepare_media_chats,
    )
    from ta.media.encoders import load_with_fingerprint as load_with_fingerprint
    from ta.media.features import Layout as Layout, check_absent as check_absent, extract as extract
    from ta.media.images import find_media as find_media
    from ta.media.llava import check_llava as check_llava, export_llava as export_llava
    from ta.media.modalities import (
        open_media as open_media,
        reopen_media as reopen_media,
    )
    from ta.media.multimodal import (
        EmbeddingTable as EmbeddingTable,
        collate_media as collate_media,
        embed_media_prompts as embed_media_prompts,
        embed_modalities as embed_modalities,
        media_content as media_content,
        media_model_for_inference as media_model_for_inference,
        media_resume_key as media_resume_key,
        projector_lr as projector_lr,
        prompts_media as prompts_media,
        with_features as with_features,
        with_projectors as with_projectors,
    )
    from ta.media.settings import MediaConfig as MediaConfig, MediaFiles as MediaFiles

__getattr__, __all__ = face(__name__, __file__)
