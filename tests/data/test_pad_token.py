"""Scores of an exported classifier in plain transformers, whatever the tokenizer pads with: single, and in a padded batch."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ta.builtin.models import write_tiny
from ta.chat.encode import encode_chats
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.batch import lay_out
from ta.data.pad_token import with_own_pad_token
from ta.data.prepare import Prepared
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig
from ta.model.export import export
from ta.model.load import ComputeConfig, load_model

ENDS_AT_TOKEN = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m['role'] ~ '\n' ~ m['content'] ~ '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in (("cup red\ncup?", "cup red"), ("cup?", "no"), ("red", "cup cup cup"))
]


def folder(path, pad, special):
    """The tiny model with a template that ends at <|im_end|>; of its added tokens only `special` are special."""
    write_tiny(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = ENDS_AT_TOKEN
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(path)
    backend = json.loads((path / "tokenizer.json").read_text())
    for token in backend["added_tokens"]:
        token["special"] = token["content"] in special
    (path / "tokenizer.json").write_text(json.dumps(backend))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    for name in ("extra_special_tokens", "additional_special_tokens"):
        settings.pop(name, None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return ModelConfig(str(path))


def opened(config):
    """(tokenizer, encoded CHATS, the same as prepared data)."""
    tokenizer = load_chat_tokenizer(config, TokenizerConfig(), ChatConfig())
    encoded = encode_chats(CHATS, tokenizer, ChatConfig())
    ids = np.concatenate([tokens.ids for tokens in encoded])
    offsets = np.cumsum([0, *(len(tokens.ids) for tokens in encoded)])
    data = Prepared(ids, np.ones(len(ids)), offsets, np.zeros((3, 2)), {}, {}, 1)
    return tokenizer, encoded, data


ALL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("pad", "special", "chosen"),
    [
        ("<|endoftext|>", ALL, "<|endoftext|>"),
        ("<|im_end|>", ALL, "<|endoftext|>"),
        (None, ALL, "<|endoftext|>"),
        (None, ("<|im_end|>",), "<|pad|>"),
        ("<|im_end|>", ("<|im_start|>", "<|im_end|>"), "<|pad|>"),
    ],
)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_scores_in_plain_transformers(tmp_path, capsys, pad, special, chosen, adapter):
    config = folder(tmp_path / "base", pad, special)
    tokenizer, encoded, data = opened(config)
    tokenizer = with_own_pad_token(tokenizer, data, None)
    said = capsys.readouterr().err
    assert tokenizer.fast.pad_token == chosen
    assert (f"padding is {chosen}" in said) == (pad != chosen)
    settings = AdapterConfig(adapter=adapter)
    model = load_model(config, settings, ComputeConfig(), tokenizer, num_labels=2)
    ids = [np.array(tokens.ids) for tokens in encoded]
    expected = model.eval().scores(lay_out(ids, [np.zeros(len(x)) for x in ids], model.packed))
    export(model, tokenizer, tmp_path / "final")
    fast = AutoTokenizer.from_pretrained(tmp_path / "final")
    if adapter == "none":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
        plain.resize_token_embeddings(len(fast), mean_resizing=False)
        plain = PeftModel.from_pretrained(plain, tmp_path / "final")
        # what the line on the screen says
        plain.config.pad_token_id = fast.pad_token_id
    texts = [fast.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    fast.padding_side = "right"
    with torch.no_grad():
        together = plain.eval()(**fast(texts, return_tensors="pt", padding=True)).logits
        alone = [plain(**fast([text], return_tensors="pt")).logits[0] for text in texts]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(alone), expected, rtol=1e-4, atol=1e-4)
