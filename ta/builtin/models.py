"""Seeded tiny models and their tokenizer, made in code, and the records that they learn from."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ta.builtin import tasks

if TYPE_CHECKING:
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

# The tiny model learns the tasks in TINY_STEPS steps that see TINY_STEPS * TINY_BATCH chats once.
TINY_STEPS = 1400
TINY_BATCH = 8
TINY_LR = 1.5e-3

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown "
    "role ' ~ message['role']) }}{% endif %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.lru_cache(maxsize=3)
def _trained_backend(catalogue: bool | tuple[str, ...] = False) -> str:
    """A byte-level BPE as JSON, trained on the generated records (about 0.2 s).

    Each of their words becomes a token. `catalogue` is that of `tiny_tokenizer`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    if isinstance(catalogue, tuple):
        words = catalogue
    elif catalogue:
        known = (*tasks.PEOPLE, *tasks.OBJECTS, *tasks.WORDS, *tasks.PLACES)
        words = [f"{gap}{word}" for word in known for gap in ("", " ")]
        words += [f"{number:02}" for number in range(100)] + ["number of"]
    else:
        records = tasks.chats("train", 2000) + tasks.classes("train", 500)
        texts = [message["content"] for record in records for message in record["messages"]]
        words = (*tasks.THINGS, *tasks.COLOURS, *tasks.NAMES, *itertools.chain(*tasks.TOPICS))
    texts += [*words, "system", "user", "assistant"] * 2
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def tiny_tokenizer(catalogue: bool | tuple[str, ...] = False) -> PreTrainedTokenizerFast:
    """A new byte-level tokenizer with a ChatML template.

    <|im_end|> ends an answer (eos), <|endoftext|> pads, and every byte encodes. Its tokens are the
    words of the dialogues; with `catalogue` those of the passages and their questions, or those of
    the texts in it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_backend(catalogue)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def tiny_config(catalogue: bool | tuple[str, ...] = False, **more: Any) -> LlamaConfig:
    """The shape of the tiny models: a Llama of about a million weights.

    Its vocabulary is that of tiny_tokenizer(catalogue). `more` overrides settings of LlamaConfig.
    """
    from transformers import LlamaConfig

    tokenizer = tiny_tokenizer(catalogue)
    settings = {
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.07,
    }
    return LlamaConfig(**settings | more)


def tiny_model(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """The seeded random language model in float32; its generation stops at <|im_end|>.

    The global random state does not change.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    config = tiny_config(**more)
    model = _seeded(LlamaForCausalLM, config, seed)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    return model


def _seeded(model_class: type, config: Any, seed: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).float().eval()


def write_tiny(
    folder: str | os.PathLike, seed: int = 0, num_labels: int | None = None, **more: Any
) -> None:
    """Save the tiny model and its tokenizer as a folder that from_pretrained loads.

    With `num_labels` it is the same body with a classification head of as many scores, which are
    read at the last token that is not padding.
    """
    from transformers import LlamaForSequenceClassification

    if num_labels is None:
        model = tiny_model(seed, **more)
    else:
        config = tiny_config(num_labels=num_labels, **more)
        model = _seeded(LlamaForSequenceClassification, config, seed)
    _write(folder, model)


def write_encoder(folder: str | os.PathLike, seed: int = 0, **more: Any) -> None:
    """Save a seeded random text encoder of one layer and its tokenizer in the same way.

    Its vector of a text is little more than a mixture of the text's words.
    """
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer(True)
    settings = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.05,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    _write(folder, _seeded(BertModel, BertConfig(**settings | more), seed), True)


def write_small(folder: str | os.PathLike) -> None:
    """Save a smaller language model and its tokenizer in the same way.

    It reads one short passage and learns within a minute to answer from it.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape = {"hidden_size": 96, "intermediate_size": 240, "num_hidden_layers": 1}
    _write(folder, tiny_model(catalogue=True, **heads, **shape), True)


def write_pictures_model(folder: str | os.PathLike, texts: tuple[str, ...]) -> None:
    """Save a language model whose tokens are the words of `texts`.

    `texts` are those of the generated pictures.
    """
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    shape = {"hidden_size": 128, "intermediate_size": 352}
    _write(folder, tiny_model(catalogue=texts, **heads, **shape), texts)


def _write(
    folder: str | os.PathLike, model: Any, catalogue: bool | tuple[str, ...] = False
) -> None:
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    state = model.state_dict()
    # of tied tables only the input's is saved
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    weights = {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}
    # save_pretrained would write on rank 0 only
    save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    tiny_tokenizer(catalogue).save_pretrained(folder)


def models_version() -> str:
    """A hash of the code that makes the built-in models and records.

    It is the key of their cache folder.
    """
    code = [Path(path).read_bytes() for path in (__file__, tasks.__file__)]
    return hashlib.sha256(b"".join(code)).hexdigest()[:16]
