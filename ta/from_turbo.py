"""A settings file of turbo-alignment -> the commands of this library, and what has none.

The file's fields are those of its docs/GUIDE.md and of its settings classes
(github.com/turbo-llm/turbo-alignment). What a field left out there meant is carried over
as well: sampling among the 50 most probable tokens, 15 new tokens, the defaults of its trainer.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, NamedTuple

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
    "desirable_weight": "--desirable-weight",
    "undesirable_weight": "--undesirable-weight",
    "beta": "--beta",
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
LOSS = {"beta", "label_smoothing", "gamma", "alpha", "delta", "penalty"}  # of loss_settings
PEFT = {
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


class Commands(NamedTuple):
    """What a settings file becomes."""

    commands: list[list[str]]  # each: the recipe's name and its flags
    notes: list[str]  # what a person should know or do, fields without a counterpart
    files: dict[str, list[dict]]  # records that stood in the settings: file name -> records


class Fields:
    """The fields of a settings file by path (a.b.0.c); those that are taken are gone."""

    def __init__(self, settings: dict[str, Any]):
        self.values: dict[str, Any] = {}
        self._add("", settings)

    def _add(self, path: str, value: Any) -> None:
        inner = dict(value) if isinstance(value, dict) else {}
        of_groups = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        if of_groups and not path.endswith(".records_data"):
            inner = {str(place): item for place, item in enumerate(value)}
        for name, part in inner.items():
            self._add(f"{path}.{name}" if path else name, part)
        if not inner and value not in ({}, []):
            self.values[path] = value

    def take(self, path: str, default: Any = None) -> Any:
        """The value at a path, which is gone then; the default where there is none."""
        value = self.values.pop(path, None)
        return default if value is None else value

    def under(self, path: str) -> dict[str, Any]:
        """The values below a path by the rest of their paths; they are gone then."""
        start = path + "."
        found = [name for name in self.values if name.startswith(start)]
        return {name[len(start) :]: self.values.pop(name) for name in found}

    def has(self, path: str) -> bool:
        """Whether there is anything at or below a path."""
        return any(name == path or name.startswith(path + ".") for name in self.values)

    def count(self, path: str) -> int:
        """How many items the list at a path has."""
        place = 0
        while self.has(f"{path}.{place}"):
            place += 1
        return place


def from_turbo(settings: dict[str, Any]) -> Commands:
    """The commands that do what a settings file of turbo-alignment asked for.

    ValueError for a file that is none of theirs, and for a method that is not here.
    """
    fields, out = Fields(settings), Commands([], [], {})
    if "trainer_settings" in settings:
        _train(fields, out)
    elif "inference_settings" in settings:
        _inference(fields, out)
    elif "N" in settings:
        _sampling(fields, out)
    elif "encoder_settings" in settings:
        _preprocess(fields, out)
    elif "adapter_path" in settings and "save_path" in settings:
        _merge(fields, out)
    else:
        raise ValueError(
            "these are no settings of turbo-alignment: none of trainer_settings, "
            "inference_settings, N, encoder_settings, adapter_path is there"
        )
    for path, value in fields.values.items():
        name = path.rsplit(".", 1)[-1]
        if name in WITHOUT_EFFECT or value in (None, False) or name.isdigit():
            continue
        reason = REASONS.get(name, "there is no counterpart")
        out.notes.append(f"{path} = {json.dumps(value, ensure_ascii=False)}: {reason}")
    return out


def script(made: Commands) -> str:
    """The commands as a shell script; the notes are comments before them."""
    lines = [f"# {note}" for note in made.notes]
    for recipe, *flags in made.commands:
        words = [f"ta {recipe}"]
        for flag in flags:  # a flag and its values stand on one line
            if flag.startswith("--"):
                words.append(flag)
            else:
                words[-1] += " " + shlex.quote(flag)
        lines.append(" \\\n    ".join(words))
    return "\n".join(lines)


def _given(flag: str, value: Any) -> list[str]:
    """A flag with its value; nothing where there is no value."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag] if value else []
    return [flag, *map(str, value if isinstance(value, list) else [value])]


