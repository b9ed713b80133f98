"""Settings of models: how one is adapted, computed, and compared with another."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal

from ta.command_line import Range

# the kinds of adapter that a setting belongs to
OWNERS = {
    "lora_rank": ("lora",),
    "lora_alpha": ("lora",),
    "lora_dropout": ("lora",),
    "lora_targets": ("lora",),
    "lora_modules_to_save": ("lora",),
    "use_dora": ("lora",),
    "use_rslora": ("lora",),
    "virtual_tokens": ("prefix", "prompt", "p-tuning"),
    "prompt_init_text": ("prompt",),
    "p_tuning_hidden": ("p-tuning",),
}


@dataclass(frozen=True)
class AdapterConfig:
    adapter: Literal["none", "lora", "prefix", "prompt", "p-tuning"] = "none"
    """Train these few weights and leave the base as it is; none trains every weight."""
    lora_rank: Annotated[int, Range(1, 65536)] = 16
    """Rank of the LoRA update."""
    lora_alpha: Annotated[float, Range(0, above=True)] = 32
    """The update is scaled by alpha / rank (with rsLoRA alpha / sqrt(rank))."""
    lora_dropout: Annotated[float, Range(0, below=1)] = 0.0
    """Dropout before the LoRA update, 0 to 1."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get LoRA; all-linear is every linear layer but the head."""
    lora_modules_to_save: tuple[str, ...] = ()
    """Names of modules that train fully beside LoRA and are saved with it; a classifier's head
    always is."""
    use_dora: bool = False
    """Split the update into direction and magnitude (DoRA, arXiv 2402.09353)."""
    use_rslora: bool = False
    """Scale by the square root of the rank (rsLoRA, arXiv 2312.03732)."""
    virtual_tokens: Annotated[int, Range(1, 65536)] = 20
    """Virtual tokens of prefix tuning, prompt tuning and p-tuning."""
    prompt_init_text: str | None = None
    """Prompt tuning starts from the embeddings of this text (repeated where it is shorter than the
    virtual tokens); none: from random tokens."""
    p_tuning_hidden: Annotated[int | None, Range(1, 65536)] = None
    """Width of p-tuning's prompt encoder; none is the width of the model."""

    def check(self) -> None:
        """ValueError for settings that have no effect or cannot work together."""
        kind, targets = self.adapter, self.lora_targets
        for name, owners in OWNERS.items():
            if kind not in owners and getattr(self, name) != getattr(AdapterConfig, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} has no effect with --adapter {kind}: it belongs "
                    f"to {' or '.join(owners)}"
                )
        if kind == "lora" and not targets:
            raise ValueError(
                "--lora-targets is empty: give all-linear or names of modules, such as q_proj "
                "v_proj"
            )
        if "all-linear" in targets and len(targets) > 1:
            raise ValueError(
                f"--lora-targets {' '.join(targets)}: all-linear stands alone; give it or names of "
                "modules"
            )


@dataclass(frozen=True)
class ComputeConfig:
    """How a model that trains is computed."""

    packing: bool = True
    """Lay sequences one after another in one row. Models whose documents would see each other are
    found out at the start and padded instead."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    keep_products: bool = False
    """With --activation-checkpointing keep the results of products and attention: little is then
    computed twice, and less memory is saved. Not with --compile."""
    compile: bool = False
    """torch.compile each block; pays on accelerators after a minute of compiling."""
    float8: bool = False
    """Multiply the blocks' matrices in float8 with a scale a tensor (Micikevicius et al. 2022).
    Needs torchao and bfloat16; pays with --compile on GPUs that multiply float8."""
    deterministic: bool = False
    """Only operations that give the same bits in every run, so that a resumed run equals a whole
    one on a GPU as it does on CPU; slower there."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits in which linear layers of a frozen base are held under a LoRA adapter (needs
    bitsandbytes)."""
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the exported weights of a whole model. Default: the one in which the base is stored.
    An adapter is exported as it was trained."""

    def check(self) -> None:
        """ValueError for settings that cannot work together."""
        if self.keep_products and (self.compile or not self.activation_checkpointing):
            raise ValueError(
                "--keep-products goes with --activation-checkpointing and without --compile"
            )


@dataclass(frozen=True)
class ReferenceConfig:
    reference: Literal["auto", "adapter_off", "frozen", "cached", "synced"] = "auto"
    """What the policy is compared with: itself with its new adapter off, a frozen second copy,
    numbers computed once before training and kept, or a copy that follows the policy. auto is
    adapter_off for a new adapter, else frozen."""
    ref_path: str | None = None
    """Folder of another model as the reference (frozen, cached or synced); it must have the
    policy's vocabulary. Default: the policy at its start."""
    sync_every: Annotated[int, Range(1)] = 512
    """Steps between two updates of a synced reference (TR-DPO, arXiv 2404.09656)."""
    sync_alpha: Annotated[float, Range(0, 1, above=True)] = 0.6
    """A synced reference becomes alpha * policy + (1 - alpha) * reference, tensor by tensor (with
    an adapter: of the adapter); 1 is a copy."""


def check_quantize(quantize: str, adapted: bool, world: int) -> None:
    """ValueError where a quantized base cannot work.

    That is without an adapter to train, on several processes, or without its package.
    """
    if quantize == "none":
        return
    if not adapted:
        raise ValueError(
            f"--quantize {quantize}: weights of so few bits cannot be trained; give --adapter "
            "lora, or leave it out"
        )
    if world > 1:
        raise ValueError(
            f"--quantize {quantize}: such weights cannot be sharded over {world} processes; run on "
            "one, or leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"--quantize {quantize} needs bitsandbytes, which is not installed: pip install "
            "bitsandbytes"
        )
