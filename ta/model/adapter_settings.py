"""What adapter the user asks for: its flags, the checks of what cannot work, and the same as peft's settings for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from ta.model.adapter_base import read_config, task_of
from ta.model.new_rows import tables

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = {
    "lora": "LORA",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p-tuning": "P_TUNING",
}
PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


@dataclass(frozen=True)
class AdapterConfig:
    adapter: Literal["none", "lora", "prefix", "prompt", "p-tuning"] = "none"
    """Train these few weights and leave the base as it is; none trains every weight."""
    lora_rank: int = 16
    """Rank of the LoRA update."""
    lora_alpha: float = 32
    """The update is scaled by alpha / rank (with rsLoRA alpha / sqrt(rank))."""
    lora_dropout: float = 0.0
    """Dropout before the LoRA update, 0 to 1."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get LoRA; all-linear is every linear layer but the head."""
    lora_modules_to_save: tuple[str, ...] = ()
    """Names of modules that train fully beside LoRA and are saved with it; a classifier's head always is."""
    use_dora: bool = False
    """Split the update into direction and magnitude (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by the square root of the rank (rsLoRA, arXiv 2312.03732)."""
    virtual_tokens: int = 20
    """Virtual tokens of prefix tuning, prompt tuning and p-tuning."""
    prompt_init_text: str | None = None
    """Prompt tuning starts from the embeddings of this text (repeated where it is shorter than the virtual tokens); none: from random tokens."""
    p_tuning_hidden: int | None = None
    """Width of p-tuning's prompt encoder; none is the width of the model."""


def check_adapter(
    config: AdapterConfig,
    path: str | None = None,
    *,
    packing: bool = False,
    checkpointing: bool = False,
) -> None:
    """ValueError for settings without effect, out of range, or that cannot work together.

    Nothing is loaded. `path` is the folder of a trained adapter that is gone on with.
    """
    kind, default = config.adapter, AdapterConfig()
    if path is not None and kind != "none":
        raise ValueError(
            f"--adapter {kind} with --adapter-path {path}: a new adapter or that one? give one of the two"
        )
    for field in fields(config):
        if (
            field.name in OWNERS
            and kind not in OWNERS[field.name]
            and getattr(config, field.name) != getattr(default, field.name)
        ):
            raise ValueError(
                f"--{field.name.replace('_', '-')} has no effect with --adapter {kind}: it belongs to {' or '.join(OWNERS[field.name])}"
            )
    for name in ("lora_rank", "lora_alpha", "virtual_tokens", "p_tuning_hidden"):
        if (value := getattr(config, name)) is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 <= config.lora_dropout < 1:
        raise ValueError(f"--lora-dropout {config.lora_dropout}: must be at least 0 and below 1")
    if kind == "lora" and not config.lora_targets:
        raise ValueError(
            "--lora-targets is empty: give all-linear or names of modules, such as q_proj v_proj"
        )
    if "all-linear" in config.lora_targets and len(config.lora_targets) > 1:
        raise ValueError(
            f"--lora-targets {' '.join(config.lora_targets)}: all-linear stands alone; give it or names of modules"
        )
    stored = read_config(path)["peft_type"] if path else KINDS.get(kind, "")
    if packing and stored in PROMPT_LEARNING:
        raise ValueError(
            f"{stored} cannot be packed: its virtual tokens stand at the beginning of a row; turn packing off (--no-packing)"
        )
    if checkpointing and stored == "PREFIX_TUNING":
        raise ValueError(
            f"{stored} with activation checkpointing: its keys and values would be lost in the backward pass; turn checkpointing off"
        )