def _sources(fields: Fields, path: str, out: Commands) -> list[str]:
    """The sources of a dataset's settings as words of --data."""
    words = []
    for place in range(fields.count(f"{path}.sources")):
        source = fields.under(f"{path}.sources.{place}")
        file = source.get("records_path")
        if file is None:
            file = f"{source.get('name', 'records')}.jsonl"
            out.files[file] = source.get("records_data", [])
        share, count = source.get("sample_rate"), source.get("num_samples")
        more = [f"offset={source['offset']}"] if source.get("offset") else []
        more += [f"rows={source['n_rows']}"] if source.get("n_rows") is not None else []
        prompt = source.get("system_prompt")
        more += [f"system={prompt}"] if prompt else []
        choice = str(count) if count is not None else ""
        if share is not None and share < 1:
            choice = str(float(share))
        parts = ",".join([*([choice] if choice else []), *more])
        words.append(f"{file}@{parts}" if parts else file)
    return words


def _chat(fields: Fields, path: str) -> list[str]:
    """The flags of a dataset's template, cutting and mask."""
    taken: dict[str, Any] = {}
    for group in (f"{path}.chat_settings", f"{path}.chat_dataset", path):
        tags = fields.under(f"{group}.prompt_template.role_tag_mapping")
        if tags:
            taken["tags"] = [f"{_role(role)}={tag}" for role, tag in tags.items()]
        for name in (
            *("prompt_template.prefix_template", "prompt_template.suffix_template"),
            *("max_tokens_count", "only_answer_loss", "only_last_replica_loss", "keep_end"),
            *("keep_start", "ignore_system_prompt", "random_cut", "random_cut_seed"),
        ):
            value = fields.take(f"{group}.{name}")
            taken[name] = taken.get(name) if value is None else value
    flags = _given("--prefix-template", _escaped(taken["prompt_template.prefix_template"]))
    flags += _given("--suffix-template", _escaped(taken["prompt_template.suffix_template"]))
    flags += _given("--role-tags", taken.get("tags"))
    flags += _given("--max-tokens", taken["max_tokens_count"])
    flags += _given("--keep-end", taken["keep_end"])
    flags += _given("--ignore-system-prompt", taken["ignore_system_prompt"])
    if taken["only_last_replica_loss"]:
        return [*flags, "--loss-on", "last"]
    return [*flags, "--loss-on", "all"] if taken["only_answer_loss"] is False else flags


def _escaped(text: str | None) -> str | None:
    return text and text.replace("\n", "\\n").replace("\t", "\\t")


def _role(role: str) -> str:
    return "assistant" if role == "bot" else role


def _model(fields: Fields, path: str, out: Commands) -> list[str]:
    """The flags of the settings of a model, its new tokens and its adapter."""
    flags = _given("--model-path", fields.take(f"{path}.model_path"))
    flags += _given("--adapter-path", fields.take(f"{path}.adapter_path"))
    tokens = fields.under(f"{path}.embeddings_initialization_strategy")
    flags += _given("--init-tokens", [f"{t}={text}" for t, text in tokens.items()] or None)
    peft = {n.removeprefix("config."): v for n, v in fields.under(f"{path}.peft_settings").items()}
    if peft:
        kind = str(peft.pop("name", peft.pop("peft_type", "LORA"))).upper()
        if kind not in ADAPTERS:
            raise ValueError(f"{path}.peft_settings.name {kind}: {', '.join(ADAPTERS)} are here")
        adapter, defaults = ADAPTERS[kind]
        flags, peft = [*flags, "--adapter", adapter], defaults | peft
        for name in ("use_dora", "use_rslora"):
            flags += _given("--" + name.replace("_", "-"), peft.pop(name, None))
        for name, flag in PEFT.items():
            flags += _given(flag, peft.pop(name, None))
        fields.values |= {f"{path}.peft_settings.{name}": value for name, value in peft.items()}
    for bits in ("8bit", "4bit"):
        if fields.take(f"{path}.transformers_settings.load_in_{bits}"):
            flags += ["--quantize", bits]
    kwargs = fields.under(f"{path}.model_kwargs")
    kwargs = {k: v for k, v in kwargs.items() if k not in (*WITHOUT_EFFECT, "num_labels")}
    return flags + _given("--model-args", [f"{k}={v}" for k, v in kwargs.items()] or None)


