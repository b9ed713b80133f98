"""How a text becomes a vector: pooling, prefixes, length limit, as an encoder's folder says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ta.files import json_text
from ta.folders import loading, read_json, value_of

LOCAL = {"local_files_only": True, "trust_remote_code": False}
POOLINGS = {  # what sentence-transformers calls them in 1_Pooling/config.json
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class EncoderConfig:
    encoder_path: str = "builtin"
    """Folder of a text encoder, such as a sentence-transformers model; "builtin" is a tiny random
    one."""
    pooling: Literal["mean", "cls", "last", "max"] | None = None
    """What of an encoder's states is a text's vector. Default, here and below: what the encoder's
    folder says, else mean, normalised."""
    normalize: bool | None = None
    """Scale vectors to length 1, so that scores are cosines."""
    query_prefix: str | None = None
    """Text in front of every question, such as "query: "."""
    passage_prefix: str | None = None
    """Text in front of every passage, such as "passage: "."""
    encoder_max_tokens: int | None = None
    """Tokens of a text that the encoder reads at most; what is longer is cut at its end."""
    hub: bool = False
    """Take an --encoder-path that is no folder from the Hugging Face hub, or from its cache where
    there is no network."""


class EmbeddingSettings(NamedTuple):
    """How an encoder's texts become vectors."""

    pooling: Literal["mean", "cls", "last", "max"]
    normalize: bool  # to length 1
    query_prefix: str
    passage_prefix: str
    max_tokens: int  # longer texts are cut at their end
    lower_case: bool = False  # texts and prefixes, before they are tokenized


def embedding_settings(folder: str, config: EncoderConfig) -> EmbeddingSettings:
    """The settings in an encoder's folder, each replaced by the user's where he gives one.

    They are read from sentence-transformers' files; without these, pooling is the mean and vectors
    have length 1. ValueError for a layer, a pooling or a setting of sentence-transformers that is
    not applied here (the vectors would be others), and for a length that the encoder cannot read.
    """
    pooling, normalize, with_prompt = _pooling_of(folder)
    texts = Path(folder) / "config_sentence_transformers.json"
    reading = Path(folder) / "sentence_bert_config.json"
    prompts = value_of(texts, "prompts", dict) or {}
    if not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"{texts}: prompts holds what is no text; mend it")
    default_prompt = prompts.get(value_of(texts, "default_prompt_name", str), "")
    limit = value_of(reading, "max_seq_length", int | float) or value_of(
        Path(folder) / "tokenizer_config.json", "model_max_length", int | float
    )
    limit = int(min(limit or math.inf, max_positions(folder)))
    settings = EmbeddingSettings(
        pooling,
        normalize,
        query_prefix=prompts.get("query", default_prompt),
        passage_prefix=prompts.get("passage", prompts.get("document", default_prompt)),
        max_tokens=limit,
        lower_case=bool(value_of(reading, "do_lower_case", bool)),
    )
    by_user = {name: getattr(config, name, None) for name in settings._fields}
    by_user["max_tokens"] = config.encoder_max_tokens
    settings = settings._replace(**{name: x for name, x in by_user.items() if x is not None})
    if not with_prompt and (settings.query_prefix or settings.passage_prefix):
        raise ValueError(
            f"{folder}: include_prompt is false in its pooling, which leaves the prefix out of the "
            'mean and is not applied here: give another encoder, or --query-prefix "" and '
            '--passage-prefix ""'
        )
    if not 1 <= settings.max_tokens <= limit:
        raise ValueError(
            f"--encoder-max-tokens {settings.max_tokens}: the encoder in {folder} reads "
            f"1 to {limit}"
        )
    return settings


def max_positions(folder: str) -> int:
    """How many tokens the encoder in a folder has positions for.

    RoBERTa and its relatives count positions from behind the padding's number, so that fewer fit
    than the table has rows.
    """
    import torch
    from transformers import AutoModel

    config = model_config(folder)
    with loading(folder, "a text encoder"), torch.device("meta"):
        model = AutoModel.from_config(config)
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            return module.num_embeddings - first - 1
    return getattr(config, "max_position_embeddings", None) or 512


def _pooling_of(folder: str) -> tuple[Any, bool, bool]:
    """The pooling that a folder names, whether its vectors are scaled to length 1, and whether the
    tokens of a prefix take part.
    """
    modules = _json(folder, "modules.json", list) or []
    with loading(f"{folder}/modules.json", "the layers of a text encoder"):
        names = [module["type"].rpartition(".")[2] for module in modules]
        paths = [module["path"] for module in modules]
    if unknown := set(names) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{folder}: modules.json has a {min(unknown)} layer, which is not applied here: "
            "give an encoder without it"
        )
    normalize = "Normalize" in names or not modules
    if "Pooling" not in names:
        return "mean", normalize, True
    file = f"{paths[names.index('Pooling')]}/config.json"
    config = _json(folder, file) or {}
    modes = [key for key, on in config.items() if key.startswith("pooling_mode") and on]
    if mode := value_of(Path(folder) / file, "pooling_mode", str):
        modes = [mode]
    if len(modes) != 1 or POOLINGS.get(modes[0], modes[0]) not in POOLINGS.values():
        raise ValueError(
            f"{folder}: pooling by {' and '.join(modes) or 'nothing'} is not known: "
            f"give --pooling {'|'.join(POOLINGS.values())}"
        )
    return POOLINGS.get(modes[0], modes[0]), normalize, config.get("include_prompt", True)


def save_embedding_settings(folder: Path, settings: EmbeddingSettings) -> None:
    """Write the settings beside a saved encoder, in the files that `embedding_settings` reads.

    sentence-transformers then loads the folder too.
    """
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if settings.normalize:
        kinds.append(("Normalize", "2_Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    width = width_of(str(folder))
    pooling = {key: name == settings.pooling for key, name in POOLINGS.items()}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_tokens,
            "do_lower_case": settings.lower_case,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "passage": settings.passage_prefix}
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json_text(content, indent=2))


def width_of(folder: str) -> int:
    """E, the width of a vector, from the encoder's config."""
    return model_config(folder).get_text_config().hidden_size


def model_config(folder: str) -> Any:
    """transformers' config of the encoder in a local folder."""
    from transformers import AutoConfig

    with loading(folder, "a text encoder"):
        return AutoConfig.from_pretrained(folder, **LOCAL)


def _json(folder: str, name: str, kind: type = dict) -> Any:
    path = Path(folder) / name
    return read_json(path, kind) if path.exists() else None
