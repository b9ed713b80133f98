"""Adapters on a base model: create, save, load, check against the base, and merge.

The embedding rows of new tokens train with an adapter and are saved with it. Letters: T columns, V
vocabulary, D model width, C classes, N new tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ta.command_line import check_config
from ta.files import json_text
from ta.folders import differing, loading, read_json, read_tensors, value_of, write_tensors
from ta.model.attention import own_attention
from ta.model.new_rows import resize, tables, token_table
from ta.model.settings import AdapterConfig

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

KINDS = {
    "lora": "LORA",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p-tuning": "P_TUNING",
}
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def check_adapter(
    config: AdapterConfig, path: str | None = None, checkpointing: bool = False
) -> None:
    """Check the settings of an adapter before anything is loaded.

    `path` is the folder of a trained adapter that trains further. ValueError for settings that have
    no effect, are out of range, or cannot work together.
    """
    check_config(config)
    kind = config.adapter
    if path is not None and kind != "none":
        raise ValueError(
            f"--adapter {kind} asks for a new adapter, and {path} is one already: leave --adapter "
            "out to go on with that one, or merge it with recipes/merge.py and give the merged "
            "folder"
        )
    stored = read_config(path)["peft_type"] if path else KINDS.get(kind, "")
    if checkpointing and stored == "PREFIX_TUNING":
        raise ValueError(
            f"{stored} with activation checkpointing: its keys and values would be lost in the "
            "backward pass; turn checkpointing off"
        )


def lora_settings(
    model: PreTrainedModel, config: AdapterConfig, new_token_ids: Sequence[int]
) -> PeftConfig:
    """peft's settings for LoRA on `model`.

    ValueError for names that the model does not have.
    """
    from peft import LoraConfig

    targets = [] if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    saved = list(config.lora_modules_to_save)
    _check_names(model, "--lora-targets", targets)
    _check_names(model, "--lora-modules-to-save", saved)
    # GPT-2 stores its weights transposed
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    return LoraConfig(
        task_type=task_of(model),
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets or "all-linear",
        exclude_modules=None if targets else _without_lora(model) or None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        fan_in_fan_out=transposed,
        **_table_settings(model, targets, saved, sorted(set(new_token_ids))),
    )


def _table_settings(
    model: PreTrainedModel, targets: list[str], saved: list[str], new_token_ids: list[int]
) -> dict[str, Any]:
    """peft's settings of what trains whole, and of which rows of the token tables train.

    New tokens train in each table once: peft ties the rows of the head where the tables are tied.
    ValueError for tables that are tied in ways that peft cannot keep.
    """
    names = _table_names(model)
    tied = "output" not in tables(model) and len(names) == 2
    hit = [name for name in names if _matches(name, targets)]
    if hit and (tied or new_token_ids):
        reason = "the rows of new tokens train there"
        if tied:
            reason = "its table is tied to the other one"
        raise ValueError(
            f"--lora-targets: LoRA on {hit[0]} cannot be merged, {reason}; leave it out, or give "
            "it to --lora-modules-to-save"
        )
    whole = [name for name in names if _matches(name, saved)]
    if tied and whole:
        if not names[0].endswith("embed_tokens"):
            raise ValueError(
                f"--lora-modules-to-save: peft would untie {names[0]} from the head; leave it out "
                "(new tokens train without it)"
            )
        # peft ties the head to the input table itself, and it depends on the order of the names
        others = [t for t in saved if not any(_matches(name, [t]) for name in names)]
        return {"modules_to_save": [*others, names[0]], "ensure_weight_tying": True}
    rows = [name for name in names[: 1 if tied else 2] if name not in whole and new_token_ids]
    indices = dict.fromkeys(rows, new_token_ids)
    return {"modules_to_save": saved or None, "trainable_token_indices": indices or None}


def _without_lora(model: PreTrainedModel) -> list[str]:
    """Names of linear layers that all-linear leaves out.

    They are those of a classifier's head, which trains whole, those whose weight the kernel of a
    state space (Mamba) reads by itself, and those of a class of the model's own that gives
    something else than a linear layer does, such as routers.
    """
    heads = ("score", "classifier")  # as peft knows them, also pre_classifier
    classifies = task_of(model) == "SEQ_CLS"

    def left_out(name: str, module: nn.Linear) -> bool:
        parent, _, last = name.rpartition(".")
        above = type(model.get_submodule(parent)).__name__
        by_kernel = last == "out_proj" and ("Mixer" in above or "Mamba" in above)
        in_head = classifies and name.split(".")[0].endswith(heads)
        return in_head or by_kernel or not _is_linear(module)

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [name for name, module in layers if left_out(name, module)]


def _is_linear(module: nn.Linear) -> bool:
    """Whether a linear layer, or a subclass, gives one tensor of the shape that it should."""
    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or type(module).forward is nn.Linear.forward:
        return True
    weights = {name: tensor.to("meta") for name, tensor in module.named_parameters()}
    given = torch.empty(1, 2, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        out = functional_call(module, weights, (given,))
    except (RuntimeError, TypeError):
        return False
    return isinstance(out, Tensor) and out.shape == (1, 2, module.out_features)


def _check_names(model: PreTrainedModel, flag: str, targets: Sequence[str]) -> None:
    """ValueError for a name that no module of the model has."""
    modules = {name: module for name, module in model.named_modules() if name}
    for target in targets:
        if not any(_matches(name, [target]) for name in modules):
            leaves = [name for name, module in modules.items() if not list(module.children())]
            names = {name.rpartition(".")[2] for name in leaves}
            raise ValueError(
                f"{flag} {target}: the model has no module of that name; it has "
                f"{', '.join(sorted(names))}"
            )


def _table_names(model: PreTrainedModel) -> list[str]:
    """The names of the input table and of the output layer, where the model has one."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in layers if module is not None]


