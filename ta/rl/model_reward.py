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
        self.context = limits_of(self.model)[1]

    def score(
        self, records: Sequence[dict], answers: Sequence[Sequence[str]]
    ) -> list[list[tuple[float | None, str]]]:
        """For each record and answer (its reward, ""), or (None, why it has none)."""
        chats = [record["messages"] for record in records]
        asked = [[{"role": "assistant", "content": text} for text in group] for group in answers]
        tools = [template_arguments(record) for record in records]
        encoded = encode_answers(chats, asked, self.tokenizer, ChatConfig(), tools)
        out: list[list[tuple[float | None, str]]] = []
        flat, places = [], []
        for i, (group, sequences) in enumerate(zip(answers, encoded, strict=True)):
            dropped = sequences.detail if isinstance(sequences, Drop) else ""
            out.append([(None, dropped)] * len(group))
            for k, tokens in enumerate([] if dropped else sequences):
                if (size := len(tokens.ids)) > min(self.max_tokens, self.context or size):
                    out[i][k] = None, f"{size} tokens are more than the reward model can read"
                    continue
                flat.append(tokens)
                places.append((i, k))
        for (i, k), row in zip(places, score(self.model, flat, self.max_tokens), strict=True):
            out[i][k] = row[0], ""
        return out
