"""A settings file of turbo-alignment -> the commands of this library, and what has none.

The file's fields are those of its docs/GUIDE.md and of its settings classes
(github.com/turbo-llm/turbo-alignment). What a field left out there meant is carried over
as well: sampling among the 50 most probable tokens, 15 new tokens, the defaults of its trainer.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from ta.printable import one_line

TRAINER = {  # of trainer_settings: the flag that takes the same value
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
    "warmup_ratio": "--warmup",
    "warmup_steps": "--warmup",
    "weight_decay": "--weight-decay",
    "adam_beta1": "--beta1",
    "adam_beta2": "--beta2",
    "max_grad_norm": "--clip",
    "logging_steps": "--log-every",
    "eval_steps": "--eval-every",
    "save_steps": "--save-every",
    "save_total_limit": "--keep",
}
TRAINER_DEFAULTS = {
    "learning_rate": 3e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.0,
    "adam_beta2": 0.999,
    "eval_steps": 150,
    "save_steps": 150,
    "logging_steps": 5,
    "save_total_limit": 1,
    "bf16": False,
    "fp16": True,
    "load_best_model_at_end": True,
}
METHOD_DEFAULTS = {  # of a recipe, or of a loss that has others
    "kto": {"desirable_weight": 1.33},
    "dpo": {"loss_settings.beta": 0.1},
    "slic_hf": {"loss_settings.delta": 1.0, "loss_settings.lam": 0.1},
    "simpo": {"loss_settings.beta": 0.1, "loss_settings.gamma": 0.1},
    "dpop": {"loss_settings.beta": 0.1, "loss_settings.lam": 0.1},
}
METHODS = {  # of the trainer_settings of a recipe, and of a loss that has no beta
    "slic_hf": {
        "loss_settings.loss_type": "--loss",
        "loss_settings.delta": "--delta",
        "loss_settings.lam": "--alpha",
    },
    "classify": {"loss_settings.alpha": "--class-weights", "loss_settings.gamma": "--gamma"},
    "dpo": {
        "loss_settings.loss_type": "--loss",
        "loss_settings.beta": "--beta",
        "loss_settings.label_smoothing": "--label-smoothing",
        "loss_settings.gamma": "--gamma",
        "loss_settings.alpha": "--alpha",
        "loss_settings.delta": "--delta",
        "loss_settings.penalty": "--penalty",
        "loss_settings.lam": "--penalty",
    },
    "kto": {
        "desirable_weight": "--desirable-weight",
        "undesirable_weight": "--undesirable-weight",
        "beta": "--beta",
    },
}
SYNC = {"sync_steps": "--sync-every", "sync_ref_steps": "--sync-every", "alpha": "--sync-alpha"}
MODEL = {"model_path": "--model-path", "adapter_path": "--adapter-path"}
TOKENIZER = {
    "tokenizer_settings.tokenizer_path": "--tokenizer-path",
    "special_tokens_settings.bos_token": "--bos-token",
    "special_tokens_settings.eos_token": "--eos-token",
    "special_tokens_settings.pad_token": "--pad-token",
}
CHAT = {  # of a dataset; the last two say which messages are learned
    "prompt_template.prefix_template": "--prefix-template",
    "prompt_template.suffix_template": "--suffix-template",
    "max_tokens_count": "--max-tokens",
    "keep_end": "--keep-end",
    "ignore_system_prompt": "--ignore-system-prompt",
    "only_last_replica_loss": "last",
    "only_answer_loss": "answers",
}
RETRIEVAL = {"n_docs": "--num-passages", "max_doc_length": "--passage-tokens"}
LONGEST = "query_encoder_max_length"
FEATURES = {
    "dataset_path": "--root",
    "encoder_settings.modality_encoder_type": "--encoder",
    "encoder_settings.encoder_path": "--encoder-path",
    "batch_size": "--batch-size",
}
MERGED = {"adapter_path": "--adapter-path", "save_path": "--out"}
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what was meant where it is left out
ENGINE = {
    "tensor_parallel_size": "--tensor-parallel-size",
    "vllm_engine_settings.tensor_parallel_size": "--tensor-parallel-size",
}
KINDS = {  # of a dataset to train on: the recipe
    "chat": "sft",
    "pair_preferences": "dpo",
    "kto": "kto",
    "classification": "classify",
    "multimodal": "multimodal",
}
SERVICES = {  # where it stands in the settings that a service is logged to
    "wandb_settings": "wandb",
    "clearml_settings": "clearml",
    "logging_settings.run_name": "wandb",
    "logging_settings.task_name": "clearml",
}
PEFT = {
    "use_dora": "--use-dora",
    "use_rslora": "--use-rslora",
    "r": "--lora-rank",
    "lora_alpha": "--lora-alpha",
    "lora_dropout": "--lora-dropout",
    "target_modules": "--lora-targets",
    "modules_to_save": "--lora-modules-to-save",
    "num_virtual_tokens": "--virtual-tokens",
    "prompt_tuning_init_text": "--prompt-init-text",
    "encoder_hidden_size": "--p-tuning-hidden",
}
ADAPTERS = {  # its name here, and what was meant by fields left out there
    "LORA": (
        "lora",
        {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
    ),
    "PREFIX_TUNING": ("prefix", {}),
    "PROMPT_TUNING": ("prompt", {"num_virtual_tokens": 32}),
    "P_TUNING": ("p-tuning", {"num_virtual_tokens": 32}),
}
GENERATION = {  # the setting of ours
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_beams": "beams",
    "num_return_sequences": "num_answers",
    "n": "num_answers",
    "repetition_penalty": "repetition_penalty",
}
PROJECTORS = {"llava": "mlp", "mlp": "mlp", "c_abs": "c_abstractor", "c_abstractor": "c_abstractor"}
METRICS = {
    "rouge": ("rouge_1", "rouge_l"),
    "dist_n": ("distinct_1", "distinct_2"),
    "accuracy": ("accuracy",),
    "meteor": ("meteor",),
    "diversity": ("diversity",),
    "self_bleu": ("self_bleu",),
    "length": ("length",),
    "perplexity": ("perplexity",),
}
WITHOUT_EFFECT = (  # nothing is lost without them: parts of other fields, or speed and memory
    "dataset_type",
    "model_type",
    "task_type",
    "return_dict",
    "problem_type",
    "num_labels",
    "modality",
    "name",
    "add_labels",
    "optim",
    "no_cuda",
    "dataloader_num_workers",
    "per_device_eval_batch_size",
    "evaluation_strategy",
    "eval_strategy",
    "save_strategy",
    "save_only_model",
    "batch",
    "micro_batch",
    "rm_batch_size",
    "reader_type",
    "reader_path",
    "reader",
    "truncate_top",
    "resize_token_embeddings",
    "use_sft_model",
    "use_ref_model",
    "need_average",
    "n_gram",
    "keep_start",
    "random_cut",
    "random_cut_seed",
)
REASONS = {  # of fields without a counterpart: why
    "use_fast": "only fast tokenizers are read: ta convert makes tokenizer.json of tokenizer.model",
    "adam_epsilon": "AdamW's epsilon is 1e-8; another stands in a copy of the recipe",
    "deepspeed": "torchrun shards weights over its processes; there is nothing to set",
    "fsdp": "torchrun shards weights over its processes; there is nothing to set",
    "threshold": "any better figure counts, however little better it is",
    "is_pickle": "encode the pictures once with preprocess_images and give --image-features",
    "index_path": "an index is made anew by build_index",
    "project_name": "the service's own environment sets it",
    "run_name": "the service's own environment sets it",
    "entity": "the service's own environment sets it",
}


Fields = dict[str, Any]  # by name or path


class Settings(dict):
    """The fields of a settings file by path (a.b.0.c), of which those that are read are taken out,
    and what they become.
    """

    def __init__(self, settings: Fields):
        super().__init__(_flat("", settings))
        # each: the recipe's name and its flags
        self.commands = []
        # what a person should know or do, fields without a counterpart
        self.notes = []
        # records that stood in the settings: file name -> records
        self.files = {}

    def take(self, path: str, default: Any = None) -> Any:
        """The value at a path, which is gone then; the default where there is none."""
        value = self.pop(path, None)
        return default if value is None else value

    def under(self, path: str) -> Fields:
        """The values below a path by the rest of their paths; they are gone then."""
        start = path + "."
        found = [name for name in self if name.startswith(start)]
        return {name.removeprefix(start): self.pop(name) for name in found}

    def fill(self, path: str, values: Mapping[str, Any]) -> None:
        """Put values below a path, where nothing stands there."""
        for name, value in values.items():
            self.setdefault(f"{path}.{name}", value)

    def flags(self, path: str, table: Mapping[str, str]) -> list[str]:
        """The flags of a table {field below a path: flag} with the values of the fields, which are
        gone then.
        """
        start = path and path + "."
        given = [_given(flag, self.take(start + name)) for name, flag in table.items()]
        return [word for words in given for word in words]

    def has(self, path: str) -> bool:
        """Whether there is anything at or below a path."""
        return any(name == path or name.startswith(path + ".") for name in self)

    def places(self, path: str) -> list[str]:
        """The paths of the items of the list at a path."""
        items = map(f"{path}.{{}}".format, count())
        return list(takewhile(self.has, items))


def _flat(path: str, value: Any) -> Fields:
    """{path: value} of all that lies below a path."""
    inner = value if isinstance(value, dict) else {}
    of_groups = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if of_groups and not path.endswith(".records_data"):
        inner = dict(enumerate(value))
    # an empty item of a list counts, with all its defaults
    empty = value in ({}, []) and not path.rpartition(".")[2].isdigit()
    found = {} if inner or empty else {path: value}
    for name, part in inner.items():
        found |= _flat(f"{path}.{name}" if path else name, part)
    return found


def from_turbo(settings: Fields) -> Settings:
    """The commands that do what a settings file of turbo-alignment asked for.

    ValueError for a file that is none of theirs, and for a method that is not here.
    """
    given = Settings(settings)
    pipelines = {
        "trainer_settings": _train,
        "inference_settings": _inference,
        "N": _sampling,
        "encoder_settings": _preprocess,
        "adapter_path": _merge,
    }
    if not (asked := [name for name in pipelines if name in settings]):
        raise ValueError(
            f"these are no settings of turbo-alignment: none of {', '.join(pipelines)} is there"
        )
    pipelines[asked[0]](given)
    for path, value in given.items():
        name = path.rsplit(".", 1)[-1]
        if name in WITHOUT_EFFECT or value in (None, False) or name.isdigit():
            continue
        reason = REASONS.get(name, "there is no counterpart")
        given.notes.append(f"{path} = {json.dumps(value, ensure_ascii=False)}: {reason}")
    return given


def script(made: Settings) -> str:
    """The commands as a shell script; the notes are comments before them."""
    lines = [f"# {one_line(note)}" for note in made.notes]
    for recipe, *flags in made.commands:
        words = [f"ta {recipe}"]
        for flag in flags:  # a flag and its values stand on one line
            if re.fullmatch("--[a-z0-9-]+", flag):
                words.append(flag)
            else:
                words[-1] += " " + shlex.quote(flag)
        lines.append(" \\\n    ".join(words))
    return "\n".join(lines)


def _given(flag: str, value: Any) -> list[str]:
    """A flag with its value; nothing where there is no value."""
    if value is None or value is False or value == []:
        return []
    values = value if isinstance(value, list) else [value]
    return [flag, *(str(x) for x in values if x is not True)]


def _sources(given: Settings, path: str) -> list[str]:
    """The sources of a dataset's settings as words of --data."""
    words = []
    for place in given.places(f"{path}.sources"):
        source = given.under(place)
        file = source.get("records_path")
        if file is None:
            file = f"{source.get('name', 'records')}.jsonl"
            records = source.get("records_data", [])
            while given.files.setdefault(file, records) != records:
                file = f"more-{file}"
        share = source.get("sample_rate")
        part = source.get("num_samples") if share is None or share >= 1 else float(share)
        choices = {
            "": part,
            "offset=": source.get("offset") or None,
            "rows=": source.get("n_rows"),
            "system=": source.get("system_prompt") or None,
        }
        chosen = ",".join(f"{name}{x}" for name, x in choices.items() if x is not None)
        words.append(f"{file}@{chosen}" if chosen else file)
    return words