def _tokenizer(fields: Fields, path: str = "") -> list[str]:
    """The flags of the settings of a tokenizer."""
    flags = _given("--tokenizer-path", fields.take(f"{path}tokenizer_settings.tokenizer_path"))
    for name in ("bos_token", "eos_token", "pad_token"):
        flag = "--" + name.replace("_", "-")
        flags += _given(flag, fields.take(f"{path}special_tokens_settings.{name}"))
    return flags


def _train(fields: Fields, out: Commands) -> None:
    kinds = {
        "chat": "sft",
        "pair_preferences": "dpo",
        "kto": "kto",
        "classification": "classify",
        "multimodal": "multimodal",
    }
    kind = fields.take("train_dataset_settings.dataset_type")
    if kind not in kinds:
        raise ValueError(f"dataset_type {kind!r} cannot be trained: {', '.join(kinds)} can")
    recipe, model = kinds[kind], "model_settings"
    labels = fields.take(f"{model}.model_kwargs.num_labels")
    if kind == "pair_preferences" and fields.take(f"{model}.model_type") == "seq_cls":
        recipe = "rm"
    flags = []
    if fields.has(f"{model}.generator_settings"):
        recipe, model = "rag", f"{model}.generator_settings"
        flags += _retrieval(fields, "model_settings", out)
    if "num_rollouts" in str(fields.values) or fields.has("actor_settings"):
        raise ValueError("these are settings of online training: see ta grpo --help")
    flags += ["--data", *_sources(fields, "train_dataset_settings", out)]
    if held_out := _sources(fields, "val_dataset_settings", out):
        flags += ["--val-data", *held_out]
    chat = _chat(fields, "train_dataset_settings")
    if _chat(fields, "val_dataset_settings") not in ([], chat):
        out.notes.append("val_dataset_settings has another template or cut; training's is used")
    flags += _model(fields, model, out) + _tokenizer(fields) + chat
    if recipe == "classify":
        flags += _given("--num-labels", labels)
    if recipe == "multimodal":
        flags += _media(fields, "train_dataset_settings", out)
        fields.under("val_dataset_settings")
    flags += _trainer(fields, recipe, bool(held_out), out)
    flags += _samples(fields, recipe, out)
    services = [
        service
        for settings, service in (("wandb_settings", "wandb"), ("clearml_settings", "clearml"))
        if fields.has(settings)
    ]
    flags += _given("--log", services or None)
    flags += _given("--seed", fields.take("seed", 42))
    out.commands.append([recipe, *flags, "--out", fields.take("log_path", "train_output")])