def prompt_settings(
    model: PreTrainedModel,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> tuple[PeftConfig, list[int] | None]:
    """peft's settings for prefix tuning, prompt tuning or p-tuning on `model`, and a start.

    The settings name no tokenizer, so peft looks none up. The start of prompt tuning are the token
    ids (virtual tokens,) whose embeddings it begins with: those of the text, repeated up to the
    number of virtual tokens, or random ones from `seed`. ValueError for a text without tokens or
    with more tokens than virtual tokens.
    """
    import peft

    count, text = config.virtual_tokens, config.prompt_init_text
    sizes = {"task_type": task_of(model), "num_virtual_tokens": count}
    if config.adapter == "prefix":
        return peft.PrefixTuningConfig(**sizes), None
    if config.adapter == "p-tuning":
        hidden = config.p_tuning_hidden
        return peft.PromptEncoderConfig(**sizes, encoder_hidden_size=hidden), None
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, len(token_table(model)), (count,), generator=generator).tolist()
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not 0 < len(ids) <= count:
        raise ValueError(
            f"--prompt-init-text {text!r} has {len(ids)} tokens for {count} virtual tokens; give a "
            f"text with 1 to {count} of them"
        )
    return peft.PromptTuningConfig(**sizes), (ids * count)[:count]


def _matches(name: str, targets: Sequence[str]) -> bool:
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


# peft's names of what an adapter is for, in words
TASKS = {
    "CAUSAL_LM": "a language model",
    "SEQ_CLS": "a reward model or classifier",
    "FEATURE_EXTRACTION": "a text encoder",
}
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
ROWS = "new_tokens.safetensors"
# number of weights that are compared to recognize a base
SAMPLED = 16
# relative tolerance of that comparison: a bfloat16 copy of a base must count as the same base
CLOSE = 0.02


class Facts(NamedTuple):
    """The facts about its base that an adapter keeps, on disk and in `adapter_facts` of the model.

    Both are empty where the facts are unknown.
    """

    # name, architecture, task, vocabulary, a sample of weights by name, and a classifier's labels
    base: dict[str, Any]
    # ids (N,) and the rows of the base at these ids: input (N, D), output (N, D) where the tables
    # are untied, output_bias (N,); empty without new tokens
    rows: dict[str, Tensor]


