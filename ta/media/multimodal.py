"""The vision-language module: projected features stand in for placeholders, a language model reads them; what a batch and a prompt need for it.

Letters: B rows, T columns, I pictures or sounds, F features of one, E encoder width, N embeddings of one, L prompt tokens, D model width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ta.chat.encode import Drop
from ta.data.batch import Batch, lay_out, to_device
from ta.data.loader import collate_chats, name_of
from ta.data.prepare import Prepared
from ta.files import cache_folder, hash_json
from ta.media.dialogue import encode_media
from ta.media.features import check_features, content_hashes
from ta.media.images import media_key, media_path
from ta.media.projectors import load_projector, projector_of, save_projector
from ta.media.settings import PROJECTORS, MediaConfig, Opened, encoded, inputs_of
from ta.model.export import gathered
from ta.model.language_model import LanguageModel, base_model
from ta.parallel import rank

if TYPE_CHECKING:
    import numpy as np

    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import ChatTokenizer
    from ta.media.dialogue import Media

TOKENS_AT_ONCE = 8192  # of prompts that are embedded together


class MediaBatch(NamedTuple):
    """A Batch and, for each modality, what stands for its pictures or sounds in the order of the placeholders: their paths until they are read,
    the encoder's inputs until they are encoded, then features (I, F, E); None where the model has no such modality."""

    sequences: Batch
    image: Tensor | tuple[str, ...] | None = None
    audio: Tensor | tuple[str, ...] | None = None


def embed_modalities(
    token_embeds: Tensor, tokens: Tensor, features: Tensor, placeholder_id: int
) -> Tensor:
    """token_embeds (B, T, D) with features (I, N, D) in place of the placeholders of tokens (B, T), in order, row by row. (B, T, D)

    ValueError where there are not I * N placeholders.
    """
    places = (tokens.flatten() == placeholder_id).nonzero()[:, 0]
    count = features.shape[0] * features.shape[1]
    if len(places) != count:
        raise ValueError(
            f"{len(places)} placeholders of id {placeholder_id} for {count} embeddings ({features.shape[0]} x {features.shape[1]}): "
            "every picture or sound needs one placeholder for each of its embeddings"
        )
    flat = token_embeds.flatten(0, 1)
    return flat.index_copy(0, places, features.flatten(0, 1).to(flat.dtype)).view_as(token_embeds)


class MediaModel(LanguageModel):
    """The root module around a language model and its projectors; its methods take a MediaBatch.

    Encoders stay outside, whole on every device, so that what they give is what a cache holds.
    """

    METHODS = (*LanguageModel.METHODS, "embed")

    def __init__(
        self, language: LanguageModel, projectors: Mapping[str, nn.Module], media: Opened, ids: dict
    ):
        super().__init__(language.inner, language.mode, language.autocast)
        self.projectors = nn.ModuleDict(projectors)
        self.media = media
        self.ids = dict(ids)  # modality -> id of its placeholder

    def embed(self, batch: MediaBatch) -> Tensor:
        """The tokens' embeddings with projected features in place of placeholders, (B, T, D)."""
        with self._arithmetic():
            return self._inputs(batch)[1]

    def _inputs(self, batch: MediaBatch) -> tuple[Batch, Tensor]:
        tokens = batch.sequences.tokens
        embeds = base_model(self.inner).get_input_embeddings()(tokens)
        for name, projector in self.projectors.items():
            features = getattr(batch, name).to(next(projector.parameters()).dtype)
            embeds = embed_modalities(embeds, tokens, projector(features), self.ids[name])
        return batch.sequences, embeds

    def save_parts(self, folder: Path | None) -> None:
        """Write projectors and media.json, from which inference knows the encoders."""
        states = {name: gathered(projector) for name, projector in self.projectors.items()}
        if rank() == 0:
            (folder / PROJECTORS).mkdir()
            for name, projector in self.projectors.items():
                path = folder / PROJECTORS / f"{name}.safetensors"
                save_projector(projector, path, states[name])
            self.media.write(folder)


def with_projectors(
    media: Opened,
    tokenizer: ChatTokenizer,
    language: LanguageModel,
    freeze: bool = False,
    seed: int = 0,
) -> MediaModel:
    """The language model with a projector for each modality; with `freeze` these train alone.

    A new projector is drawn from `seed`.
    """
    table = base_model(language.inner).get_input_embeddings()
    if freeze:
        language.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projectors = {
            name: projector_of(modality.settings, table.weight.shape[1])
            for name, modality in media.modalities.items()
        }
    for name, modality in media.modalities.items():
        if modality.projector_path:
            load_projector(projectors[name], modality.projector_path)
    ids = {name: placeholder.id for name, placeholder in tokenizer.placeholders.items()}
    model = MediaModel(language, projectors, media, ids)
    device = "cpu" if table.weight.is_meta else table.weight.device
    model.projectors.to(device, table.weight.dtype)
    return model


def media_model_for_inference(
    media: Opened, tokenizer: ChatTokenizer, model: nn.Module
) -> MediaModel:
    """A loaded transformers model (or its Table) with its projectors, for use without training."""
    language = LanguageModel(model, "packed")
    return with_projectors(media, tokenizer, language).requires_grad_(False).eval()