def _chat(given: Settings, path: str, learned: bool = False) -> list[str]:
    """The flags of a dataset's template and cutting, and of its mask where chats are `learned`."""
    found = {"--role-tags": None}
    for group in (f"{path}.chat_settings.", f"{path}.chat_dataset.", f"{path}."):
        if tags := given.under(f"{group}prompt_template.role_tag_mapping"):
            roles = {role: "assistant" if role == "bot" else role for role in tags}
            found["--role-tags"] = [f"{roles[role]}={tag}" for role, tag in tags.items()]
        for name, flag in CHAT.items():
            value = given.take(group + name)
            if isinstance(value, str):
                value = value.replace("\n", "\\n").replace("\t", "\\t")
            found[flag] = found.get(flag) if value is None else value
    last, answers = found.pop("last"), found.pop("answers")
    loss_on = "last" if last else "all" if answers is False else None
    if loss_on and not learned:
        given.notes.append(f"{path}: --loss-on {loss_on} has no effect where no chats are learned")
    elif loss_on:
        found["--loss-on"] = loss_on
    return [word for flag, value in found.items() for word in _given(flag, value)]


def _model(given: Settings, path: str) -> list[str]:
    """The flags of the settings of a model and of its new tokens."""
    flags = given.flags(path, MODEL)
    tokens = given.under(f"{path}.embeddings_initialization_strategy")
    flags += _given("--init-tokens", [f"{token}={text}" for token, text in tokens.items()])
    kwargs = given.under(f"{path}.model_kwargs")
    kwargs = [f"{name}={value}" for name, value in kwargs.items() if name not in WITHOUT_EFFECT]
    return flags + _given("--model-args", kwargs)