def task_of(model: PreTrainedModel) -> str:
    """peft's name of the model's task: SEQ_CLS, CAUSAL_LM, or FEATURE_EXTRACTION without a head."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "FEATURE_EXTRACTION" if model.get_output_embeddings() is None else "CAUSAL_LM"


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The facts of a base that has no adapter yet.

    The sample of weights leaves out heads and token tables, because training may replace or enlarge
    them.
    """
    heads, table = ("score", "classifier", "lm_head", "embed_out"), token_table(model)
    body = [(n, p) for n, p in model.named_parameters() if n.split(".")[0] not in heads]
    sampled = [
        (name, p)
        for name, p in body
        if p is not table and p.is_floating_point() and p.ndim == 2 and not p.is_meta
    ]
    step = max(1, len(sampled) // SAMPLED)
    starts = {name: p.detach()[0, :4] for name, p in sampled[::step]}
    task, config, labels = task_of(model), model.config, {}
    if task == "SEQ_CLS":
        labels = {"num_labels": config.num_labels, "id2label": config.id2label}
    return {
        "name": model.name_or_path,
        "architecture": type(model).__name__,
        "task": task,
        "vocabulary": len(table),
        "sample": {name: start.float().tolist() for name, start in starts.items()},
    } | labels


def check_base(model: PreTrainedModel, facts: Facts, path: str) -> None:
    """ValueError, naming both bases, unless `model` is the base of the adapter at `path`.

    The model may have the rows of the adapter's new tokens or lack them.
    """
    given, trained = describe(model), facts.base
    new = set(facts.rows["ids"].tolist()) if facts.rows else set()
    low, high = given["vocabulary"], trained["vocabulary"]
    left, right = given["sample"], trained["sample"]
    shared = sorted(left.keys() & right.keys())
    other = [name for name in shared if not _all_close(left[name], right[name])]
    if given["architecture"] != trained["architecture"]:
        reason = "the architectures differ"
    elif low > high or not set(range(low, high)) <= new:
        reason = "the vocabularies differ"
    elif other:
        reason = f"the weights differ, {other[0]} for one"
    else:
        return
    bases = [
        f"{base['name'] or 'without a name'!r} ({base['architecture']}, {base['task']}, "
        f"vocabulary {base['vocabulary']})"
        for base in (trained, given)
    ]
    raise ValueError(
        f"adapter {path} was trained on base {bases[0]}, the model given is {bases[1]}: {reason}; "
        "give the base that it was trained on"
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings of the adapter in folder `path`.

    ValueError where there is no adapter, an adapter of an unknown type, or no safetensors file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"no adapter folder at {path}: give the folder that holds {CONFIG} (a run's export is "
            "RUN/final)"
        )
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{path} holds no {' and no '.join(missing)}: give the folder of a saved adapter"
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") not in KINDS.values():
        raise ValueError(
            f"{folder / CONFIG}: an adapter of type {config.get('peft_type')!r}; known are "
            f"{', '.join(KINDS.values())}"
        )
    value_of(folder / CONFIG, "modules_to_save", str, many=True)
    if config.get("alora_invocation_tokens"):
        raise ValueError(f"{folder / CONFIG}: aLoRA is not applied here; give a plain LoRA adapter")
    return config


def read_facts(path: str | Path) -> Facts:
    """What the adapter in folder `path` says of its base.

    It is empty for an adapter that another library saved. ValueError for an incomplete file.
    """
    folder = Path(path)
    if not (folder / BASE).is_file():
        return Facts({}, {})
    base = read_json(folder / BASE)
    kinds = {"name": str, "architecture": str, "task": str, "vocabulary": int, "sample": dict}
    whole = all(isinstance(base.get(name), kind) for name, kind in kinds.items())
    rows = base["sample"].values() if whole else ()
    whole = whole and all(isinstance(row, list) for row in rows)
    if not whole or not all(isinstance(x, int | float) for row in rows for x in row):
        raise ValueError(
            f"{folder / BASE} is not complete: save the adapter again, or remove that file to load "
            "without knowing its base"
        )
    rows = read_tensors(folder / ROWS) if (folder / ROWS).exists() else {}
    if rows and any(len(table) != len(rows.get("ids", ())) for table in rows.values()):
        raise ValueError(f"{folder / ROWS} does not hold a row for each id: give a whole folder")
    return Facts(base, rows)


def adapter_labels(path: str | Path) -> dict[str, Any]:
    """`num_labels`, and `id2label` where it is recorded, with which to load a classifier's base.

    Without a record the number comes from the shape of the saved head. ValueError where there is no
    head.
    """
    file = Path(path, BASE)
    if "num_labels" in read_facts(path).base:
        names = value_of(file, "id2label", dict).items()
        id2label = {int(key): label for key, label in names}
        return {"num_labels": value_of(file, "num_labels", int), "id2label": id2label}
    heads = ("score.weight", "classifier.weight")
    weights = read_tensors(Path(path, WEIGHTS)).items()
    sizes = [len(tensor) for name, tensor in weights if name.endswith(heads)]
    if not sizes:
        raise ValueError(
            f"{path} holds no classification head (score.weight): give an adapter that was "
            "saved with its head"
        )
    return {"num_labels": sizes[0]}


def _all_close(left: list[float], right: list[float]) -> bool:
    same = len(left) == len(right)
    return same and torch.allclose(torch.Tensor(left), torch.Tensor(right), CLOSE, 1e-6)


ENCODER = "prompt_encoder.safetensors"
# the prefix of peft's parameters that make virtual tokens
PROMPT = "prompt_encoder.default."


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    new_token_ids: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> PeftModel | PreTrainedModel:
    """The model with a new trainable adapter, everything else frozen; the model itself for "none".

    Adapter weights are float32, float64 on a float64 base. The rows of `new_token_ids` train with
    LoRA in the input table and in an untied output table; beside virtual tokens they stay as they
    are. The model is changed in place; random weights come from `seed` alone. ValueError for
    settings that cannot work on this model.
    """
    check_adapter(config)
    if config.adapter == "none":
        return model
    if config.adapter == "lora":
        settings, start = lora_settings(model, config, new_token_ids), None
    else:
        settings, start = prompt_settings(model, config, tokenizer, seed)
    return _wrap(model, settings, Facts(describe(model), _rows(model, new_token_ids)), seed, start)


def load_adapter(model: PreTrainedModel, path: str, trainable: bool = False) -> PeftModel:
    """The model with the saved adapter in folder `path` and the rows of its new tokens.

    It is frozen and in eval mode unless `trainable`. ValueError, naming both bases, for an adapter
    of another base (other architecture, task, vocabulary, shapes or weights).
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    stored, folder = read_config(path), Path(path)
    kind = stored["peft_type"]
    if trainable and kind == "P_TUNING" and not (folder / ENCODER).exists():
        raise ValueError(
            f"{path} holds no {ENCODER}, without which p-tuning cannot go on training; it can only "
            "be used"
        )
    with loading(path, "an adapter"):
        settings = PeftConfig.from_pretrained(path)
    facts = read_facts(path)
    task, own_task = settings.task_type, TASKS[task_of(model)]
    if task != task_of(model):
        remedy = f"give an adapter of {own_task}"
        if task == "CAUSAL_LM":
            remedy = "merge it with recipes/merge.py and give the merged folder"
        raise ValueError(
            f"{path} is an adapter of {TASKS.get(task, task)}, and {own_task} is loaded here: "
            f"{remedy}"
        )
    weights = read_tensors(folder / WEIGHTS)
    own = _table_prefixes(model, settings)
    if facts.base:
        check_base(model, facts, path)
        resize(model, facts.base["vocabulary"])
        with torch.no_grad():
            for name, table in tables(model).items() if facts.rows else ():
                table[facts.rows["ids"].to(table.device)] = facts.rows[name].to(table)
    changed = _take_tables(model, settings, weights, own, path)
    if not facts.base:
        ids = {*_token_ids(settings), *changed}
        facts = Facts(describe(model), _rows(model, sorted(ids), path))
    settings.base_model_name_or_path = model.name_or_path or None
    settings.inference_mode = not trainable
    if kind in PROMPT_LEARNING:
        # peft takes the sizes of this base and looks up no tokenizer
        settings.token_dim = settings.num_layers = settings.num_attention_heads = None
        if kind == "PROMPT_TUNING":
            settings.prompt_tuning_init = "RANDOM"
    with loading(path, f"an adapter of {model.name_or_path!r}"):
        wrapped = _wrap(model, settings, facts)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # the tables of the base have been read
    weights = {n: t for n, t in weights.items() if n in expected or not n.startswith(own)}
    if different := differing(weights, expected):
        name, have, needed = different
        raise ValueError(
            f"adapter {path} of base {stored.get('base_model_name_or_path')!r} does not fit the "
            f"model {model.name_or_path!r}: {name} is {have} in the adapter and {needed} by the "
            "model; give the base that the adapter was trained on"
        )
    if kind in PROMPT_LEARNING:
        set_peft_model_state_dict(wrapped, weights)
    else:
        # peft would rename them as transformers renames old checkpoints, and leave some out
        with torch.no_grad():
            for name, tensor in weights.items():
                expected[name].copy_(tensor)
    if trainable and kind == "P_TUNING":
        with loading(folder / ENCODER, "a prompt encoder of these sizes"):
            wrapped.prompt_encoder["default"].load_state_dict(read_tensors(folder / ENCODER))
    return wrapped if trainable else wrapped.eval()


def _table_prefixes(model: PreTrainedModel, settings: PeftConfig) -> tuple[str, ...]:
    """How the names of the tables of a base begin inside its adapter."""
    prefix = "base_model." if settings.is_prompt_learning else "base_model.model."
    return tuple(f"{prefix}{name}." for name in _table_names(model))


def _take_tables(
    model: PeftModel,
    settings: PeftConfig,
    weights: dict[str, Tensor],
    prefixes: Sequence[str],
    path: str,
) -> list[int]:
    """Copy the token tables that an adapter carries into the model; ids of the rows that changed.

    peft saves the base's tables with an adapter whose vocabulary was resized, and with LoRA on a
    table. `prefixes` begin the names of the input table and of the head in `weights`. ValueError
    for tables with fewer rows than the base has.
    """
    size = len(token_table(model))
    whole = getattr(settings, "modules_to_save", None) or ()
    tied = "output" not in tables(model)
    found, sizes, lost = {}, {size}, []
    places = ("", "base_layer.", "token_adapter.base_layer.", "original_module.")
    for prefix, kind in zip(prefixes, ("input", "output"), strict=False):
        kind, module = "input" if tied else kind, prefix.removesuffix(".")
        trained = _matches(module, whole)
        for part, name in (("weight", kind), ("bias", "output_bias")):
            for inside in places:
                table = weights.get(f"{prefix}{inside}{part}")
                if table is not None:
                    sizes.add(len(table))
                    if inside or not trained:
                        found[name] = table
        if kind not in found and not trained:
            lost.append(module.rpartition(".")[2])
    least, greatest = min(sizes), max(sizes)
    if least < size:
        raise ValueError(
            f"adapter {path} was trained on a base whose vocabulary was cut to {least} rows, where "
            f"{model.name_or_path!r} has {size}: merge it with peft on that base"
        )
    if greatest > size and lost and not tied:
        raise ValueError(
            f"adapter {path} was trained with {greatest - size} more tokens, and their rows of "
            f"{lost[0]} are not in it: merge it with peft where it was trained"
        )
    resize(model, greatest)
    changed = set(range(size, greatest))
    with torch.no_grad():
        for name, table in tables(model).items():
            if name in found and not table.is_meta:
                given = found[name].to(table)
                differs = (table != given).view(len(table), -1).any(1)
                changed |= set(differs.nonzero()[:, 0].tolist())
                table.copy_(given)
    return sorted(changed)


def saved_tables(model: PeftModel) -> list[str]:
    """Names of the base's tables that are saved with its adapter.

    They are those with rows that the base's own folder lacks, where the adapter does not hold these
    rows itself.
    """
    rows, settings = model.adapter_facts.rows, model.peft_config["default"]
    if not rows or set(rows["ids"].tolist()) <= set(_token_ids(settings)):
        return []
    own = _table_prefixes(model.get_base_model(), settings)
    adapted = ("lora_", "trainable_tokens", "modules_to_save")
    whole = getattr(settings, "modules_to_save", None) or ()
    return [
        name
        for name, _ in model.named_parameters()
        if name.startswith(own)
        and not any(word in name for word in adapted)
        and not _matches(name.rpartition(".original_module.")[0], whole)
    ]


def save_adapter(
    model: PeftModel, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter to `folder` in peft's layout (safetensors) with the facts about its base.

    These are base.json and the base's rows of new tokens; a whole table is saved where plain peft
    would not find these rows otherwise. `state` is the
    model's state dict where the caller has gathered it from shards. Files are written in place, so
    give a temporary folder.
    """
    from peft import get_peft_model_state_dict

    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    settings = copy.copy(model.peft_config["default"])
    settings.inference_mode = True
    for name in ("target_modules", "modules_to_save"):
        names = getattr(settings, name, None)
        if isinstance(names, set | list):
            # the order of a set changes from run to run
            ordered = sorted(names) if isinstance(names, set) else dict.fromkeys(names)
            setattr(settings, name, list(ordered))
    tensors = (state or model.state_dict()).items()
    encoder = {n.removeprefix(PROMPT): t for n, t in tensors if n.startswith(PROMPT)}
    if state and encoder:
        # peft would run the module that makes virtual tokens, but its weights are sharded
        tokens = model.prompt_tokens["default"][None, : settings.num_virtual_tokens]
        prompt = functional_call(model.prompt_encoder["default"], encoder, (tokens,))
        weights = {"prompt_embeddings": prompt[0]}
    else:
        weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    kept = saved_tables(model)
    weights |= {name: tensor for name, tensor in tensors if name in kept}
    write_tensors(weights, folder / WEIGHTS, format="pt")
    settings.save_pretrained(str(folder))
    base, rows = model.adapter_facts
    (folder / BASE).write_text(json_text(base, indent=1))
    if rows:
        write_tensors(rows, folder / ROWS)
    if settings.peft_type == "P_TUNING" and not model.peft_config["default"].inference_mode:
        write_tensors(encoder, folder / ENCODER)


def merge_adapter(model: PeftModel, tolerance: float | None = None) -> PreTrainedModel:
    """The base with the adapter's update added to its weights, in place.

    ValueError for prompt learning, and where the merged logits differ from those before by more
    than `tolerance` of the greatest logit. The default is 1e-3, and 0.05 in half precision, which
    rounds.
    """
    if is_prompt_learning(model):
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} cannot be merged: it adds virtual tokens "
            "and changes no weight of the base; "
            "serve the base with the adapter, or train LoRA"
        )
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"{base.name_or_path!r} holds weights of few bits, to which an update cannot be added: "
            "give the model that it was made of in --model-path, the adapter in --adapter-path"
        )
    before = probe_logits(model)
    dtype = token_table(base).dtype
    tied = base.config.get_text_config().tie_word_embeddings
    if tied and (head := base.get_output_embeddings()) is not None:
        layers = (head, base.get_input_embeddings())
        if any(hasattr(layer, "lora_A") for layer in layers):
            # an update of one table must not change the other
            head = getattr(head, "base_layer", head)
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
    fully = tuple(model.active_peft_config.modules_to_save or ())
    merged = model.merge_and_unload()
    for name, module in merged.named_modules():
        if fully and name.endswith(fully):
            module.to(dtype)
    if tied and (output := merged.get_output_embeddings()) is not None:
        # peft unties tables that it trained, also where they stayed equal
        equal = torch.equal(output.weight, token_table(merged))
        merged.config.get_text_config().tie_word_embeddings = equal
        merged.config.tie_word_embeddings = equal
        merged.tie_weights()
    after = probe_logits(merged)
    tolerance = (0.05 if dtype.itemsize < 4 else 1e-3) if tolerance is None else tolerance
    if not logits_agree(before, after, tolerance):
        raise ValueError(
            "the merged model is not the base with its adapter: logits differ by "
            f"{(before - after).abs().max():.3g} "
            f"where they reach {before.abs().max():.3g}; check the adapter for non-finite weights, "
            "or merge in float32"
        )
    return merged