class Table(nn.Module):
    """A language model's embedding table without the model, for an engine that holds the model elsewhere."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.table = base_model(model).get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def projector_lr(config: MediaConfig, model_path: str, lr: float) -> float:
    """The peak learning rate of the projectors: 1e-3 for new ones before a language model that knows its language (LLaVA's), else its own."""
    if config.projector_lr is not None:
        if config.projector_lr <= 0:
            raise ValueError(f"--projector-lr {config.projector_lr}: give a learning rate above 0")
        return config.projector_lr
    given = config.image_projector_path or config.audio_projector_path
    return lr if given or model_path.startswith("builtin") else 1e-3


def media_resume_key(media: Opened, config: MediaConfig, *data: Prepared | None) -> dict[str, Any]:
    """What must not differ when a run is resumed, beside its text.

    Encoders, projectors, what is frozen, and the content of every picture and sound of the `data`.
    ValueError where the content of one is not what its cache was made from.
    """
    settings = {
        name: {k: v for k, v in m.settings.items() if k != "path"}
        for name, m in media.modalities.items()
    }
    return {
        "modalities": settings,
        "freeze_language_model": config.freeze_language_model,
        "media": [media_hash(media, prepared) for prepared in data if prepared],
    }


def media_hash(opened: Opened, prepared: Prepared) -> str:
    """Hash of the content of all pictures and sounds; all processes take part. ValueError names the record whose file is gone, or is not what a
    cache was made from."""
    places: dict[tuple[str, str], int] = {}  # (modality, path) -> the first record that has it
    for record in range(len(prepared.origin)):
        for item in media_of(prepared, record):
            places.setdefault(item, record)
    content = []
    for name, modality in opened.modalities.items():
        paths = {path: record for (kind, path), record in places.items() if kind == name}
        files = {
            path: _named(prepared, record, media_path, modality.root, path)
            for path, record in paths.items()
        }
        notes = (
            cache_folder("")
            / "hashes"
            / f"media-sha256-{hash_json(str(Path(modality.root).resolve()))[:32]}.json"
        )
        hashes = dict(zip(files, content_hashes(list(files.values()), notes), strict=True))
        content += hashes.values()
        for path, record in paths.items() if modality.cache else ():
            key = media_key(path)
            _named(
                prepared,
                record,
                check_features,
                modality.cache,
                {key: files[path]},
                {key: hashes[path]},
            )
    return hash_json(sorted(content))


def _named(prepared: Prepared, record: int, work: Callable, *given: Any) -> Any:
    """What `work` gives; its ValueError names the record."""
    try:
        return work(*given)
    except ValueError as error:
        raise ValueError(f"{name_of(prepared, record)}: {error}") from error


def collate_media(
    media: Opened, prepared: Prepared, records: np.ndarray, packed: bool, read: bool = True
) -> MediaBatch:
    """A MediaBatch of the given records.

    With `read` their files or cached features are read here, in the thread that makes batches; else
    `with_features` does it, so that a list of batches holds paths only. ValueError names the record
    whose file cannot be read.
    """
    values: dict[str, Any] = {name: [] for name in media.modalities}
    for record in map(int, records):
        for name, path in media_of(prepared, record):
            value = path
            if read:
                value = _named(prepared, record, inputs_of, media.modalities[name], path)
            values[name].append(value)
    found = {name: torch.stack(v) if read and v else tuple(v) for name, v in values.items()}
    return MediaBatch(collate_chats(prepared, records, packed), **found)


def with_features(media: Opened, batch: MediaBatch) -> MediaBatch:
    """The batch with features in the place of paths or inputs, on the device of its tokens."""
    device = batch.sequences.tokens.device
    found = {}
    for name, modality in media.modalities.items():
        values = getattr(batch, name)
        if isinstance(values, tuple):
            values = torch.stack([inputs_of(modality, path) for path in values]) if values else None
        found[name] = encoded(modality, values).to(device)
    return batch._replace(**found)


def media_of(prepared: Prepared, record: int) -> list[tuple[str, str]]:
    """(modality, path) of a record's pictures and sounds, in the order of its placeholders."""
    if prepared.media is None:
        return []
    text, ends = prepared.media
    own = text[ends[record - 1] if record else 0 : ends[record]]
    return [tuple(pair) for pair in json.loads(own.tobytes())]


def encode_media_prompts(
    chats: Sequence[list[dict]], tokenizer: ChatTokenizer, chat: ChatConfig
) -> list:
    """Token ids of each chat's prompt, pictures and sounds as placeholders, or a Drop."""
    found = encode_media(chats, tokenizer, chat, prompts=True)
    return [result if isinstance(result, Drop) else result[0].ids for result in found]


def embed_media_prompts(
    media: Opened,
    tokenizer: ChatTokenizer,
    chat: ChatConfig,
    model: MediaModel,
    chats: Sequence[list[dict]],
    prompts: Sequence[Sequence[int]],
) -> Iterator[Tensor]:
    """(L, D) of each prompt that `encode_media_prompts` gave; all processes take part."""
    items = [found[1] for found in encode_media(chats, tokenizer, chat, prompts=True)]
    return embed_prompts(media, model, prompts, items)


def embed_prompts(
    opened: Opened, model: MediaModel, prompts: Sequence[Sequence[int]], media: Sequence[Media]
) -> Iterator[Tensor]:
    """(L, D) of each prompt: its tokens' embeddings with its pictures and sounds in place; every process must call it alike."""
    device = next(model.parameters()).device
    start = 0
    while start < len(prompts):
        stop, total = start + 1, len(prompts[start])
        while stop < len(prompts) and total + len(prompts[stop]) <= TOKENS_AT_ONCE:
            total, stop = total + len(prompts[stop]), stop + 1
        ids = [torch.tensor(prompt).numpy() for prompt in prompts[start:stop]]
        batch = lay_out(ids, [torch.zeros(len(x)).numpy() for x in ids])
        paths = {
            name: tuple(
                path for items in media[start:stop] for found, path in items if found == name
            )
            for name in opened.modalities
        }
        with torch.no_grad():
            filled = with_features(opened, to_device(MediaBatch(batch, **paths), device))
            embeds = model.embed(filled)  # (1, T, D)
        yield from embeds[0].split(list(batch.lengths))
        start = stop