def _trainer(fields: Fields, recipe: str, evaluated: bool, out: Commands) -> list[str]:
    """The flags of trainer_settings, and of early stopping."""
    given = fields.under("trainer_settings")
    loss = {n.removeprefix("loss_settings."): v for n, v in given.items() if "loss_settings." in n}
    sync = {n.rsplit(".")[-1]: v for n, v in given.items() if n.startswith("sync_ref_settings.")}
    given = {name: value for name, value in given.items() if "." not in name}
    if given.get("warmup_steps"):
        given["warmup_ratio"] = None
    if given.get("max_steps", -1) > 0:
        given["num_train_epochs"] = None
    given = TRAINER_DEFAULTS | given
    size = given.pop("per_device_train_batch_size") * given.pop("gradient_accumulation_steps")
    out.notes.append(f"--batch-size {size} is of one device: multiply by how many there were")
    flags = ["--batch-size", str(size)]
    for name, flag in TRAINER.items():
        if given.get(name) is not None and given.get(name) != -1:
            flags += _given(flag, given.pop(name))
    flags += ["--schedule", str(given.pop("lr_scheduler_type")).replace("_with_warmup", "")]
    half, brain = given.pop("fp16"), given.pop("bf16")
    if half and not brain:
        out.notes.append("fp16: float16 is not trained here; bfloat16 needs no loss scaling")
    flags += ["--dtype", "bfloat16"] if half or brain else []
    stops = fields.has("early_stopping_settings")
    patience = fields.take("early_stopping_settings.patience", 1)
    if (given.pop("load_best_model_at_end") and evaluated) or stops:
        flags += ["--keep-best", "loss", *(["--patience", str(patience)] if stops else [])]
    flags += _given("--activation-checkpointing", given.pop("gradient_checkpointing", None))
    if recipe == "classify":
        alpha = loss.pop("alpha", None)
        flags += _given("--class-weights", alpha) + _given("--gamma", loss.pop("gamma", None))
    if recipe == "dpo":
        flags += _given(
            "--loss", {"kto": "kto_pair"}.get(name := loss.pop("loss_type", None), name)
        )
        for name in sorted(LOSS & loss.keys()):
            flags += _given("--" + name.replace("_", "-"), loss.pop(name))
    if sync.pop("sync_ref_model", False):
        flags += ["--reference", "synced"]
        flags += _given("--sync-every", sync.pop("sync_ref_steps", None))
        flags += _given("--sync-alpha", sync.pop("alpha", None))
    left = given | {f"loss_settings.{n}": v for n, v in loss.items()}
    fields.values |= {f"trainer_settings.{name}": value for name, value in left.items()}
    return flags


def _samples(fields: Fields, recipe: str, out: Commands) -> list[str]:
    """The flags of cherry_pick_settings."""
    path = "cherry_pick_settings"
    if not fields.has(path):
        return ["--sample-records", "0"]
    data, answers = f"{path}.dataset_settings", recipe not in ("rm", "classify")
    places = range(fields.count(f"{data}.sources"))
    counts = [fields.values.get(f"{data}.sources.{place}.num_samples") for place in places]
    # without a count all records of a source are meant
    flags = ["--sample-records", str(max((10**6 if n is None else n for n in counts), default=0))]
    if fields.take(f"{data}.random_cut"):
        flags += ["--sample-random-cut"]
    sources = _sources(fields, data, out)
    if answers:
        flags += _given("--samples-data", sources or None)
        settings = _generation(
            fields,
            f"{path}.generator_transformers_settings",
            f"{path}.custom_generation_settings",
            out,
        )
        settings["stop_strings"] = list(settings["stop_strings"])
        words = ",".join(
            f"{name}=({json.dumps(value)[1:-1]},)" if isinstance(value, list) else f"{name}={value}"
            for name, value in settings.items()
        )
        flags += ["--sample-settings", f"picked:{words}"]
    else:
        out.notes.append(f"{path}: the first held-out records are scored, not {' '.join(sources)}")
    names: list[str] = []
    for place in range(fields.count(f"{path}.metric_settings")):
        kind = fields.under(f"{path}.metric_settings.{place}").get("type")
        names += METRICS.get(kind, ())
        if kind not in METRICS:
            out.notes.append(f"{path}.metric_settings: {kind} is not measured while training")
    fields.under(path)
    return flags + _given("--sample-metrics", names if answers else None)


