"""A language model that reads pictures and sounds: projected features in place of placeholders.

Letters: B rows, T columns, D the model's width, L tokens of a prompt; I pictures or sounds, F
features of one, E the encoder's width, N embeddings of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ta.chat.tokenizer import ChatTokenizer
from ta.data.batch import Batch, lay_out, to_device
from ta.data.jsonl import naming
from ta.data.loader import collate_chats
from ta.data.prepare import Prepared, name_of
from ta.files import cache_folder, content_hash, hash_json
from ta.folders import write_tensors
from ta.media.dialogue import media_of_prompt
from ta.media.features import check_features, content_hashes
from ta.media.images import media_key, media_path
from ta.media.modalities import PROJECTORS, Modalities
from ta.media.projectors import load_projector, projector_of
from ta.media.settings import MediaConfig
from ta.model.export import gathered
from ta.model.language_model import LanguageModel, base_model, refused_embeddings
from ta.model.new_rows import token_table
from ta.parallel import rank

TOKENS_AT_ONCE = 8192  # of prompts that are embedded together, and the rest of the last one


class MediaBatch(NamedTuple):
    """A Batch and, for each modality, its pictures or sounds in the order of the placeholders.

    First they are paths, then the encoder's inputs, at last features (I, F, E); None where the
    model has no such modality.
    """

    sequences: Batch
    image: Tensor | tuple[str, ...] | None = None
    audio: Tensor | tuple[str, ...] | None = None


def embed_modalities(
    token_embeds: Tensor, tokens: Tensor, features: Tensor, placeholder_id: int
) -> Tensor:
    """token_embeds (B, T, D) with features (I, N, D) in place of the placeholders in tokens (B, T).

    They are put in order, row by row. Gives (B, T, D). ValueError where there are not I * N
    placeholders, or where the N of a picture or sound do not follow each other in one row.
    """
    places = (tokens.flatten() == placeholder_id).nonzero()[:, 0]
    items, each = features.shape[:2]
    if len(places) != items * each:
        raise ValueError(
            f"{len(places)} placeholders of id {placeholder_id} for {items * each} embeddings "
            f"({items} x {each}): "
            "every picture or sound needs one placeholder for each of its embeddings"
        )
    runs, columns = places.view(items, each), tokens.shape[1]
    first = runs[:, :1]
    follow = runs == first + torch.arange(each, device=places.device)
    apart = ~(follow & (runs // columns == first // columns)).all(1)
    if apart.any():
        item = int(apart.nonzero()[0])
        raise ValueError(
            f"the {each} placeholders of picture or sound {item + 1}, from row "
            f"{int(first[item]) // columns + 1} on, do not follow each other: "
            f"a record before it has more or fewer than {each} for each"
        )
    flat = token_embeds.flatten(0, 1)
    return flat.index_copy(0, places, features.flatten(0, 1).to(flat.dtype)).view_as(token_embeds)


class MediaModel(LanguageModel):
    """The root module around a language model and its projectors; its methods take a MediaBatch.

    Encoders stay outside, whole on every device, so that what they give is what a cache holds.
    """

    METHODS = (*LanguageModel.METHODS, "embed")

    def __init__(
        self,
        language: LanguageModel,
        projectors: Mapping[str, nn.Module],
        media: Modalities,
        tokenizer: ChatTokenizer,
    ):
        super().__init__(language.inner, language.mode, language.autocast)
        self.projectors, self.media = nn.ModuleDict(projectors), media
        # modality -> id of its placeholder
        self.ids = {name: known.id for name, known in tokenizer.placeholders.items()}

    def embed(self, batch: MediaBatch) -> Tensor:
        """(B, T, D) embeddings of the tokens, projected features in place of placeholders."""
        with self._arithmetic():
            return self._inputs(batch)[1]

    def _inputs(self, batch: MediaBatch) -> tuple[Batch, Tensor]:
        """The sequences, and the embeddings (B, T, D) that the language model reads for them."""
        tokens = batch.sequences.tokens
        embeds = self.base.get_input_embeddings()(tokens)
        for name, projector in self.projectors.items():
            features = getattr(batch, name).to(next(projector.parameters()).dtype)
            embeds = embed_modalities(embeds, tokens, projector(features), self.ids[name])
        return batch.sequences, embeds

    def save_parts(self, folder: Path | None) -> None:
        """Write the projectors, and media.json, from which inference knows the encoders."""
        states = {name: gathered(projector) for name, projector in self.projectors.items()}
        if rank() == 0:
            (folder / PROJECTORS).mkdir()
            for name, state in states.items():
                weights = state or self.projectors[name].state_dict()
                write_tensors(weights, folder / PROJECTORS / f"{name}.safetensors")
            self.media.save(folder)


def with_projectors(
    media: Modalities,
    tokenizer: ChatTokenizer,
    language: LanguageModel,
    freeze: bool = False,
    seed: int = 0,
) -> MediaModel:
    """The language model with a projector for each modality; with `freeze` only these are trained.

    A projector starts from the weights that its modality names, else it is drawn from `seed`.
    ValueError for a language model that cannot read embeddings in place of tokens.
    """
    table, projectors = token_table(language.base), {}
    known = not table.is_meta and not isinstance(language.base, EmbeddingTable)
    if known and (why := refused_embeddings(language)):
        raise ValueError(f"{why}, and pictures and sounds have none: give another language model")
    if freeze:
        language.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, modality in media.items():
            projectors[name] = projector_of(modality.settings, table.shape[1])
            if modality.projector_path:
                load_projector(projectors[name], modality.projector_path)
    model = MediaModel(language, projectors, media, tokenizer)
    model.projectors.to("cpu" if table.is_meta else table.device, table.dtype)
    return model


def media_model_for_inference(
    media: Modalities, tokenizer: ChatTokenizer, model: nn.Module
) -> MediaModel:
    """A loaded transformers model (or its EmbeddingTable) with its projectors, not for training."""
    language = LanguageModel(model, "packed")
    return with_projectors(media, tokenizer, language).requires_grad_(False).eval()


class EmbeddingTable(nn.Module):
    """A language model's embedding table alone: the engine holds the model elsewhere."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.table = base_model(model).get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def projector_lr(config: MediaConfig, media: Modalities, model_path: str, lr: float) -> float:
    """The peak learning rate of the projectors.

    Default: 1e-3, LLaVA's, for new projectors of a trained language model, else its own `lr`.
    """
    if config.projector_lr is not None:
        return config.projector_lr
    given = any(modality.projector_path for modality in media.values())
    return lr if given or model_path.startswith("builtin") else 1e-3