def _adapter(given: Settings, path: str) -> list[str]:
    """The flags of the adapter and the weights in few bits of a model that trains."""
    flags = []
    for bits in ("8bit", "4bit"):
        if given.take(f"{path}.transformers_settings.load_in_{bits}"):
            flags += ["--quantize", bits]
    path += ".peft_settings"
    if not (peft := given.under(path)):
        return flags
    peft = {name.removeprefix("config."): value for name, value in peft.items()}
    kind = str(peft.pop("name", peft.pop("peft_type", "LORA"))).upper()
    if kind not in ADAPTERS:
        raise ValueError(f"{path}.name {kind}: {', '.join(ADAPTERS)} are here")
    adapter, defaults = ADAPTERS[kind]
    given.fill(path, defaults | peft)
    return [*flags, "--adapter", adapter, *given.flags(path, PEFT)]


def _train(given: Settings) -> None:
    kind = given.take("train_dataset_settings.dataset_type")
    if kind not in KINDS:
        raise ValueError(f"dataset_type {kind!r} cannot be trained: {', '.join(KINDS)} can")
    recipe, model = KINDS[kind], "model_settings"
    if recipe == "dpo" and given.take(f"{model}.model_type") == "seq_cls":
        recipe = "rm"
    flags = []
    if given.has(f"{model}.generator_settings"):
        recipe, model = "rag", f"{model}.generator_settings"
        flags += _retrieval(given, "model_settings")
    if given.has("actor_settings") or any("num_rollouts" in path for path in given):
        raise ValueError("these are settings of online training: see ta grpo --help")
    flags += ["--data", *_sources(given, "train_dataset_settings")]
    held_out = _sources(given, "val_dataset_settings")
    flags += _given("--val-data", held_out)
    learned = recipe in ("sft", "multimodal")
    chat = _chat(given, "train_dataset_settings", learned)
    if _chat(given, "val_dataset_settings", learned) not in ([], chat):
        given.notes.append("val_dataset_settings has another template or cut; training's is used")
    if recipe == "classify":
        flags += given.flags("model_settings.model_kwargs", {"num_labels": "--num-labels"})
    flags += [*_model(given, model), *_adapter(given, model)]
    flags += [*given.flags("", TOKENIZER), *chat]
    if recipe == "multimodal":
        flags += _media(given)
        given.under("val_dataset_settings")
    flags += [*_trainer(given, recipe, bool(held_out)), *_samples(given, recipe)]
    services = [service for path, service in SERVICES.items() if given.has(path)]
    flags += [*_given("--log", services), "--seed", str(given.take("seed", 42))]
    given.commands.append([recipe, *flags, "--out", given.take("log_path", "train_output")])


