"""Texts to vectors: an encoder model with the pooling, prefixes and length limit that its folder, or else the user, says.

Letters: N texts, L tokens, D width of hidden states, E width of a vector (here D).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ta.parallel import rank, world

if TYPE_CHECKING:
    from ta.rag.index import EncoderConfig

LOCAL = {"local_files_only": True, "trust_remote_code": False}
MODES = {  # what sentence-transformers calls them in 1_Pooling/config.json
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


class Texts(NamedTuple):
    """Texts as an encoder reads them, padded on the right."""

    ids: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) int64, 1 at real tokens


class Reading(NamedTuple):
    """How an encoder's texts become vectors."""

    pooling: Literal["mean", "cls", "last", "max"]
    normalize: bool  # to length 1
    query_prefix: str
    passage_prefix: str
    max_tokens: int  # longer texts are cut at their end


class Encoder(nn.Module):
    """An encoder model and its pooling: forward(Texts) -> (N, E) float32 (or float64)."""

    def __init__(self, model: nn.Module, reading: Reading):
        super().__init__()
        self.model = model
        self.reading = reading

    def forward(self, texts: Texts) -> Tensor:
        hidden = self.model(
            input_ids=texts.ids, attention_mask=texts.mask
        ).last_hidden_state  # (N, L, D)
        vectors = pool(
            hidden if hidden.dtype == torch.float64 else hidden.float(),
            texts.mask,
            self.reading.pooling,
        )
        return nn.functional.normalize(vectors, dim=1) if self.reading.normalize else vectors


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """(N, L, D) states of right-padded texts to (N, D): their mean, the first ("cls"), the last or the greatest values of real tokens."""
    if how == "cls":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    real = mask[..., None].bool()
    if how == "max":
        return hidden.masked_fill(~real, float("-inf")).amax(1)
    return hidden.masked_fill(~real, 0).sum(1) / mask.sum(1, keepdim=True)


def reading_of(folder: str, config: EncoderConfig) -> Reading:
    """What the folder says (sentence-transformers' files, else mean pooling and length 1), with the user's own settings over it.

    ValueError for a module or a pooling of sentence-transformers that is none of ours: its vectors would be others.
    """
    modules = _json(folder, "modules.json") or []
    names = [module["type"].rpartition(".")[2] for module in modules]
    if odd := set(names) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{folder}: modules.json has a {min(odd)} layer, which is not applied here: give an encoder without it"
        )
    pooling, normalize = "mean", "Normalize" in names or not modules
    if "Pooling" in names:
        said = _json(folder, f"{modules[names.index('Pooling')]['path']}/config.json") or {}
        modes = (
            [said["pooling_mode"]]
            if "pooling_mode" in said
            else [key for key, on in said.items() if key.startswith("pooling_mode") and on]
        )
        if len(modes) != 1 or MODES.get(modes[0], modes[0]) not in MODES.values():
            raise ValueError(
                f"{folder}: pooling by {' and '.join(modes) or 'nothing'} is not known: give --pooling {'|'.join(MODES.values())}"
            )
        pooling = MODES.get(modes[0], modes[0])
    prompts = (_json(folder, "config_sentence_transformers.json") or {}).get("prompts") or {}
    limit = (_json(folder, "sentence_bert_config.json") or {}).get("max_seq_length")
    limit = limit or getattr(_settings(folder), "max_position_embeddings", 512)
    ours = (
        config.pooling,
        config.normalize,
        config.query_prefix,
        config.passage_prefix,
        config.encoder_max_tokens,
    )
    theirs = (
        pooling,
        normalize,
        prompts.get("query", ""),
        prompts.get("passage", prompts.get("document", "")),
        limit,
    )
    reading = Reading(
        *(own if own is not None else said for own, said in zip(ours, theirs, strict=True))
    )
    if not 1 <= reading.max_tokens <= limit:
        raise ValueError(
            f"--encoder-max-tokens {reading.max_tokens}: the encoder in {folder} reads 1 to {limit}"
        )
    return reading


def width_of(folder: str) -> int:
    """E, as the encoder's config tells."""
    return _settings(folder).get_text_config().hidden_size


def _json(folder: str, name: str) -> Any:
    path = Path(folder) / name
    return json.loads(path.read_text()) if path.exists() else None


def open_encoder(
    folder: str,
    reading: Reading,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    to_shard: bool = False,
) -> tuple[Encoder, Any]:
    """The encoder in evaluation mode, its weights in float32 (float64 where asked), and its tokenizer; ValueError where the folder holds none.

    With `to_shard`, on several processes, rank 0 has the weights and the others have their shapes.
    """
    from transformers import AutoModel, AutoTokenizer

    wide = torch.float64 if dtype == "float64" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        if to_shard and rank():  # shapes only: rank 0 hands the weights out (parallel.shard)
            with torch.device("meta"):
                model = AutoModel.from_config(_settings(folder), dtype=wide)
        else:
            model = AutoModel.from_pretrained(folder, dtype=wide, use_safetensors=True, **LOCAL).to(
                "cpu" if to_shard and world() > 1 else device
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} does not load as a text encoder: {str(error).splitlines()[0]}"
        ) from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Encoder(model, reading).eval(), tokenizer


def _settings(folder: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **LOCAL)


def tokenize(
    texts: Sequence[str], tokenizer: Any, reading: Reading, what: Literal["query", "passage"]
) -> list[list[int]]:
    """Token ids of each text behind its prefix, cut at the encoder's limit."""
    prefix = reading.query_prefix if what == "query" else reading.passage_prefix
    return (
        tokenizer(
            [prefix + text for text in texts], truncation=True, max_length=reading.max_tokens
        ).input_ids
        if texts
        else []
    )


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> Texts:
    """Texts of token ids; no text at all gives one lone token, so that every process runs the same number of passes."""
    ids = ids or [[pad_id]]
    width = max(max(map(len, ids)), 1)
    rows = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in ids])
    return Texts(
        rows, (torch.arange(width) < torch.tensor([[max(len(row), 1)] for row in ids])).long()
    )


def embed(
    forward: Callable[[Texts], Tensor],
    ids: Sequence[Sequence[int]],
    pad_id: int,
    device: Any,
    max_tokens: int = 8192,
    agree: Callable[[int], int] = lambda n: n,
) -> Tensor:
    """(N, E) vectors of tokenized texts in their order, without gradients, texts of like length in one pass of `max_tokens` at most.

    `forward` is an Encoder, or calls one. `agree(passes)` says how many passes to run: with a sharded encoder as many as every other process.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(ids[i]) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    parts = []
    with torch.no_grad():
        for group in groups + [[]] * (max(agree(len(groups)), 1) - len(groups)):
            texts = pad([ids[i] for i in group], pad_id)
            vectors = forward(Texts(*(x.to(device) for x in texts)))[: len(group)]
            parts.append(vectors if vectors.dtype == torch.float64 else vectors.float())
    found = torch.cat(parts)  # (N, E), by length
    out = torch.empty_like(found)
    out[torch.tensor(order, dtype=torch.int64, device=device)] = found
    return out


def save_reading(folder: Path, reading: Reading) -> None:
    """Write what `reading_of` reads beside a saved encoder, so that sentence-transformers loads it too."""
    kinds = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *([("Normalize", "2_Normalize")] if reading.normalize else []),
    ]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooling = {
        "word_embedding_dimension": width,
        **{key: name == reading.pooling for key, name in MODES.items()},
    }
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": reading.max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": reading.query_prefix, "passage": reading.passage_prefix}
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2))