def _media(fields: Fields, data: str, out: Commands) -> list[str]:
    """The flags of encoders, projectors and media tokens."""
    flags = []
    for kind in ("image", "audio"):
        encoder = fields.under(f"modality_encoder_settings_mapping.{kind}")
        flags += _given(f"--{kind}-encoder", encoder.get("modality_encoder_type"))
        flags += _given(f"--{kind}-encoder-path", encoder.get("encoder_path"))
        if encoder.get("is_pickle"):
            out.notes.append(
                f"{kind}: encode the files once with ta preprocess_images, and give its output "
                f"as --{kind}-features"
            )
        projector = fields.take(f"modality_projector_mapping.{kind}")
        if projector is not None and projector not in PROJECTORS:
            raise ValueError(f"projector {projector} is not here; {', '.join(PROJECTORS)} are")
        flags += _given(f"--{kind}-projector", projector and PROJECTORS[projector])
        start = fields.take(f"modality_projector_initialization_mapping.{kind}")
        if start is not None and not start.endswith(".safetensors"):
            out.notes.append(f"{start}: write it as safetensors first, with ta convert")
            start = start.rsplit(".", 1)[0] + ".safetensors"
        flags += _given(f"--{kind}-projector-path", start)
        token = fields.take(f"{data}.modality_token_mapping.{kind}")
        flags += _given(f"--{kind}-token", token if encoder else None)
    flags += _given("--image-embeddings", fields.take(f"{data}.n_modality_embeddings"))
    ends = [fields.take(f"{data}.{end}_modality_token") for end in ("start", "end")]
    return flags + _given("--media-tokens", ends if all(ends) else None)


def _retrieval(fields: Fields, path: str, out: Commands) -> list[str]:
    """The flags of retrieval; the command that builds the index comes first."""
    encoder = fields.take(f"{path}.question_encoder_settings.model_path")
    passages = fields.take(f"{path}.index_settings.passages_path")
    fields.take(f"{path}.index_settings.index_path")
    length = fields.take(f"{path}.retrieval_settings.query_encoder_max_length")
    out.notes.append(f"{passages}: write its passages as lines of {{id, title, text}} first")
    build = ["build_index", "--passages", f"{passages}.jsonl", "--encoder-path", str(encoder)]
    out.commands.append([*build, *_given("--encoder-max-tokens", length), "--out", "index"])
    flags = ["--index", "index"]
    flags += _given("--num-passages", fields.take(f"{path}.retrieval_settings.n_docs"))
    return flags + _given(
        "--passage-tokens", fields.take(f"{path}.retrieval_settings.max_doc_length")
    )


def _inference(fields: Fields, out: Commands) -> None:
    save = fields.take("save_path", "answers")
    sources, data = _sources(fields, "dataset_settings", out), "dataset_settings"
    kind = fields.take(f"{data}.dataset_type")
    random_cut = fields.take(f"{data}.random_cut")
    chat = _chat(fields, data)
    for place in range(fields.count("inference_settings")):
        path = f"inference_settings.{place}"
        model, flags = f"{path}.model_settings", []
        if fields.has(f"{model}.generator_settings"):
            flags = _retrieval(fields, model, out)
            model = f"{model}.generator_settings"
        projections = fields.take(f"{model}.projections_path")
        if projections:
            out.notes.append(
                f"{projections}: ta convert makes a media folder of it; give that as --model-path"
            )
            fields.under(f"{path}.modality_projector_mapping")
            fields.under(f"{path}.modality_encoder_settings_mapping")
            fields.under(data)
        scores = kind in ("classification", "sampling")
        fields.take(f"{model}.model_kwargs.num_labels")
        flags += ["--data", *sources, *_model(fields, model, out)]
        flags += _tokenizer(fields, f"{path}.") + chat
        flags += ["--engine", "vllm"] if fields.take(f"{path}.use_vllm") else []
        flags += _given("--tensor-parallel-size", fields.take(f"{path}.tensor_parallel_size"))
        flags += ["--random-cut"] if random_cut and not scores else []
        settings = fields.count(f"{path}.generation_settings")
        for number in range(1 if scores else settings):
            name = "" if settings < 2 else f"-{number}"
            file = f"{save}/answers-{place}{name}.jsonl"
            recipe = ["score", *(["--kind", "class"] if kind == "classification" else [])]
            if not scores:
                group = f"{path}.generation_settings.{number}"
                vllm = fields.under(f"{group}.vllm_settings")
                fields.values |= {f"{group}.transformers_settings.{k}": v for k, v in vllm.items()}
                removed = fields.take(f"{group}.custom_settings.remove_prompt", True)
                answer = _generation(
                    fields, f"{group}.transformers_settings", f"{group}.custom_settings", out
                )
                recipe = ["generate", *([] if removed else ["--with-prompt"])]
                for name, value in answer.items():
                    no = "no-" if value is False else ""
                    words = list(value) if isinstance(value, tuple) else value
                    recipe += _given(f"--{no}{name.replace('_', '-')}", words is False or words)
            out.commands.append([*recipe, *flags, "--out", file])