def _trainer(given: Settings, recipe: str, evaluated: bool) -> list[str]:
    """The flags of trainer_settings, and of early stopping."""
    path = "trainer_settings"
    for number, other in (("warmup_steps", "warmup_ratio"), ("max_steps", "num_train_epochs")):
        unused = other if (given.get(f"{path}.{number}") or 0) > 0 else number
        given[f"{path}.{unused}"] = None
    method, loss = recipe, f"{path}.loss_settings.loss_type"
    if recipe == "dpo" and loss in given:
        method = given[loss] = given[loss].replace("kto", "kto_pair")
    given.fill(path, TRAINER_DEFAULTS)
    given.fill(path, METHOD_DEFAULTS.get(method) or METHOD_DEFAULTS.get(recipe, {}))
    size = given.pop(f"{path}.per_device_train_batch_size")
    size *= given.pop(f"{path}.gradient_accumulation_steps")
    given.notes.append(f"--batch-size {size} is of one device: multiply by how many there were")
    flags = ["--batch-size", str(size), *given.flags(path, TRAINER)]
    schedule = str(given.pop(f"{path}.lr_scheduler_type"))
    flags += ["--schedule", schedule.replace("_with_warmup", "")]
    half, brain = given.pop(f"{path}.fp16"), given.pop(f"{path}.bf16")
    if half and not brain:
        given.notes.append("fp16: float16 is not trained here; bfloat16 needs no loss scaling")
    flags += ["--dtype", "bfloat16"] if half or brain else []
    stops = given.has("early_stopping_settings")
    patience = given.take("early_stopping_settings.patience", 1)
    if (given.pop(f"{path}.load_best_model_at_end") and evaluated) or stops:
        flags += ["--keep-best", "loss", *_given("--patience", patience if stops else None)]
    flags += given.flags(path, {"gradient_checkpointing": "--activation-checkpointing"})
    flags += given.flags(path, METHODS.get(method) or METHODS.get(recipe, {}))
    sync = f"{path}.sync_ref_settings"
    if given.take(f"{sync}.sync_ref_model"):
        return [*flags, "--reference", "synced", *given.flags(sync, SYNC)]
    given.under(sync)
    return flags


