"""Texts to vectors: a text encoder with its pooling, run over many texts in few passes.

Letters: N texts, L tokens, D width of hidden states, E width of a vector (here D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ta.data.batch import to_device
from ta.data.micro import group_padded
from ta.folders import ModelConfig, loading
from ta.model.load import load_base
from ta.rag.embedding_settings import LOCAL, EmbeddingSettings, width_of


class Texts(NamedTuple):
    """Tokenized texts, padded on the right."""

    ids: Tensor  # (N, L) int64
    mask: Tensor  # (N, L) int64, 1 at real tokens


class TextEncoder(nn.Module):
    """An encoder model and its pooling: forward(Texts) -> (N, E) float32 (or float64)."""

    def __init__(self, model: nn.Module, settings: EmbeddingSettings):
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, texts: Texts) -> Tensor:
        """(N, E) vectors of the texts."""
        output = self.model(input_ids=texts.ids, attention_mask=texts.mask)
        hidden = output.last_hidden_state  # (N, L, D)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        vectors = pool(hidden, texts.mask, self.settings.pooling)  # (N, E)
        return nn.functional.normalize(vectors, dim=1) if self.settings.normalize else vectors


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(N, L, D) states of right-padded texts to (N, D).

    "mean", "max": over the real tokens; "cls": the first token; "last": the last real one.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    real = mask[..., None].bool()
    if pooling == "max":
        return hidden.masked_fill(~real, float("-inf")).amax(1)
    return hidden.masked_fill(~real, 0).sum(1) / mask.sum(1, keepdim=True)


def open_encoder(
    folder: str,
    settings: EmbeddingSettings,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    to_shard: bool = False,
) -> tuple[TextEncoder, Any]:
    """The encoder in evaluation mode and its tokenizer; ValueError where the folder holds none, and
    for an encoder whose vectors are not of the text alone.

    Weights are float32, or float64 where `dtype` asks for it. With `to_shard`, on several
    processes, rank 0 has the weights and the others have their shapes.
    """
    from transformers import AutoTokenizer

    exact = ModelConfig(folder, dtype="float64" if dtype == "float64" else "float32")
    model = load_base(exact, "encoder", device=device, whole=not to_shard)
    encoder = TextEncoder(model, settings).eval()
    with loading(folder, "a text encoder"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        if settings.lower_case:
            backend = tokenizer.backend_tokenizer
            given = [backend.normalizer] if backend.normalizer else []
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
        why = ""
        if any(chain(*tokenizer(["a"]).get("token_type_ids", []))):
            why = "its tokenizer gives token_type_ids that are not 0, which are not passed on"
        # the last call decides how an exported tokenizer cuts, on every process alike
        ids = tokenize(["a", "a b c d e"], tokenizer, settings, "query")
        if getattr(model, "attention_type", "") == "block_sparse":
            why = 'it is exact with "attention_type": "original_full" in its config.json alone'
        if not next(model.parameters()).is_meta:
            # a model of pictures or sounds, or of two texts, loads too, and then refuses a text
            device = model.device
            alone, padded = (embed(encoder, some, device)[0] for some in (ids[:1], ids))
            if len(alone) != (width := width_of(folder)):
                why = f"its vectors have {len(alone)} numbers, by its config.json {width}"
            elif (alone - padded).abs().max() > 1e-4 * alone.abs().max():
                why = "its vector of a text changes with the texts beside it"
        rows = model.get_input_embeddings().weight.shape[0]
    if why:
        raise ValueError(f"{folder}: {why}: give another encoder")
    if len(tokenizer) > rows:
        raise ValueError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its encoder {rows} rows: give a "
            "folder whose tokenizer belongs to the encoder"
        )
    return encoder, tokenizer


def tokenize(
    texts: Sequence[str],
    tokenizer: Any,
    settings: EmbeddingSettings,
    kind: Literal["query", "passage"],
) -> list[list[int]]:
    """Token ids of each text after its prefix, cut to the encoder's limit."""
    if not texts:
        return []
    prefix = settings.query_prefix if kind == "query" else settings.passage_prefix
    prefixed = [prefix + text for text in texts]
    return tokenizer(prefixed, truncation=True, max_length=settings.max_tokens).input_ids


def pad(ids: Sequence[Sequence[int]]) -> Texts:
    """Texts of token ids; for no text at all one text of one token, which nothing reads.

    Every process then runs the same number of passes. The mask says what is padding, so that it may
    be any token.
    """
    rows = [torch.tensor(row or [0]) for row in ids or [[]]]
    padded = pad_sequence(rows, batch_first=True)  # (N, L)
    lengths = torch.tensor([[len(row)] for row in rows])  # (N, 1)
    return Texts(padded, (torch.arange(padded.shape[1]) < lengths).long())


def embed(
    forward: Callable[[Texts], Tensor],
    ids: Sequence[Sequence[int]],
    device: Any,
    max_tokens: int = 8192,
    agree: Callable[[int], int] = int,
    first: int = 0,
) -> Tensor:
    """(N, E) vectors of tokenized texts in their order, without gradients.

    Texts of like length share a pass of at most `max_tokens` tokens, padding included. `forward` is
    a TextEncoder, or calls one. `agree(passes)` says how many passes to run: with a sharded encoder
    as many as every other process. ValueError for a vector that is not finite, which no search
    would find; `first` is the number of the first text in the message.
    """
    groups = group_padded([*map(len, ids)], max_tokens)
    missing = agree(len(groups)) - len(groups)
    parts = []
    with torch.no_grad():
        for group in groups + [[]] * missing:
            vectors = forward(to_device(pad([ids[i] for i in group]), device))
            parts.append(vectors[: len(group)])
    order = [*chain.from_iterable(groups)]
    place = torch.tensor(order, dtype=torch.int64, device=device).argsort()
    out = torch.cat(parts)[place]  # (N, E)
    broken = (~out.isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(ids)} vectors are not finite, the first of text "
            f"{first + int(broken[0]) + 1}: no search would find it; look at the text and at the "
            "encoder's weights"
        )
    return out