def _generation(fields: Fields, path: str, custom_path: str, out: Commands) -> dict[str, Any]:
    """One of the settings of generation as settings of ours, with the defaults they had."""
    given, custom = fields.under(path), fields.under(custom_path)
    given.setdefault("max_new_tokens", given.pop("max_tokens", 15))
    settings = {ours: given.pop(name) for name, ours in GENERATION.items() if name in given}
    stops = given.pop("stop_strings", None) or custom.get("generation_eos_token", "</s>")
    settings["stop_strings"] = (stops,) if isinstance(stops, str) else tuple(stops)
    temperature, top_p = given.pop("temperature", 1.0), given.pop("top_p", 1.0)
    samples, top_k = given.pop("do_sample", True), given.pop("top_k", 50)
    if samples and settings.get("beams", 1) > 1:
        out.notes.append(f"{path}: beams search and do not sample here")
    elif samples:
        settings |= {"temperature": temperature, "top_k": top_k}
        settings |= {"top_p": top_p} if top_p != 1 else {}
    settings |= {} if custom.get("skip_special_tokens", True) else {"skip_special_tokens": False}
    fields.values |= {f"{path}.{name}": value for name, value in given.items()}
    return settings


def _sampling(fields: Fields, out: Commands) -> None:
    sources, chat = _sources(fields, "dataset_settings", out), _chat(fields, "dataset_settings")
    data, count = ["--data", *sources], str(fields.take("N"))
    beta, save = fields.take("beta"), fields.take("save_path", "chosen.jsonl")
    method = "random"
    if fields.has("rm"):
        fields.take("rm.model_kwargs.num_labels")
        model = _model(fields, "rm", out) + _tokenizer(fields) + chat
        out.commands.append(["score", *model, *data, "--out", "scored.jsonl"])
        data, method = ["--data", "scored.jsonl"], "best" if beta is None else "rejection"
    flags = ["--method", method, "--n", count, *_given("--beta", beta)]
    out.commands.append(["sample", *data, *flags, "--out", save])


def _preprocess(fields: Fields, out: Commands) -> None:
    encoder = fields.under("encoder_settings")
    fields.take("modality")
    flags = _given("--root", fields.take("dataset_path"))
    flags += _given("--encoder", encoder.get("modality_encoder_type"))
    flags += _given("--encoder-path", encoder.get("encoder_path"))
    flags += _given("--batch-size", fields.take("batch_size"))
    save = fields.take("output_file_path", "features")
    fields.under("reader_settings")
    out.commands.append(["preprocess_images", *flags, "--out", f"{save.rstrip('/')}.safetensors"])


def _merge(fields: Fields, out: Commands) -> None:
    flags = _model(fields, "model_settings", out)
    flags += _given("--adapter-path", fields.take("adapter_path"))
    out.commands.append(["merge", *flags, *_given("--out", fields.take("save_path"))])
    if tokenizer := fields.take("tokenizer_settings.tokenizer_path"):
        out.notes.append(f"the tokenizer is the adapter's or the base's, not {tokenizer}")