def _samples(given: Settings, recipe: str) -> list[str]:
    """The flags of cherry_pick_settings."""
    path = "cherry_pick_settings"
    if not given.has(path):
        return ["--sample-records", "0"]
    data, answers = f"{path}.dataset_settings", recipe not in ("rm", "classify")
    counts = [given.get(f"{place}.num_samples") for place in given.places(f"{data}.sources")]
    # without a count all records of a source are meant
    flags = ["--sample-records", str(max((10**6 if n is None else n for n in counts), default=0))]
    flags += given.flags(data, {"random_cut": "--sample-random-cut"})
    sources, metrics = _sources(given, data), []
    for place in given.places(f"{path}.metric_settings"):
        kind = given.under(place).get("type")
        metrics += METRICS.get(kind, ())
        if kind not in METRICS:
            given.notes.append(f"{path}.metric_settings: {kind} is not measured while training")
    if answers:
        flags += _given("--samples-data", sources)
        generator = f"{path}.generator_transformers_settings"
        settings = _generation(given, generator, f"{path}.custom_generation_settings")
        words = ",".join(
            f"{name}=({json.dumps(value)[1:-1]},)" if isinstance(value, list) else f"{name}={value}"
            for name, value in settings.items()
        )
        flags += ["--sample-settings", f"picked:{words}", "--sample-metrics", *metrics]
    else:
        given.notes.append(
            f"{path}: the first held-out records are scored, not {' '.join(sources)}"
        )
    given.under(path)
    return flags