def base_model(model):
    """The transformers model inside adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def probe_logits(model: nn.Module) -> Tensor:
    """Float32 logits (1, T, V), or (1, C) of a classifier, in eval mode, for a fixed row of ids.

    They are those of the model's own attention. The ids are spread over the whole vocabulary and
    include its last ones.
    """
    table = token_table(model)
    rows = len(table)
    spread = torch.linspace(0, rows - 1, 64).round().long().unique()
    last = torch.arange(max(0, rows - 32), rows)
    ids = torch.cat([spread, last])[None].to(table.device)  # (1, T)
    training = model.training
    with torch.no_grad(), own_attention(base_model(model)):
        out = model.eval()(input_ids=ids)
    model.train(training)
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def logits_agree(left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether finite float32 logits of one shape differ by at most `tolerance` of the greatest.

    The greatest is that of `left`. False for any NaN and for different shapes.
    """
    limit = tolerance * max(left.abs().max().item(), 1e-6)
    return left.shape == right.shape and (left - right).abs().max().item() <= limit < float("inf")


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Inside, the model computes what its base does, for passes without gradients.

    peft's own context also walks through all modules several times, while a GPU waits.
    """
    if is_prompt_learning(model):
        with model.disable_adapter():
            yield
        return
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def rows_in_tables(model: nn.Module) -> Iterator[None]:
    """Inside, the rows of new tokens that train stand in the tables themselves, for generation.

    In each pass peft would copy a whole table, and wait for a GPU, which a recorded step cannot.
    The tables are not sharded.
    """
    layers = [module for module in model.modules() if hasattr(module, "trainable_tokens_delta")]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether the model has an adapter of virtual tokens: prefix, prompt or p-tuning."""
    settings = getattr(model, "active_peft_config", None)
    return settings is not None and settings.is_prompt_learning


