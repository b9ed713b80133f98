"""How a text becomes a vector: pooling, prefixes, length limit, as an encoder's folder says."""

from __future__ import annotations

import sys
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
    "lasttoken": "last",
}
LAYERS = ["Transformer", "Pooling", "Normalize"]
# names of sentence-transformers' settings of an encoder's input, the present one first
INPUT_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
# what they may say beside length and case: what is done here, and what changes no vector
INPUT = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
NEUTRAL = ("dtype", "torch_dtype", "attn_implementation", "add_pooling_layer")


@dataclass(frozen=True)
class EncoderConfig:
    encoder_path: str = "builtin"
    """Folder of a text encoder, such as a sentence-transformers model; "builtin" is a tiny random
    one."""
    pooling: Literal["mean", "cls", "last", "max"] | None = None
    """What of an encoder's states is a text's vector. Default, here and below: what the encoder's
    folder says, else mean, normalised."""
    normalize: bool | None = None
    """Scale vectors to length 1, so that scores are cosines; an encoder's folder says so unless it
    names the dot product."""
    query_prefix: str | None = None
    """Text in front of every question, such as "query: "."""
    passage_prefix: str | None = None
    """Text in front of every passage, such as "passage: "."""
    encoder_max_tokens: int | None = None
    """Tokens of a text that the encoder reads at most; what is longer is cut, at its end unless the
    tokenizer cuts its beginning."""
    hub: bool = False
    """Take an --encoder-path that is no folder from the Hugging Face hub, or from its cache where
    there is no network."""


class EmbeddingSettings(NamedTuple):
    """How an encoder's texts become vectors."""

    pooling: Literal["mean", "cls", "last", "max"]
    normalize: bool  # to length 1
    query_prefix: str
    passage_prefix: str
    max_tokens: int  # longer texts are cut
    lower_case: bool = False  # texts and prefixes, before they are tokenized


def embedding_settings(folder: str, config: EncoderConfig) -> EmbeddingSettings:
    """The settings in an encoder's folder, each replaced by the user's where he gives one.

    They are read from sentence-transformers' files; without these, pooling is the mean and vectors
    have length 1. As there, vectors that no similarity is named for are compared by their cosines,
    and a question takes the prompt "query", a passage the first of "document", "passage" and
    "corpus" that there is. ValueError for a layer, a pooling or a setting of sentence-transformers
    that is not applied here (the vectors would be others), and for a length that the encoder cannot
    read.
    """
    pooling, normalize, with_prompt = _pooling_of(folder, config.pooling)
    texts = Path(folder) / "config_sentence_transformers.json"
    prompts = value_of(texts, "prompts", dict) or {}
    if not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{texts}: prompts holds what is no text; mend it")
    similarity = value_of(texts, "similarity_fn_name", str) or "cosine"
    if similarity not in ("cosine", "dot") and config.normalize is None:
        raise ValueError(
            f"{folder} compares vectors by {similarity}, which is not done here: give another "
            "encoder, or --normalize True to compare by cosines"
        )
    if value_of(texts, "truncate_dim", int):
        raise ValueError(f"{texts}: truncate_dim is not applied here; give another encoder")
    passage = next((name for name in ("document", "passage", "corpus") if name in prompts), "")
    given = _input_of(folder)
    limit = given.get("max_seq_length") or value_of(
        Path(folder) / "tokenizer_config.json", "model_max_length", int | float
    )
    limit = int(min(limit or sys.maxsize, max_positions(folder)))
    settings = EmbeddingSettings(
        pooling,
        normalize or similarity == "cosine",
        query_prefix=prompts.get("query") or "",
        passage_prefix=prompts.get(passage) or "",
        max_tokens=limit,
        lower_case=bool(given.get("do_lower_case")),
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
    than the table has rows. An encoder without such a table reads texts of any length.
    """
    import torch
    from transformers import AutoModel

    config = model_config(folder)
    with loading(folder, "a text encoder"), torch.device("meta"):
        model = AutoModel.from_config(config)
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            return module.weight.shape[0] - first - 1
    limit = getattr(config, "max_position_embeddings", None) or -1
    return limit if limit > 0 else sys.maxsize


def _input_of(folder: str) -> dict[str, Any]:
    """What sentence-transformers' files say of an encoder's input."""
    names = (f"sentence_{kind}_config.json" for kind in INPUT_KINDS)
    name = next((name for name in names if (Path(folder) / name).exists()), "")
    path = Path(folder) / name
    if not name:
        return {}
    value_of(path, "max_seq_length", int | float)
    value_of(path, "do_lower_case", bool)
    given = read_json(path)
    for key, value in given.items():
        if isinstance(value, dict):
            value = {inner: x for inner, x in value.items() if inner not in NEUTRAL}
        known = key in ("max_seq_length", "do_lower_case", "unpad_inputs")
        if value and not known and value != INPUT.get(key):
            raise ValueError(
                f"{path}: {key} {json_text(value)} is not applied here; give another encoder"
            )
    return given


def _pooling_of(folder: str, asked: str | None) -> tuple[Any, bool, bool]:
    """The pooling that is asked for or that a folder names, whether it scales its vectors to length
    1, and whether the tokens of a prefix take part.
    """
    modules = _json(folder, "modules.json", list) or []
    with loading(f"{folder}/modules.json", "the layers of a text encoder"):
        kinds = [module["type"] for module in modules]
        paths = [module["path"] for module in modules]
    # a class of the folder's own keeps its whole name
    own = "sentence_transformers."
    names = [kind.rpartition(".")[2] if kind.startswith(own) else kind for kind in kinds]
    if unknown := set(names) - set(LAYERS):
        raise ValueError(
            f"{folder}: modules.json has a {min(unknown)} layer, which is not applied here: "
            "give an encoder without it"
        )
    if not modules:
        return "mean", True, True
    if names not in (LAYERS, LAYERS[:2]) or paths[0]:
        raise ValueError(
            f"{folder}: modules.json lists {', '.join(names)} in {paths}; what is applied here are "
            f"{', '.join(LAYERS)}, the first in the folder itself: give another encoder"
        )
    file = f"{paths[1]}/config.json"
    config = _json(folder, file) or {}
    modes = [key for key, on in config.items() if key.startswith("pooling_mode") and on]
    if mode := value_of(Path(folder) / file, "pooling_mode", str, many=True):
        modes = [mode] if isinstance(mode, str) else mode
    known = [POOLINGS.get(mode, mode) for mode in modes]
    if not asked and (len(modes) != 1 or known[0] not in POOLINGS.values()):
        raise ValueError(
            f"{folder}: pooling by {' and '.join(modes) or 'nothing'} is not known: "
            f"give --pooling {'|'.join(dict.fromkeys(POOLINGS.values()))}"
        )
    return asked or known[0], "Normalize" in names, config.get("include_prompt", True)


def save_embedding_settings(folder: Path, settings: EmbeddingSettings) -> None:
    """Write the settings beside a saved encoder, in the files that `embedding_settings` reads.

    sentence-transformers then loads the folder too.
    """
    kinds = LAYERS if settings.normalize else LAYERS[:2]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    width = width_of(str(folder))
    modes = [key for key in POOLINGS if key.startswith("pooling_mode")]
    pooling = {key: POOLINGS[key] == settings.pooling for key in modes}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
        "sentence_bert_config.json": {
            "max_seq_length": settings.max_tokens,
            "do_lower_case": settings.lower_case,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix},
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
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
