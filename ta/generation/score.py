"""Scores of token sequences by a trained head: rewards, or the logits of classes.

Letters: N sequences, C scores of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ta.data.loader import split_micro
from ta.folders import ModelConfig, read_folder, resolve
from ta.generation.vllm_engine import VllmEngine, score_vllm
from ta.model.adapters import adapter_labels

if TYPE_CHECKING:
    from ta.chat.render import Tokens
    from ta.model.language_model import LanguageModel


def num_labels_of(config: ModelConfig) -> int:
    """How many scores the head of a saved classifier gives. ValueError for a model without one."""
    sources = resolve(config)
    if sources.adapter:
        return adapter_labels(sources.adapter)["num_labels"]
    folder = read_folder(sources.base, config.hub)
    if folder.kind != "classifier":
        raise ValueError(
            f"{folder.path} is no reward model or classifier "
            f"({folder.config.get('architectures')}): give what rm.py or classify.py exported"
        )
    return folder.num_labels


def score(
    model: LanguageModel | VllmEngine,
    sequences: Sequence[Tokens],
    max_tokens_per_micro: int = 8192,
) -> list[list[float]]:
    """N rows of C scores, each read at the sequence's last token, before any softmax.

    A sequence has the same scores whatever it is batched with. `max_tokens_per_micro`: tokens in
    one forward pass, where the model is ours.
    """
    if isinstance(model, VllmEngine):
        return score_vllm(model, sequences)
    import numpy as np
    import torch

    from ta.data.batch import lay_out, to_device

    device = next(model.parameters()).device
    rows: list[list[float]] = [[]] * len(sequences)
    sizes = [len(sequence.ids) for sequence in sequences]
    for places in split_micro(sizes, max_tokens_per_micro, packed=model.packed)[0]:
        if not places:
            continue
        ids = [np.array(sequences[i].ids) for i in places]
        batch = lay_out(ids, [np.zeros(len(x)) for x in ids], model.packed)
        with torch.no_grad():
            scores = model.scores(to_device(batch, device)).double().cpu()  # (N, C)
        for i, row in zip(places, scores.tolist(), strict=True):
            rows[i] = row
    return rows
