"""The words of a command line before they are parsed: other tools' flags, a file of settings, and
the short help."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
import tomllib
import types
from collections import deque
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ta.printable import masked
from ta.recipe_files import RECIPES
from ta.screen import hanging, wrapped_page

EQUAL = {  # flags of other tools that mean the same as one of ours
    "--model-name-or-path": "--model-path",
    "--output-dir": "--out",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--train-file": "--data",
    "--eval-dataset": "--val-data",
    "--validation-file": "--val-data",
    "--learning-rate": "--lr",
    "--num-train-epochs": "--epochs",
    "--max-steps": "--steps",
    "--warmup-ratio": "--warmup",
    "--warmup-steps": "--warmup",
    "--max-grad-norm": "--clip",
    "--adam-beta1": "--beta1",
    "--adam-beta2": "--beta2",
    "--logging-steps": "--log-every",
    "--save-steps": "--save-every",
    "--eval-steps": "--eval-every",
    "--save-total-limit": "--keep",
    "--report-to": "--log",
    "--overwrite-output-dir": "--overwrite",
    "--gradient-checkpointing": "--activation-checkpointing",
    "--torch-compile": "--compile",
    "--torch-dtype": "--dtype",
    "--lora-r": "--lora-rank",
    "--lora-target-modules": "--lora-targets",
    "--loss-type": "--loss",
    "--num-beams": "--beams",
    "--num-return-sequences": "--num-answers",
    "--num-generations": "--num-answers",
}
SETTING = {  # switches of other tools that are one value of a flag of ours
    "--bf16": ("--dtype", "bfloat16"),
    "--use-peft": ("--adapter", "lora"),
    "--load-in-4bit": ("--quantize", "4bit"),
    "--load-in-8bit": ("--quantize", "8bit"),
    "--use-vllm": ("--engine", "vllm"),
}
VALUES = {("--loss", "dpo"): "sigmoid"}  # other names of values
OURS = {  # flags of other tools whose meaning differs: what to give here
    "--per-device-train-batch-size": "--batch-size, the records of one step over all devices "
    "together (--max-tokens-per-micro sets the memory of a device)",
    "--gradient-accumulation-steps": "--batch-size, the records of one step over all devices "
    "together, however many passes that takes",
    "--per-device-eval-batch-size": "--max-tokens-per-micro, which sets the memory of a device",
    "--max-length": "--max-tokens (whole messages go until a record fits)",
    "--max-seq-length": "--max-tokens (whole messages go until a record fits)",
    "--lr-scheduler-type": "--schedule cosine, linear or constant, after --warmup",
    "--fp16": "--dtype bfloat16 or float32",
    "--attn-implementation": "--model-args attn_implementation=NAME",
    "--resume-from-checkpoint": "--resume, from the newest whole checkpoint in --out",
    "--eval-strategy": "--eval-every N, in steps",
    "--save-strategy": "--save-every N, in steps",
    "--do-sample": "--temperature above 0",
    "--assistant-only-loss": "--loss-on answers (the default)",
    "--completion-only-loss": "--loss-on last",
    "--train-on-inputs": "--loss-on all",
    "--deepspeed": "torchrun, over whose processes weights are sharded",
    "--fsdp": "torchrun, over whose processes weights are sharded",
    "--optim": "--optimizer adamw, adamw8bit or muon; any other is a line of the page",
}
COMMON = (  # what --help shows of a recipe beside the flags of its own
    "model_path adapter_path adapter lora_rank dtype hub data val_data loss_on max_tokens steps "
    "epochs batch_size max_tokens_per_micro lr out save_every eval_every keep_best patience resume "
    "overwrite dry_run max_new_tokens temperature num_answers image_encoder image_encoder_path "
    "image_root index rewards"
)


# as which Python reads a byte of a word that is not in the encoding of the locale
SURROGATE = re.compile("[\ud800-\udfff]")


class Setting(NamedTuple):
    """A field of a config, or of a config inside it."""

    name: str
    default: Any
    owner: type

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def settings_of(config_class: type, defaults: Any = None) -> Iterator[Setting]:
    """The fields of a config class, those of the configs inside it in their place.

    Their defaults are the values of the instance `defaults`, else those of the class.
    """
    for field in dataclasses.fields(config_class):
        default = field.default if defaults is None else getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            yield from settings_of(type(default), default)
        else:
            yield Setting(field.name, default, config_class)


def changed_settings(config: Any) -> dict[str, Any]:
    """The settings of a config that differ from the defaults of its class, by name."""
    both = _usual_and_own(config)
    return {usual.name: value for usual, value in both if value != usual.default}


def _usual_and_own(config: Any) -> Iterator[tuple[Setting, Any]]:
    """Each setting of a config's class, and the value that the config has of it."""
    own = (setting.default for setting in settings_of(type(config), config))
    return zip(settings_of(type(config)), own, strict=True)