def _media(given: Settings) -> list[str]:
    """The flags of encoders, projectors and media tokens."""
    flags, data = [], "train_dataset_settings"
    for kind in ("image", "audio"):
        encoder = given.under(f"modality_encoder_settings_mapping.{kind}")
        projector = given.take(f"modality_projector_mapping.{kind}")
        start = given.take(f"modality_projector_initialization_mapping.{kind}")
        token = given.take(f"{data}.modality_token_mapping.{kind}")
        if encoder.get("is_pickle"):
            given.notes.append(
                f"{kind}: encode the files once with ta preprocess_images, and give its output "
                f"as --{kind}-features"
            )
        if projector is not None and projector not in PROJECTORS:
            raise ValueError(f"projector {projector} is not here; {', '.join(PROJECTORS)} are")
        if start is not None and not start.endswith(".safetensors"):
            given.notes.append(f"{start}: write it as safetensors first, with ta convert")
            start = start.rsplit(".", 1)[0] + ".safetensors"
        flags += _given(f"--{kind}-encoder", encoder.get("modality_encoder_type"))
        flags += _given(f"--{kind}-encoder-path", encoder.get("encoder_path"))
        flags += _given(f"--{kind}-projector", PROJECTORS.get(projector))
        flags += _given(f"--{kind}-projector-path", start)
        flags += _given(f"--{kind}-token", token if encoder else None)
    flags += given.flags(data, {"n_modality_embeddings": "--image-embeddings"})
    ends = [given.take(f"{data}.{end}_modality_token") for end in ("start", "end")]
    return flags + _given("--media-tokens", ends if all(ends) else None)


def _retrieval(given: Settings, path: str) -> list[str]:
    """The flags of retrieval; the command that builds the index comes first."""
    encoder = given.take(f"{path}.question_encoder_settings.model_path")
    passages = given.take(f"{path}.index_settings.passages_path")
    given.notes.append(f"{passages}: write its passages as lines of {{id, title, text}} first")
    build = ["build_index", "--passages", f"{passages}.jsonl", "--encoder-path", str(encoder)]
    build += given.flags(f"{path}.retrieval_settings", {LONGEST: "--encoder-max-tokens"})
    given.commands.append([*build, "--out", "index"])
    return ["--index", "index", *given.flags(f"{path}.retrieval_settings", RETRIEVAL)]


