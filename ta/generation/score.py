"""Scores of token sequences by a trained head: rewards, or the logits of classes.

Letters: N sequences, C scores of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ta.chat.encode import Drop, encode_answers
from ta.chat.messages import ANSWER, template_arguments
from ta.chat.render import Tokens
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.batch import Batch, lay_out, to_device
from ta.data.micro import split_micro
from ta.folders import ModelConfig, read_folder, resolve
from ta.generation.generate import limits_of
from ta.generation.settings import BROKEN
from ta.generation.vllm_engine import VllmEngine, score_vllm
from ta.model.adapters import adapter_labels
from ta.model.language_model import LanguageModel, evaluating, wrap
from ta.model.load import load_for_inference
from ta.model.logprobs import sequence_sums

# token ids and their weights
Weighted = tuple[Sequence[int], Sequence[float]]


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


def class_names_of(config: ModelConfig) -> list[str]:
    """The names of a saved classifier's classes, in order; [] where it has only numbers."""
    sources = resolve(config)
    settings = adapter_labels(sources.adapter) if sources.adapter else {}
    named = settings.get("id2label") or read_folder(sources.base, config.hub).config.get("id2label")
    by_number = sorted((int(number), name) for number, name in (named or {}).items())
    names = [name for _, name in by_number]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


def score(
    model: LanguageModel | VllmEngine,
    sequences: Sequence[Tokens],
    max_tokens_per_micro: int = 8192,
) -> list[list[float]]:
    """N rows of C scores, each read at the sequence's last token, before any softmax.

    A sequence has the same scores whatever it is batched with. `max_tokens_per_micro`: tokens in
    one forward pass, where the model is ours. ValueError for scores that are no numbers.
    """
    if isinstance(model, VllmEngine):
        return _numbers(score_vllm(model, sequences))
    unlearned = [(ids, [0.0] * len(ids)) for ids, _ in sequences]

    def scores(batch: Batch) -> list[list[float]]:
        return model.scores(batch).double().tolist()  # (N, C)

    return _numbers(_each(model, unlearned, max_tokens_per_micro, scores))


def _numbers(rows: list[list[float]]) -> list[list[float]]:
    if any(math.isnan(value) for row in rows for value in row):
        raise ValueError(BROKEN)
    return rows


def _each(
    model: LanguageModel,
    sequences: Sequence[Weighted],
    max_tokens: int,
    values: Callable[[Batch], list],
) -> list:
    """The value of each sequence, by a function that gives those of a batch."""
    rows: dict[int, Any] = {}
    with evaluating(model):
        for places, batch in _micro_batches(model, sequences, max_tokens):
            rows.update(zip(places, values(batch), strict=True))
    return [rows[i] for i in range(len(rows))]


def _micro_batches(
    model: LanguageModel, sequences: Sequence[Weighted], max_tokens: int = 8192
) -> Iterator[tuple[list[int], Batch]]:
    """(Places of some sequences, their batch on the model's device), until all have had a turn."""
    device, sizes = model.device, [len(ids) for ids, _ in sequences]
    for places in split_micro(sizes, max_tokens, packed=model.packed)[0]:
        if places:
            ids, weights = zip(*(sequences[i] for i in places), strict=True)
            yield places, to_device(lay_out(ids, weights, model.packed), device)


class RewardModel:
    """The reward model in a folder, which reads chats through its own tokenizer and template.

    A forward pass has at most `max_tokens` tokens. ValueError for a folder that holds none.
    """

    def __init__(self, folder: str, device: Any = "cpu", max_tokens: int = 8192):

        config = ModelConfig(model_path=folder)
        if (labels := num_labels_of(config)) != 1:
            raise ValueError(f"{folder} gives {labels} scores: give a reward model, which gives 1")
        self.tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
        self.model, _ = wrap(load_for_inference(config, str(device), 1))
        self.max_tokens = max_tokens
        self.longest = min(max_tokens, limits_of(self.model)[1] or max_tokens)

    def score(
        self, records: Sequence[dict], answers: Sequence[str]
    ) -> list[tuple[float | None, str]]:
        """For each record of "messages" with its answer (its reward, ""), or (None, why not)."""
        chats = [record["messages"] for record in records]
        turns = [[{"role": ANSWER, "content": text}] for text in answers]
        about = [template_arguments(record) for record in records]
        out: list[tuple[float | None, str]] = []
        fitting = []
        for found in encode_answers(chats, turns, self.tokenizer, ChatConfig(), about):
            fault = found.detail if isinstance(found, Drop) else ""
            if not fault and (size := len(found[0].ids)) > self.longest:
                fault = f"{size} tokens are more than the reward model can read"
            out.append((None, fault))
            fitting += [] if fault else found
        rows = iter(score(self.model, fitting, self.max_tokens))
        return [(None, fault) if fault else (next(rows)[0], "") for _, fault in out]


def reward_answers(
    folder: str, chats: Sequence[list[dict]], answers: Sequence[Sequence[str]], device: Any = "cpu"
) -> list[list[float]]:
    """The rewards of the answers to each chat by the reward model in a folder.

    ValueError where it is no reward model or an answer does not fit.
    """
    groups = zip(chats, answers, strict=True)
    asked = [({"messages": chat}, text) for chat, group in groups for text in group]
    scored = RewardModel(folder, device).score(*zip(*asked, strict=True)) if asked else []
    for (_, text), (_, fault) in zip(asked, scored, strict=True):
        if fault:
            raise ValueError(f"answer {text[:80]!r} has no reward by {folder}: {fault}")
    rewards = (reward for reward, _ in scored)
    return [[next(rewards) for _ in group] for group in answers]


def kl_to_reference(
    model: LanguageModel,
    reference: Callable[[Batch], Tensor],
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> float:
    """Mean over the tokens of answers of log p(model) - log p(reference), nats a token.

    Of answers that were sampled from the model at temperature 1 it estimates the KL divergence from
    the reference (k1 of `metrics.kl`). `reference` gives the (N,) sums of a batch's sequences;
    `sequences` are (prompt, answer) token ids. All processes take part in both.
    """
    weighted = []
    for prompt, answer in sequences:
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        weighted.append(([*prompt, *answer], weights))
    gap = 0.0
    with evaluating(model):
        for _, batch in _micro_batches(model, weighted):
            ours = sequence_sums(model.logprobs(batch), batch.owners, len(batch.ends))
            gap += (ours.double() - reference(batch).double()).sum().item()
    return gap / max(sum(len(answer) for _, answer in sequences), 1)


def answer_logprobs(
    model: LanguageModel,
    sequences: Sequence[Weighted],
    max_tokens_per_micro: int = 8192,
) -> list[list[float]]:
    """log p of every learned token of each sequence of (token ids, their weights), in nats.

    ValueError for what is no number.
    """
    values = partial(by_sequence, model)
    return _numbers(_each(model, sequences, max_tokens_per_micro, values))


def by_sequence(model: LanguageModel, batch: Batch) -> list[list[float]]:
    """log p of the learned tokens of each sequence of a batch, in nats.

    It runs for an empty batch too: other processes take part in the same calls.
    """
    logps = model.logprobs(batch)  # (M,)
    counts = batch.owners.bincount(minlength=len(batch.ends)).tolist()
    return [part.tolist() for part in logps.cpu().split(counts)] if counts else []
