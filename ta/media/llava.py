"""An export in transformers' Llava layout, which plain transformers and vLLM serve.

One folder holds CLIP or SigLIP, an mlp projector and a language model.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from ta.chat.template import export_template
from ta.chat.tokenizer import ChatTokenizer
from ta.chat.tokenizer_files import save_tokenizer
from ta.files import json_text
from ta.folders import loading, read_json, read_tensors, write_tensors
from ta.media.encoders import VISION, load_tower
from ta.media.images import processor_settings
from ta.media.modalities import Modalities
from ta.media.multimodal import MediaModel, embed_modalities
from ta.model.attention import own_attention
from ta.model.export import check_room, check_tokenizer, model_bytes, published, save_model

MAX_DIFFERENCE = 1e-3  # of a logit
PART = "a part of the Llava layout (serve it with recipes/generate.py)"


def check_llava(media: Modalities) -> None:
    """ValueError unless the layout holds these modalities: CLIP or SigLIP and an mlp."""
    if set(media) != {"image"}:
        raise ValueError(
            f"the Llava layout holds pictures alone, this model reads {' and '.join(media)}; "
            "serve it with recipes/generate.py"
        )
    settings = media["image"].settings
    if settings["encoder"] not in VISION or settings["projector"] not in ("mlp", "llava"):
        raise ValueError(
            f"the Llava layout holds clip or siglip and an mlp, not {settings['encoder']} and "
            f"{settings['projector']}; "
            "serve this model with recipes/generate.py"
        )


def export_llava(
    media: Modalities,
    model: MediaModel,
    tokenizer: ChatTokenizer,
    out: str | Path,
    dtype: torch.dtype | None = None,
) -> float:
    """Publish `model` in the layout as `out`; the greatest difference between its logits and ours.

    Logits are compared in float32, weights are written in `dtype` (None: float32). ValueError where
    the language model does not fit the layout or computes otherwise in it, and where the tokenizer
    or the disk cannot be written to.
    """
    settings, base = media["image"].settings, model.base
    image = tokenizer.placeholders["image"]
    whole = assembled(settings, base, model.projectors["image"], image.id)
    check_tokenizer(tokenizer.fast, whole.config)
    check_room(Path(out), model_bytes(whole, dtype))
    with loading(type(base).__name__, PART):
        gap = difference(whole, media, model, tokenizer)
    if gap > MAX_DIFFERENCE:
        raise ValueError(
            f"the Llava layout gives logits that differ by {gap:.2g}: "
            "this language model computes otherwise there"
        )
    layout = VISION[settings["encoder"]]
    kind = {"processor_class": "LlavaProcessor"}
    processor = kind | {
        "image_token": settings["token"],
        "patch_size": whole.config.vision_config.patch_size,
        "num_additional_image_tokens": layout.class_tokens,
        "vision_feature_select_strategy": layout.select,
    }
    # a folder may leave to its model's type which processor reads the settings
    reader = {"image_processor_type": layout.model.replace("VisionModel", "ImageProcessor")}
    reader |= processor_settings(settings["path"])[1] | kind
    with published(Path(out), replace=False) as folder:
        save_model(whole, folder, dtype)
        _published_names(folder)
        save_tokenizer(tokenizer.fast, folder, export_template(tokenizer.template))
        (folder / "preprocessor_config.json").write_text(json_text(reader, indent=1))
        (folder / "processor_config.json").write_text(json_text(processor, indent=1))
    return gap


def _published_names(folder: Path) -> None:
    """Call the encoder's weights vision_tower.vision_model.*, as published models do.

    vLLM knows no other name, transformers reads both.
    """

    def name(key: str) -> str:
        rest = key.removeprefix("vision_tower.").removeprefix("vision_model.")
        return f"vision_tower.vision_model.{rest}" if key.startswith("vision_tower.") else key

    for file in folder.glob("*.safetensors"):
        tensors = read_tensors(file).items()
        write_tensors({name(key): tensor for key, tensor in tensors}, file, format="pt")
    for file in folder.glob("*.safetensors.index.json"):
        index = read_json(file)
        index["weight_map"] = {name(key): shard for key, shard in index["weight_map"].items()}
        file.write_text(json_text(index, indent=1))


def assembled(
    settings: dict, base: transformers.PreTrainedModel, projector: nn.Module, placeholder: int
):
    """LlavaForConditionalGeneration of an encoder's folder, a language model and an mlp.

    ValueError where they do not fit.
    """
    layout, path = VISION[settings["encoder"]], Path(settings["path"])
    kind = getattr(transformers, layout.model)
    vision = kind.config_class.from_pretrained(path, local_files_only=True)
    tower = load_tower(kind, path, vision)
    with loading(type(base).__name__, PART):
        config = transformers.LlavaConfig(
            vision_config=tower.config,
            # without the attention that `base` has here
            text_config=base.config.to_dict(),
            image_token_index=placeholder,
            image_seq_length=settings["features"],
            vision_feature_select_strategy=layout.select,
            vision_feature_layer=-2,
        )
        whole = transformers.LlavaForConditionalGeneration(config).eval()
        whole.model.vision_tower.load_state_dict(tower.state_dict())
        whole.model.language_model.load_state_dict(base.base_model.state_dict())
        whole.lm_head.load_state_dict(base.get_output_embeddings().state_dict())
        for name, layer in zip(("linear_1", "linear_2"), projector.layers[::2], strict=True):
            getattr(whole.model.multi_modal_projector, name).load_state_dict(layer.state_dict())
    whole.generation_config = base.generation_config
    return whole


def difference(whole, media: Modalities, model: MediaModel, tokenizer: ChatTokenizer) -> float:
    """The greatest difference between the models' logits, on a random picture and few tokens."""
    placeholder, base = tokenizer.placeholders["image"], model.base
    edge = whole.config.vision_config.image_size
    pixels = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[placeholder.id] * placeholder.count, 2, 3]])
    with torch.no_grad(), own_attention(base):
        projected = model.projectors["image"](media["image"].encode(pixels))
        embeds = embed_modalities(base.get_input_embeddings()(ids), ids, projected, placeholder.id)
        ours = base(inputs_embeds=embeds, use_cache=False).logits
        return (ours - whole(input_ids=ids, pixel_values=pixels).logits).abs().max().item()
