"""Loading a language model from a folder, and the thin wrapper whose forward gives log-probabilities or scores of a Batch.

Letters: B rows, T columns, N sequences, M learned targets, V vocabulary, D model width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ta.folders import model_folder
from ta.model.adapter_settings import KINDS as ADAPTERS
from ta.model.adapter_settings import PROMPT_LEARNING, AdapterConfig, check_adapter
from ta.model.arguments import parsed, quantization
from ta.parallel import compile_blocks, gather_objects, rank, recompute, round_frozen, shard, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ta.chat.tokenizer import ChatTokenizer
    from ta.model.language_model import LanguageModel


@dataclass(frozen=True)
class ModelConfig:
    model_path: str = "builtin"
    """Folder with config, safetensors and tokenizer; "builtin" is a seeded model of a million weights made in code."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 on accelerators and float32 on CPU. Master weights that train stay float32 (or float64)."""
    packing: bool = True
    """Lay sequences one after another in one row. Models whose documents would see each other are found out at the start and padded instead."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each block; pays on accelerators after a minute of compiling."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Bits in which linear layers of a frozen base are held under a LoRA adapter (needs bitsandbytes)."""
    model_args: tuple[str, ...] = ()
    """Further key=value arguments of from_pretrained, such as attn_implementation=flash_attention_2."""
    hub: bool = False
    """Allow model names to be looked up on the Hugging Face hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for folders you trust."""


def load_model(
    config: ModelConfig,
    kind: Literal["causal", "seq_cls", "encoder"] = "causal",
    num_labels: int = 1,
    device: str = "cpu",
):
    """The transformers model in `config.model_path`, its weights in float32 (float64 where asked), on `device`, in eval mode."""
    import torch
    import transformers

    from ta.model.attention import register

    folder = model_folder(config.model_path, config.hub)
    arguments = {"attn_implementation": register(), **parsed(config.model_args)}
    arguments |= quantization(config.quantize, is_half(config, device), device)
    if kind == "seq_cls":
        arguments["num_labels"] = num_labels
    auto = {
        "causal": "AutoModelForCausalLM",
        "seq_cls": "AutoModelForSequenceClassification",
        "encoder": "AutoModel",
    }[kind]
    if kind == "encoder" and arguments["attn_implementation"] == "ta":
        arguments.pop("attn_implementation")
    auto = getattr(transformers, auto)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": not config.hub}
    try:
        if rank():  # shapes only: rank 0 hands the weights out (parallel.shard)
            attention = arguments.pop("attn_implementation", None)
            settings = transformers.AutoConfig.from_pretrained(folder, **options, **arguments)
            with torch.device("meta"):
                return auto.from_config(settings, dtype=dtype, attn_implementation=attention).eval()
        model = auto.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **options, **arguments
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} does not load as a {kind} model: {str(error).splitlines()[0]}"
        ) from error
    return (
        model.eval()
        if config.quantize != "none"
        else model.to(device if world() == 1 else "cpu").eval()
    )


def is_half(config: ModelConfig, device: str) -> bool:
    """Whether the forward pass runs in bfloat16."""
    return config.dtype == "bfloat16" or (config.dtype == "auto" and str(device).startswith("cuda"))


def open_model(
    config: ModelConfig,
    adapter: AdapterConfig,
    tokenizer: ChatTokenizer,
    *,
    kind: Literal["causal", "seq_cls"] = "causal",
    num_labels: int = 1,
    device: str = "cpu",
    seed: int = 0,
    around: Callable[[LanguageModel], LanguageModel] = lambda model: model,
) -> tuple[LanguageModel, str]:
    """The model with new tokens and adapter, wrapped and ready to train; and what the user should be told about it.

    `around` may put further modules around the wrapped model and freeze parts of it, before it is sharded.
    """
    from ta.model.adapters import add_adapter
    from ta.model.new_rows import check_vocabulary, set_rows

    check_adapter(adapter, checkpointing=config.activation_checkpointing)
    news = ""
    if kind == "seq_cls":
        model, news = load_classifier(config, adapter, num_labels, device, seed)
        model.config.pad_token_id = tokenizer.fast.pad_token_id
    else:
        model = load_model(config, kind, num_labels, device)
    set_rows(model, tokenizer.new_tokens)
    check_vocabulary(tokenizer.fast, model)
    wrapped = add_adapter(
        model, adapter, [token.id for token in tokenizer.new_tokens], tokenizer.fast, seed
    )
    if wrapped is model and config.quantize == "none":
        model.requires_grad_(True)
    placed, note = place(wrapped, config, device, is_half(config, device), around)
    return placed, "\n".join(text for text in (news, note) if text)


def load_classifier(
    config: ModelConfig, adapter: AdapterConfig, num_labels: int, device: str, seed: int
) -> tuple[PreTrainedModel, str]:
    """The model with a head of `num_labels` scores, from its folder or else new and drawn from `seed`; and a line where it is new.

    ValueError for adapters of virtual tokens, for a model whose head does not read the last token, and for a head of another size.
    """
    import torch
    import transformers

    from ta.model.adapter_base import read_config

    stored = (
        read_config(adapter.adapter_path)["peft_type"]
        if adapter.adapter_path
        else ADAPTERS.get(adapter.adapter, "")
    )
    if stored in PROMPT_LEARNING:
        raise ValueError(
            f"{stored} with a classification head: its virtual tokens shift the place where scores are read; give --adapter lora"
        )
    folder = model_folder(config.model_path, config.hub)
    settings = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=config.trust_remote_code, local_files_only=not config.hub
    )
    old = any("SequenceClassification" in name for name in settings.architectures or ())
    if old and settings.num_labels != num_labels:
        raise ValueError(
            f"{folder} has a head of {settings.num_labels} labels where {num_labels} are asked: give its number, or a base model"
        )
    loud = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of missing weights is the line below
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(config, "seq_cls", num_labels, device)
    transformers.logging.set_verbosity(loud)
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} reads no score at the last token: give a causal language model's folder"
        )
    return model, "" if old else f"the head of {num_labels} score{'s' * (num_labels > 1)} is new"


def place(
    model,
    config: ModelConfig,
    device: str,
    half: bool,
    around: Callable[[LanguageModel], LanguageModel] = lambda model: model,
) -> tuple[LanguageModel, str]:
    """Wrap a model, find its mode on rank 0, then compile, checkpoint and shard it as asked."""
    import torch

    from ta.model.language_model import LanguageModel, wrap

    if rank():
        wrapper = LanguageModel(model, "packed")
        _, mode, note = gather_objects(None)[0]
        wrapper.set_mode(mode)
    else:
        wrapper, note = wrap(model, config.packing, torch.bfloat16 if half else None)
        gather_objects((None, wrapper.mode, note))
    wrapper = around(wrapper)
    if half:
        round_frozen(wrapper)
    if config.compile:
        compile_blocks(wrapper)
    if config.activation_checkpointing:
        recompute(wrapper)
    if world() > 1:
        wrapper.autocast = None
        shard(wrapper, device, half)
    return wrapper, note