def _wrap(
    model: PreTrainedModel,
    settings: PeftConfig,
    facts: Facts,
    seed: int = 0,
    start: Sequence[int] | None = None,
) -> PeftModel:
    from peft import get_peft_model

    weight = token_table(model)
    if settings.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        # peft takes the width of the layers, which may be another
        settings.token_dim = weight.shape[1]
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, settings)
    if settings.peft_type in PROMPT_LEARNING:
        # peft guesses the table by its size
        wrapped.word_embeddings = model.get_input_embeddings()
    if start is not None:
        with torch.no_grad():
            # (virtual tokens, D), scaled as the model scales its embeddings
            vectors = wrapped.word_embeddings(torch.tensor(start, device=weight.device))
            wrapped.prompt_encoder["default"].embedding.weight.copy_(vectors)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    _add_peft_hooks(wrapped, weight.dtype)
    wrapped.adapter_facts = facts
    return wrapped


def _add_peft_hooks(model: PeftModel, dtype: torch.dtype) -> None:
    """Add, by forward hooks, two things that peft 0.21 leaves out.

    They are the bias of a head whose new rows train, and the cast to float32 for modules that train
    fully inside a model of lower precision.
    """
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    def add_bias(module, inputs, output):
        whole = module.disable_adapters or module.token_adapter.merged
        return output if whole else output + module.original_module.bias

    def widen(module, inputs):
        if module.disable_adapters:
            return inputs
        return tuple(x.float() if x.is_floating_point() else x for x in inputs)

    for name, module in model.named_modules():
        original = getattr(module, "original_module", None)
        has_bias = getattr(original, "bias", None) is not None
        if isinstance(module, TrainableTokensWrapper) and has_bias:
            module.register_forward_hook(add_bias)
        if isinstance(module, ModulesToSaveWrapper) and dtype.itemsize < 4:
            module.register_forward_pre_hook(widen)
            if not name.endswith(("score", "classifier", "lm_head")):
                module.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _token_ids(settings: PeftConfig) -> list[int]:
    ids = getattr(settings, "trainable_token_indices", None) or []
    return sorted(set().union(*ids.values()) if isinstance(ids, dict) else ids)


def _rows(model: PreTrainedModel, ids: Sequence[int], path: str | None = None) -> dict[str, Tensor]:
    """The rows of `ids` in each table of the base, float32 on the CPU.

    The base's own folder does not have them.
    """
    size = len(token_table(model))
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(
            f"{path or 'new tokens'}: trained token ids up to {max(ids)}, but the model has {size} "
            "rows; add the tokens first"
        )
    if not ids or token_table(model).is_meta:
        # a model without weights is not on rank 0, which has the rows and saves them
        return {}
    index = torch.tensor(sorted(set(ids)))
    rows = {"ids": index}
    for name, table in tables(model).items():
        rows[name] = table.detach()[index].float().cpu()
    return rows