def translate_flags(words: list[str], config_class: type) -> list[str]:
    """The words of a command line in our flags.

    A flag that the config has stays as it is. `--config FILE` becomes the settings of the file,
    which later words override. ValueError for a flag of another tool whose meaning differs, which
    says what to give here, for a file that cannot be read, for a word that is no UTF-8, and for a
    flag without the value that it needs to have an effect, as of a variable of the shell that is
    not set.
    """
    if bad := next(filter(SURROGATE.search, words), ""):
        raise ValueError(
            f"{bad!a} is no UTF-8, as names of models and runs have to be: give another "
            "name, or set LC_ALL=C.UTF-8"
        )
    defaults = {s.flag: s.default for s in settings_of(config_class)}
    out, rest = [], deque(words)
    while rest:
        word = rest.popleft()
        if not word.startswith("--"):
            out.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        # the words that may be its values
        values = deque([value]) if equals else rest
        if flag not in defaults:
            if flag == "--config":
                out += file_words(values.popleft() if values else "", config_class)
                continue
            if flag in SETTING and SETTING[flag][0] in defaults:
                out += SETTING[flag] if _is_on(values) else ()
                continue
            flag = _translate_flag(flag, defaults)
        default = defaults.get(flag)
        if isinstance(default, bool) and not equals and not _is_on(rest):
            flag = "--no" + flag[1:]
        given = next(iter(values), "")
        empty = not given or (given.startswith("--") and not equals)
        # after a file of settings it takes back what the file gave
        known = any(word.partition("=")[0] == flag for word in out)
        if empty and not known and (default == () or isinstance(default, str)):
            raise ValueError(f"{flag} has no value: give one, or leave it out")
        if (flag, given) in VALUES:
            values[0] = VALUES[flag, given]
        out.append(f"{flag}={values[0]}" if equals else flag)
    return out


def _translate_flag(flag: str, defaults: dict[str, Any]) -> str:
    """Our flag of the same meaning, else the flag as it is.

    ValueError for one of another meaning, and for one that is nearly another tool's.
    """
    if flag in OURS:
        raise ValueError(f"{flag} is another tool's flag; here it is {OURS[flag]}")
    # --sample-X had the name --cherry-X
    known = EQUAL.get(flag, flag.replace("-cherry-", "-sample-"))
    if known.replace("--no-", "--") in defaults:
        return known
    if near := get_close_matches(flag, EQUAL, 1, 0.85):
        raise ValueError(f"{flag}: no such flag; perhaps you meant {EQUAL[near[0]]}")
    return flag


def _is_on(rest: deque[str]) -> bool:
    """What the word after a switch says, if it is True or False, which is taken then."""
    said = rest[0].lower() if rest else ""
    if said in ("true", "false"):
        rest.popleft()
    return said != "false"


def file_words(path: str, config_class: type) -> list[str]:
    """The flags that a file of settings stands for: a run's config.json, JSON or TOML.

    Names may lie in groups or not. ValueError where the file cannot be read or names a setting
    that the recipe has not.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        loaded = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--config {path}: give a file of JSON or TOML ({why})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"--config {path}: give an object of settings and their values")
    values = dict(_ungrouped(loaded["config"] if "identity" in loaded else loaded))
    known = list(settings_of(config_class))
    if unknown := sorted(values.keys() - {setting.name for setting in known}):
        raise ValueError(f"--config {path}: this recipe has no setting {', '.join(unknown[:3])}")
    return [w for s in known if s.name in values for w in words_of(s, values[s.name])]


def _ungrouped(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and values of settings, those of groups inside too."""
    for name, value in group.items():
        if isinstance(value, dict):
            yield from _ungrouped(value)
        else:
            yield name.replace("-", "_"), value


def words_of(setting: Setting, value: Any) -> list[str]:
    """The words that give a setting a value; none where it is the default."""
    value = tuple(value) if isinstance(value, list) else value
    if value == setting.default:
        return []
    if isinstance(value, bool):
        return [setting.flag if value else "--no" + setting.flag[1:]]
    if isinstance(value, tuple):
        return [setting.flag, *map(str, value)]
    return [f"{setting.flag}={value}"]


def command_of(config: Any) -> str:
    """The command that gives a run with this config again."""
    both = _usual_and_own(config)
    words = masked([word for usual, value in both for word in words_of(usual, value)])
    return shlex.join([*start_of(type(config)), *words])


def start_of(config_class: type) -> list[str]:
    """The words that start the recipe of a config class: ta sft, or python my_page.py.

    A page that this process was started with has the name that was typed.
    """
    page = Path(getattr(sys.modules[config_class.__module__], "__file__", None) or "RECIPE.py")
    typed = sys.argv[0]
    if typed in sys.orig_argv and Path(typed).name == page.name:
        return ["python", typed]
    return ["ta", page.stem] if page.parent == RECIPES else ["python", str(page)]


def docs_of(config_class: type) -> dict[str, str]:
    """What each field of a config class means: its docstring in one paragraph."""
    # tyro requires this package and reads docstrings with it
    from docstring_parser import parse_from_object

    bases = reversed(config_class.__mro__[:-1])
    params = chain.from_iterable(parse_from_object(base).params for base in bases)
    return {p.arg_name: " ".join((p.description or "").split()) for p in params}


def short_help(config_class: type, doc: str) -> str:
    """What `--help` shows: the recipe's own flags and the common ones."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    lines = [wrapped_page(doc, width), "", "flags (all of them: --help-all):"]
    for setting in settings_of(config_class):
        if setting.name not in COMMON.split() and setting.owner is not config_class:
            continue
        hint = get_type_hints(setting.owner)[setting.name]
        default = setting.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        tail = f" (default: {shown})" if shown not in ("", "None", "False", "True") else ""
        tail = " (required)" if default is dataclasses.MISSING else tail
        text = docs_of(setting.owner).get(setting.name, "") + tail
        lines.append(f"  {setting.flag} {kind_of(hint)}".rstrip())
        lines += [hanging(text, width, 6, " " * 6)] if text else []
    config = "Settings from a file: config.json of a run, JSON or TOML. Flags after it win."
    return "\n".join([*lines, "  --config FILE", "      " + config])


def kind_of(hint: Any) -> str:
    """What a flag takes, as help shows it."""
    kinds = {bool: "", int: "INT", float: "FLOAT", str: "STR"}
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " ".join(kind_of(part) for part in parts if part is not type(None))
    if kind is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if kind is tuple:
        return f"{kind_of(parts[0])} ..."
    return kinds.get(hint, "")