def _inference(given: Settings) -> None:
    save, data = given.take("save_path", "answers"), "dataset_settings"
    sources, kind = _sources(given, data), given.take(f"{data}.dataset_type")
    random_cut, chat = given.take(f"{data}.random_cut"), _chat(given, data)
    scores = kind in ("classification", "sampling")
    for place, path in enumerate(given.places("inference_settings")):
        model, flags = f"{path}.model_settings", []
        if given.has(f"{model}.generator_settings"):
            flags = _retrieval(given, model)
            model = f"{model}.generator_settings"
        if projections := given.take(f"{model}.projections_path"):
            given.notes.append(
                f"{projections}: ta convert makes a media folder of it; give that as --model-path"
            )
            given.under(f"{path}.modality_projector_mapping")
            given.under(f"{path}.modality_encoder_settings_mapping")
            given.under(data)
        flags += ["--data", *sources, *_model(given, model), *given.flags(path, TOKENIZER), *chat]
        vllm = given.take(f"{path}.use_vllm")
        flags += [*_given("--engine", "vllm" if vllm else None), *given.flags(path, ENGINE)]
        out = f"{save}/answers-{place}"
        if scores:
            kinds = _given("--kind", "class" if kind == "classification" else None)
            given.commands.append(["score", *kinds, *flags, "--out", f"{out}.jsonl"])
            continue
        groups = given.places(f"{path}.generation_settings")
        for number, group in enumerate(groups):
            ours, other = f"{group}.transformers_settings", f"{group}.vllm_settings"
            ours, other = (other, ours) if vllm else (ours, other)
            given.fill(ours, given.under(other))
            prompt = not given.take(f"{group}.custom_settings.remove_prompt", True)
            words = ["generate", *_given("--with-prompt", prompt)]
            for name, value in _generation(given, ours, f"{group}.custom_settings").items():
                flag = ("no_" * (value is False) + name).replace("_", "-")
                words += _given(f"--{flag}", value is False or value)
            words += [*flags, *_given("--random-cut", random_cut)]
            file = f"{out}-{number}.jsonl" if len(groups) > 1 else f"{out}.jsonl"
            given.commands.append([*words, "--out", file])


def _generation(given: Settings, path: str, custom_path: str) -> Fields:
    """One of the settings of generation as settings of ours, with the defaults they had."""
    own, custom = given.under(path), given.under(custom_path)
    own.setdefault("max_new_tokens", own.pop("max_tokens", 15))
    settings = {ours: own.pop(name) for name, ours in GENERATION.items() if name in own}
    stops = own.pop("stop_strings", None) or custom.get("generation_eos_token", "</s>")
    settings["stop_strings"] = [stops] if isinstance(stops, str) else stops
    sampling = {name: own.pop(name, default) for name, default in SAMPLING.items()}
    if own.pop("do_sample", True):
        if settings.get("beams", 1) > 1:
            given.notes.append(f"{path}: beams search and do not sample here")
        else:
            settings |= sampling
    if not custom.get("skip_special_tokens", True):
        settings["skip_special_tokens"] = False
    given.fill(path, own)
    return settings


def _sampling(given: Settings) -> None:
    sources, chat = _sources(given, "dataset_settings"), _chat(given, "dataset_settings")
    data, number = ["--data", *sources], str(given.take("N"))
    beta, save = given.take("beta"), given.take("save_path", "chosen.jsonl")
    method = "random"
    if given.has("rm"):
        model = [*_model(given, "rm"), *given.flags("", TOKENIZER), *chat]
        given.commands.append(["score", *model, *data, "--out", "scored.jsonl"])
        data, method = ["--data", "scored.jsonl"], "best" if beta is None else "rejection"
    flags = ["--method", method, "--n", number, *_given("--beta", beta)]
    given.commands.append(["sample", *data, *flags, "--out", save])


def _preprocess(given: Settings) -> None:
    flags = given.flags("", FEATURES)
    save = given.take("output_file_path", "features")
    given.commands.append(["preprocess_images", *flags, "--out", f"{save.rstrip('/')}.safetensors"])


def _merge(given: Settings) -> None:
    flags = [*_model(given, "model_settings"), *given.flags("", MERGED)]
    given.commands.append(["merge", *flags])
    if tokenizer := given.take("tokenizer_settings.tokenizer_path"):
        given.notes.append(f"the tokenizer is the adapter's or the base's, not {tokenizer}")
