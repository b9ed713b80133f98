"""What an adapter's folder says of the base it was trained on, read without peft, and the check that a model is that base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, BASE, ROWS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "new_tokens.safetensors",
)
READABLE = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
SAMPLED, CLOSE = (
    16,
    0.02,
)  # weights compared, and how near they must be: bfloat16 and float32 copies of one base are the same base


class Facts(NamedTuple):
    """What an adapter must know of its base, set on the peft model as `adapter_facts` and saved beside the weights; empty where unknown."""

    base: dict[
        str, Any
    ]  # name, architecture, task, vocabulary, and a few weights by name; a classifier's labels
    rows: dict[
        str, Tensor
    ]  # ids (N,) and the base's rows there: input (N, D), output (N, D) if untied, output_bias (N,); empty without new tokens


def task_of(model: PreTrainedModel) -> str:
    """peft's name of what the model is for: SEQ_CLS, CAUSAL_LM or FEATURE_EXTRACTION (an encoder without a head)."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM"


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The facts of a base that has no adapter yet; heads and token tables, which training may replace or enlarge, give no sample."""
    skip = {id(model.get_input_embeddings().weight)}
    skip |= {
        id(p)
        for name, p in model.named_parameters()
        if name.split(".")[0] in ("score", "classifier", "lm_head", "embed_out")
    }
    sampled = [
        (name, p)
        for name, p in model.named_parameters()
        if p.is_floating_point() and p.ndim == 2 and not p.is_meta and id(p) not in skip
    ]
    step = max(1, len(sampled) // SAMPLED)
    facts = {
        "name": model.name_or_path,
        "architecture": type(model).__name__,
        "task": task_of(model),
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "sample": {name: p.detach()[0, :4].float().tolist() for name, p in sampled[::step]},
    }
    if facts["task"] == "SEQ_CLS":
        facts |= {"num_labels": model.config.num_labels, "id2label": model.config.id2label}
    return facts


def title(facts: dict[str, Any]) -> str:
    """One base in words, for messages."""
    return f"{facts['name'] or 'without a name'!r} ({facts['architecture']}, {facts['task']}, vocabulary {facts['vocabulary']})"


def check_base(model: PreTrainedModel, facts: Facts, path: str) -> None:
    """ValueError, naming both bases, unless `model` is the base of the adapter at `path`, with or without the rows of its new tokens."""
    ours, theirs = describe(model), facts.base
    new = set(facts.rows["ids"].tolist()) if facts.rows else set()
    low, high = ours["vocabulary"], theirs["vocabulary"]
    shared = ours["sample"].keys() & theirs["sample"].keys()
    differing = [
        name for name in sorted(shared) if not _near(ours["sample"][name], theirs["sample"][name])
    ]
    if ours["architecture"] != theirs["architecture"]:
        reason = "the architectures differ"
    elif low > high or not set(range(low, high)) <= new:
        reason = "the vocabularies differ"
    elif differing:
        reason = f"the weights differ, {differing[0]} for one"
    else:
        return
    raise ValueError(
        f"adapter {path} was trained on base {title(theirs)}, the model given is {title(ours)}: {reason}; give the base that it was trained on"
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings of the adapter in folder `path`; ValueError where there is none, or none of ours, or no safetensors."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"no adapter folder at {path}: give the folder that holds {CONFIG} (a run's export is RUN/final)"
        )
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{path} holds no {' and no '.join(missing)}: give the folder of a saved adapter"
        )
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") not in READABLE:
        raise ValueError(
            f"{folder / CONFIG}: an adapter of type {config.get('peft_type')!r}; known are {', '.join(READABLE)}"
        )
    return config


def read_facts(path: str | Path) -> Facts:
    """What the adapter in folder `path` says of its base; empty for an adapter that another library saved."""
    folder = Path(path)
    base = _read_json(folder / BASE) if (folder / BASE).is_file() else {}
    if base and not {"name", "architecture", "task", "vocabulary", "sample"} <= base.keys():
        raise ValueError(
            f"{folder / BASE} is not complete: save the adapter again, or remove that file to load without knowing its base"
        )
    return Facts(base, read_tensors(folder / ROWS) if base and (folder / ROWS).is_file() else {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): give a complete adapter folder"
        ) from error


def labels_of(path: str | Path) -> dict[str, Any]:
    """`num_labels` (and `id2label` where recorded) of a classification adapter, to load its base with; else from the shape of its head."""
    from safetensors import safe_open

    facts = read_facts(path).base
    if "num_labels" in facts:
        return {
            "num_labels": facts["num_labels"],
            "id2label": {int(key): label for key, label in facts["id2label"].items()},
        }
    with safe_open(Path(path) / WEIGHTS, "pt") as file:
        heads = [
            name for name in file.keys() if name.endswith(("score.weight", "classifier.weight"))
        ]
        if not heads:
            raise ValueError(
                f"{path} holds no classification head (score.weight): give an adapter that was saved with its head"
            )
        return {"num_labels": file.get_slice(heads[0]).get_shape()[0]}


def _near(left: list[float], right: list[float]) -> bool:
    return len(left) == len(right) and all(
        abs(a - b) <= CLOSE * max(abs(a), abs(b)) + 1e-6 for a, b in zip(left, right, strict=True)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): give a complete adapter folder"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} holds a {type(data).__name__}, not settings: give a complete adapter folder"
        )
    return data