def media_resume_key(
    media: Modalities, config: MediaConfig, *data: Prepared | None
) -> dict[str, Any]:
    """What of pictures and sounds must be equal when a run is resumed.

    It is encoders, projectors, what is frozen, and the content of every picture and sound of the
    `data`. ValueError where a file has not the content that its cache was made from.
    """
    return {
        "modalities": {name: modality.identity for name, modality in media.items()},
        "freeze_language_model": config.freeze_language_model,
        "media": [media_hash(media, prepared) for prepared in data if prepared],
    }


def media_hash(media: Modalities, prepared: Prepared) -> str:
    """Hash of all pictures and sounds of the records, by name and content; all processes take part.

    ValueError names the record whose file is gone or has not the content that its cache was made
    from.
    """
    # (modality, path) -> the first record that has it
    first: dict[tuple[str, str], int] = {}
    for record in range(len(prepared.origin)):
        for item in media_of(prepared, record):
            first.setdefault(item, record)
    files = {}
    for item, record in first.items():
        with naming(name_of(prepared, record)):
            files[item] = media_path(media[item[0]].root, item[1])
    (root,) = {str(Path(modality.root).resolve()) for modality in media.values()}
    notes = cache_folder("") / "hashes" / f"media-sha256-{hash_json(root)[:32]}.json"
    hashes = content_hashes([*files.values()], notes)
    content: list[tuple[str, str, str]] = []  # modality, path, hash
    for (name, path), file, value in zip(files, files.values(), hashes, strict=True):
        key, cached = media_key(path), media[name].cache
        content.append((name, key, value))
        if cached is not None:
            with naming(name_of(prepared, first[name, path])):
                check_features(cached, key, file, value)
    return hash_json(sorted(content))


