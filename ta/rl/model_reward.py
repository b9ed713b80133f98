"""The reward that a trained reward model gives: model:FOLDER."""

from __future__ import annotations

from collections.abc import Sequence

from ta.chat.encode import Drop, encode_answers
from ta.chat.messages import template_arguments
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.folders import ModelConfig
from ta.generation.generate import limits_of
from ta.generation.score import num_labels_of, score
from ta.model.language_model import wrap
from ta.model.load import load_for_inference


class ModelReward:
    """A reward model, which reads chats through its own tokenizer and template.

    ValueError for a folder that holds none.
    """

    def __init__(self, folder: str, device: str, max_tokens: int):
        config = ModelConfig(model_path=folder)
        if (labels := num_labels_of(config)) != 1:
            raise ValueError(
                f"--rewards model:{folder} gives {labels} scores: give a reward model (1)"
            )
        self.tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
        self.model, _ = wrap(load_for_inference(config, device, 1))
        self.max_tokens = max_tokens
        self.longest = min(max_tokens, limits_of(self.model)[1] or max_tokens)

    def score(
        self, records: Sequence[dict], answers: Sequence[str]
    ) -> list[tuple[float | None, str]]:
        """For each record with its answer (its reward, ""), or (None, why it has none)."""
        chats = [record["messages"] for record in records]
        turns = [[{"role": "assistant", "content": text}] for text in answers]
        tools = [template_arguments(record) for record in records]
        encoded = encode_answers(chats, turns, self.tokenizer, ChatConfig(), tools)
        out: list[tuple[float | None, str]] = [(None, "")] * len(answers)
        fitting = {}
        for i, found in enumerate(encoded):
            if isinstance(found, Drop):
                out[i] = None, found.detail
            elif (size := len(found[0].ids)) > self.longest:
                out[i] = None, f"{size} tokens are more than the reward model can read"
            else:
                fitting[i] = found[0]
        rows = score(self.model, list(fitting.values()), self.max_tokens)
        for i, row in zip(fitting, rows, strict=True):
            out[i] = row[0], ""
        return out