def lora_settings(
    model: PreTrainedModel, config: AdapterConfig, new_token_ids: Sequence[int]
) -> PeftConfig:
    """peft's settings for LoRA on `model`; new tokens train in each table once (peft ties the head's rows where the tables are tied).

    ValueError for names that the model does not have, and for tables that are tied in ways that peft cannot keep.
    """
    from peft import LoraConfig

    names = [name for name, _ in model.named_modules() if name]
    targets = [] if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    for flag, given in (
        ("--lora-targets", targets),
        ("--lora-modules-to-save", config.lora_modules_to_save),
    ):
        for target in given:
            if not any(_hits(name, [target]) for name in names):
                known = sorted(
                    {
                        name.rsplit(".")[-1]
                        for name, module in model.named_modules()
                        if name and not list(module.children())
                    }
                )
                raise ValueError(
                    f"{flag} {target}: the model has no module of that name; it has {', '.join(known)}"
                )
    tied = "output" not in tables(model) and model.get_output_embeddings() is not None
    heads = [
        next(name for name, module in model.named_modules() if module is head)
        for head in (model.get_input_embeddings(), model.get_output_embeddings())
        if head is not None
    ]
    if hit := [name for name in heads if _hits(name, targets) and (tied or new_token_ids)]:
        why = "its table is tied to the other one" if tied else "the rows of new tokens train there"
        raise ValueError(
            f"--lora-targets: LoRA on {hit[0]} cannot be merged, {why}; leave it out, or give it to --lora-modules-to-save"
        )
    whole = [name for name in heads if _hits(name, config.lora_modules_to_save)]
    if tied and whole and not heads[0].endswith("embed_tokens"):
        raise ValueError(
            f"--lora-modules-to-save: peft would untie {heads[0]} from the head; leave it out (new tokens train without it)"
        )
    rows = (
        [] if tied and whole else [name for name in heads[: 1 if tied else 2] if name not in whole]
    )
    saved = [
        target
        for target in config.lora_modules_to_save
        if not (tied and any(_hits(name, [target]) for name in heads))
    ]
    saved += (
        heads[:1] if tied and whole else []
    )  # named once: peft makes the head follow, and its own order of names matters
    return LoraConfig(
        task_type=task_of(model),
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets or "all-linear",
        modules_to_save=saved or None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        trainable_token_indices={name: sorted(set(new_token_ids)) for name in rows}
        if new_token_ids and rows
        else None,
        ensure_weight_tying=bool(tied and whole),
        fan_in_fan_out=any(
            type(module).__name__ == "Conv1D" for module in model.modules()
        ),  # GPT-2's transposed layers
    )


def prompt_settings(model: PreTrainedModel, config: AdapterConfig) -> PeftConfig:
    """peft's settings for prefix tuning, prompt tuning or p-tuning on `model`; nothing in them looks up a tokenizer."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

    sizes = {"task_type": task_of(model), "num_virtual_tokens": config.virtual_tokens}
    if config.adapter == "p-tuning":
        return PromptEncoderConfig(**sizes, encoder_hidden_size=config.p_tuning_hidden)
    return {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}[config.adapter](**sizes)


def start_ids(
    model: PreTrainedModel,
    config: AdapterConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
) -> list[int]:
    """The token ids whose embeddings prompt tuning starts from: the text's, repeated to the number of virtual tokens, or random ones."""
    import torch

    count, text = config.virtual_tokens, config.prompt_init_text
    if text is None:
        rows = model.get_input_embeddings().weight.shape[0]
        return torch.randint(
            0, rows, (count,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
    assert tokenizer is not None, "prompt_init_text needs the tokenizer"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not 0 < len(ids) <= count:
        raise ValueError(
            f"--prompt-init-text {text!r} has {len(ids)} tokens for {count} virtual tokens; give a text with 1 to {count} of them"
        )
    return (ids * count)[:count]


def _hits(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


OWNERS = {
    **dict.fromkeys(
        (
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "lora_targets",
            "lora_modules_to_save",
            "use_dora",
            "use_rslora",
        ),
        ("lora",),
    ),
    "virtual_tokens": ("prefix", "prompt", "p-tuning"),
    "prompt_init_text": ("prompt",),
    "p_tuning_hidden": ("p-tuning",),
}