def prompts_media(
    media: Modalities,
    tokenizer: ChatTokenizer,
    chats: Sequence[list[dict]],
    prompts: Sequence[list[int]],
) -> list[list[str]]:
    """For each prompt of a chat the hashes of the content of its pictures and sounds, in order."""
    notes = cache_folder("") / "hashes"

    @cache
    def hash_of(name: str, path: str) -> str:
        return content_hash(media_path(media[name].root, path), notes)

    pairs = zip(chats, prompts, strict=True)
    return [[hash_of(*x) for x in media_of_prompt(chat, ids, tokenizer)] for chat, ids in pairs]


def media_content(media: Modalities) -> list:
    """What of encoders and projectors decides an answer: settings, and the projectors' content."""
    return [[m.identity, content_hash(m.projector_path)] for m in media.values()]


def collate_media(
    media: Modalities, prepared: Prepared, records: np.ndarray, packed: bool, read: bool = True
) -> MediaBatch:
    """A MediaBatch of the given records.

    With `read` their files or cached features are read here, in the thread that makes batches;
    else `with_features` reads them, and a list of batches holds paths only. ValueError names the
    record whose file cannot be read.
    """
    items: dict[str, list] = {name: [] for name in media}
    for record in map(int, records):
        for name, path in media_of(prepared, record):
            with naming(name_of(prepared, record)):
                items[name].append(media[name].inputs_of(path) if read else path)
    batch = MediaBatch(collate_chats(prepared, records, packed))
    return batch._replace(
        **{name: torch.stack(x) if read and x else tuple(x) for name, x in items.items()}
    )


def with_features(media: Modalities, batch: MediaBatch) -> MediaBatch:
    """The batch with features in place of paths or inputs, on the device of its tokens."""
    device = batch.sequences.tokens.device
    features = {}
    for name, modality in media.items():
        inputs = getattr(batch, name)
        if isinstance(inputs, tuple):
            read = [modality.inputs_of(path) for path in inputs]
            inputs = torch.stack(read) if read else None
        features[name] = modality.features_of(inputs).to(device)
    return batch._replace(**features)


def media_of(prepared: Prepared, record: int) -> list[tuple[str, str]]:
    """(modality, path) of a record's pictures and sounds, in the order of its placeholders."""
    if prepared.media is None:
        return []
    text, ends = prepared.media
    start = ends[record - 1] if record else 0
    return [tuple(pair) for pair in json.loads(text[start : ends[record]].tobytes())]


def embed_media_prompts(
    media: Modalities,
    tokenizer: ChatTokenizer,
    model: MediaModel,
    chats: Sequence[list[dict]],
    prompts: Sequence[list[int]],
) -> Iterator[Tensor]:
    """(L, D) of each prompt that `encode_media_prompts` gave: its tokens' embeddings with its
    pictures and sounds in place. All processes must call this with equal prompts.
    """
    device = model.device
    numbers = [end // TOKENS_AT_ONCE for end in accumulate(map(len, prompts))]
    for _, group in groupby(zip(numbers, chats, prompts, strict=True), itemgetter(0)):
        _, chats_now, ids_now = zip(*group, strict=True)
        batch = lay_out(ids_now, [[0.0] * len(ids) for ids in ids_now])
        paths: dict[str, tuple[str, ...]] = dict.fromkeys(media, ())
        for chat, prompt in zip(chats_now, ids_now, strict=True):
            for name, path in media_of_prompt(chat, prompt, tokenizer):
                paths[name] += (path,)
        with torch.no_grad():
            on_device = to_device(MediaBatch(batch, **paths), device)
            embeds = model.embed(with_features(media, on_device))  # (1, T, D)
        yield from embeds[0].split(list(batch.lengths))
