"""Load a model from the folders that a ModelConfig names, for training or for inference."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from ta.chat.tokenizer import ChatTokenizer
from ta.command_line import check_config
from ta.data.prepare import Prepared, name_of
from ta.folders import ModelConfig, loading, quiet, read_folder, resolve, value_of
from ta.model.adapters import KINDS as ADAPTERS
from ta.model.adapters import (
    PROMPT_LEARNING,
    add_adapter,
    check_adapter,
    is_prompt_learning,
    load_adapter,
    merge_adapter,
    read_config,
)
from ta.model.attention import register
from ta.model.export import check_export, stored_dtype
from ta.model.language_model import LanguageModel, check_runs, is_encoder_classifier, wrap
from ta.model.new_rows import check_vocabulary, set_rows
from ta.model.settings import AdapterConfig, ComputeConfig
from ta.parallel import (
    blocks,
    checkpoint_activations,
    compile_blocks,
    deterministic_operations,
    frozen_to_bfloat16,
    gather_objects,
    on_rank_zero,
    rank,
    say,
    shard,
    world,
)

Task = Literal["causal", "seq_cls", "encoder"]
# the class of transformers for each, and its name in messages
CLASSES = {
    "causal": ("AutoModelForCausalLM", "a language model"),
    "seq_cls": ("AutoModelForSequenceClassification", "a classifier"),
    "encoder": ("AutoModel", "a text encoder"),
}
# keyword arguments that have a flag of their own
FLAGS = {
    "dtype": "--dtype",
    "torch_dtype": "--dtype",
    "quantization_config": "--quantize",
    "load_in_4bit": "--quantize",
    "load_in_8bit": "--quantize",
    "num_labels": "--num-labels",
    "trust_remote_code": "--trust-remote-code",
    "local_files_only": "--hub",
}


def load_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    tokenizer: ChatTokenizer,
    device: str = "cpu",
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    seed: int = 0,
    around: Callable[[LanguageModel], LanguageModel] | None = None,
) -> LanguageModel:
    """The model with new tokens and adapter, ready to train; its `note` is for the user.

    With `num_labels` it has a classification head of that many scores, of classes with
    `label_names` where these are given. `around` may wrap the model
    in further modules and freeze parts of it, before it is sharded. New weights are drawn from
    `seed`. ValueError for settings and folders that do not fit together.
    """
    check_config(model)
    check_config(compute)
    sources = resolve(model)
    check_adapter(adapter, sources.adapter, checkpointing=compute.activation_checkpointing)
    added = [token.text for token in tokenizer.new_tokens if token.added]
    if added and sources.adapter:
        raise ValueError(
            f"the adapter {sources.adapter} has no place for the new tokens {', '.join(added)}: "
            "merge it with recipes/merge.py and give the merged folder"
        )
    if compute.deterministic:
        deterministic_operations()
    if num_labels is None:
        loaded, note = load_base(model, device=device, quantize=compute.quantize), ""
    else:
        loaded, note = _classifier(model, adapter, compute, num_labels, label_names, device, seed)
        loaded.config.get_text_config().pad_token_id = tokenizer.fast.pad_token_id
    set_rows(loaded, tokenizer.new_tokens)
    if sources.adapter is None:
        check_vocabulary(tokenizer.fast, loaded)
        ids = [token.id for token in tokenizer.new_tokens]
        adapted = add_adapter(loaded, adapter, ids, tokenizer.fast, seed)
    else:
        # an adapter brings its own new tokens
        adapted = load_adapter(loaded, sources.adapter, trainable=True)
        check_vocabulary(tokenizer.fast, loaded)
    whole = adapted is loaded
    if whole:
        if getattr(loaded, "is_quantized", False):
            raise ValueError(
                f"{sources.base} holds weights of few bits, which cannot be trained: give "
                "--adapter lora, or the model that it was made of"
            )
        loaded.requires_grad_(True)
    ready = _wrap_and_shard(adapted, compute, device, is_half(model, device), around, sources.media)
    if added and adapter.adapter not in ("none", "lora"):
        note += (
            f"\n--adapter {adapter.adapter} trains virtual tokens alone: the rows of "
            f"{', '.join(added)} stay at the mean of the text that explains them"
        )
    ready.note = f"{note}\n{ready.note}".strip()
    say(ready.note)
    if any(p.requires_grad for p in ready.parameters()):
        if whole:
            ready.export_dtype = stored_dtype(sources.base, compute.export_dtype)
        elif compute.export_dtype is not None:
            raise ValueError(
                f"--export-dtype {compute.export_dtype} with an adapter, which is exported as it "
                "was trained: leave it out, or give it to recipes/merge.py"
            )
        check_export(ready, tokenizer)
    return ready


def check_context(model: LanguageModel, *data: Prepared | None) -> None:
    """ValueError where a sequence has more tokens than the model takes; None is no data."""
    base = model.base
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or np.inf
    for name, module in base.named_modules():
        # the positions of RoBERTa and its kind begin behind that of padding
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None:
            limit -= first + 1
    for prepared in filter(None, data):
        sizes = np.diff(prepared.offsets)
        if sizes.max(initial=0) > limit:
            longest = name_of(prepared, int(sizes.argmax()) // prepared.k)
            raise ValueError(
                f"{(sizes > limit).sum()} of {len(sizes)} sequences are longer than the {limit} "
                f"tokens that the model takes (max_position_embeddings); the longest, {longest}, "
                f"has {sizes.max()}: give --max-tokens {limit} to cut dialogues"
            )


def load_for_inference(
    model: ModelConfig, device: str = "cpu", num_labels: int | None = None
) -> PreTrainedModel:
    """The transformers model, frozen, in eval mode and in the arithmetic of `model.dtype`.

    A LoRA adapter is merged into it, unless it is held in few bits; a prompt-learning adapter stays
    around it. Weights are held in that arithmetic: `auto` is bfloat16 on accelerators and float32
    on CPU. With `num_labels` it is a classifier. Each process loads the whole model. ValueError for
    a model that does not load or does not run.
    """
    sources = resolve(model)
    task: Task = "causal" if num_labels is None else "seq_cls"
    # an adapter is merged before it is rounded
    half = is_half(model, device) and sources.adapter is None
    loaded: Any = load_base(model, task, num_labels or 1, device, whole=True, half=half)
    if sources.adapter is not None:
        adapted = load_adapter(loaded, sources.adapter)
        few_bits = getattr(loaded, "is_quantized", False)
        loaded = adapted if few_bits or is_prompt_learning(adapted) else merge_adapter(adapted)
    if is_half(model, device):
        cast_parameters(loaded, torch.bfloat16)
    root = LanguageModel(loaded.requires_grad_(False).eval(), "native")
    if getattr(root.base, "is_quantized", False):
        # not every shape is held in few bits on every device
        check_runs(root)
    return loaded


def load_base(
    model: ModelConfig,
    task: Task = "causal",
    num_labels: int = 1,
    device: str = "cpu",
    *,
    quantize: Literal["none", "8bit", "4bit"] = "none",
    whole: bool = False,
    half: bool = False,
) -> PreTrainedModel:
    """The transformers model of a ModelConfig without its adapter, on `device`, in eval mode.

    Weights are float32 (float64 where asked), with `half` bfloat16 as soon as they are read. Where
    several processes train together, rank 0 has the weights on the CPU and the others have shapes
    only, unless `whole`. ValueError for a folder that does not load, or whose tensors are not those
    of the model.
    """
    folder = resolve(model).base
    if task == "causal" and read_folder(folder).kind == "classifier":
        raise ValueError(
            f"{folder} is a reward model or classifier, which gives scores and no text: give a "
            "language model"
        )
    arguments = parsed(model.model_args)
    own_attention = task == "encoder" or "attn_implementation" in arguments
    arguments |= {"trust_remote_code": model.trust_remote_code, "local_files_only": not model.hub}
    arguments |= quantization(quantize, is_half(model, device), device)
    if read_folder(folder).config.get("quantization_config"):
        arguments["device_map"] = {"": device}
    if task == "seq_cls":
        arguments["num_labels"] = num_labels
    class_name, kind = CLASSES[task]
    auto = getattr(transformers, class_name)
    dtype = torch.float64 if model.dtype == "float64" else torch.float32
    dtype = torch.bfloat16 if half else dtype
    with loading(folder, kind):
        if rank() and not whole:
            loaded, info = _shapes(auto, folder, dtype, **arguments), None
        else:
            loaded, info = from_pretrained(auto, folder, dtype=dtype, **arguments)
    try:
        loaded.get_input_embeddings()
    except NotImplementedError:
        raise ValueError(
            f"{folder} holds a {type(loaded).__name__}, which has no table of token embeddings: "
            "give a model of another kind"
        ) from None
    if not own_attention:
        with quiet():
            # set, not asked for: models of their own attention keep it, and the masks for it
            loaded.set_attn_implementation(register())
    if info is None:
        return loaded.eval()
    check_tensors(folder, info, *_head_tensors(task, loaded, info))
    if loaded.can_generate():
        # transformers would go on without a file that it cannot read
        value_of(Path(folder) / "generation_config.json", "num_beams", int)
        check_generation(folder, loaded.generation_config)
    if getattr(loaded, "is_quantized", False):
        # it stands where it was loaded
        _keep_backward_pass(loaded)
        return loaded.eval()
    return loaded.to(device if whole or world() == 1 else "cpu").eval()


def _shapes(auto: Any, folder: str, dtype: torch.dtype, **arguments: Any) -> PreTrainedModel:
    """A model without weights: parallel.shard sends those of rank 0 to the other processes."""
    attention = arguments.pop("attn_implementation", None)
    settings = transformers.AutoConfig.from_pretrained(folder, **arguments)
    with torch.device("meta"):
        return auto.from_config(settings, dtype=dtype, attn_implementation=attention)


def _head_tensors(
    task: Task, loaded: PreTrainedModel, info: dict[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How names of tensors begin that the folder of another task's model may lack, or have more."""
    if task == "causal":
        return (), ()
    if task == "encoder":
        return ("pooler.",), ("",)
    if not is_encoder_classifier(loaded):
        return ("score.", "classifier."), ("lm_head.", "embed_out.")
    # an encoder's heads are whatever stands beside its body; its pooler may be new too
    body = f"{loaded.base_model_prefix}."
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    new = tuple(n for n in missing if not n.startswith(body) or ".pooler." in n)
    return new, tuple(name for name in unexpected if not name.startswith(body))


def _keep_backward_pass(model: PreTrainedModel) -> None:
    """Keep layers of few bits out of bitsandbytes' layout for inference on CPU, in place.

    That has no backward pass and few widths.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def parsed(pairs: tuple[str, ...]) -> dict[str, Any]:
    """A dict of key=value strings; values that are no Python literals stay text.

    ValueError for a string of another form, and for what a flag says already.
    """
    out = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise ValueError(f"--model-args {pair!r} is not of the form key=value")
        if key in FLAGS:
            raise ValueError(f"--model-args {key}=...: give {FLAGS[key]} instead")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def quantization(quantize: str, half: bool, device: str) -> dict[str, Any]:
    """The arguments of from_pretrained that hold linear layers in 8 or 4 bits; {} for "none".

    8 bits is LLM.int8 (arXiv 2208.07339); 4 bits is NF4 as in QLoRA (arXiv 2305.14314).
    """
    if quantize == "none":
        return {}
    compute = torch.bfloat16 if half else torch.float32
    four_bits = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute,
    }
    bits = four_bits if quantize == "4bit" else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}


def from_pretrained(kind: Any, folder: str, **arguments: Any) -> tuple[PreTrainedModel, dict]:
    """transformers' model of a class `kind`, and which of its tensors the folder had.

    Weights are read from safetensors alone; transformers' own table of tensors that do not fit is
    not printed, because `check_tensors` says more in one line.
    """
    with quiet():
        return kind.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )


def check_tensors(
    folder: str,
    info: dict[str, Any],
    new: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
) -> None:
    """ValueError, with names, where tensors of the folder are not those of the model.

    `info` is what `from_pretrained` says. Tensors whose name has a part that begins like `new` may
    be missing, those that begin like `unread` may be there without a place for them.
    """
    mismatched = {
        name: f"{name} is {tuple(given)} there and {tuple(wanted)} by config.json"
        for name, given, wanted in info["mismatched_keys"]
    }
    missing = [name for name in info["missing_keys"] if not name.startswith(new)]
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(unread)]
    for names, verb in (
        (set(missing) - mismatched.keys(), "lacks"),
        (unexpected, "has, without a place for them,"),
        (mismatched.values(), "has, of another shape,"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{folder} {verb} {len(names)} tensors ({shown}): give the folder of a whole "
                "model, as its own library saved it"
            )


# settings that say nothing where nothing is sampled, and those where no beams are searched
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
BEAMS = ("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups")


def check_generation(folder: str, config: GenerationConfig) -> None:
    """Leave out settings without effect, which transformers would not save, and say which.

    ValueError for a generation config that no export could hold.
    """
    idle = () if config.do_sample else SAMPLING
    idle += () if (config.num_beams or 1) > 1 else BEAMS
    usual = {name: getattr(type(config)(), name, None) for name in idle}
    given = [name for name, value in usual.items() if getattr(config, name, None) != value]
    for name in given:
        setattr(config, name, usual[name])
    if given:
        say(
            f"note: {', '.join(given)} of {folder}/generation_config.json have no effect there "
            "(nothing is sampled, or no beams are searched) and are left out of what is exported"
        )
    with quiet(), loading(f"{folder}/generation_config.json", "settings of generation (mend it)"):
        config.validate(strict=True)


def multiply_in_float8(model: LanguageModel) -> None:
    """Let the linear layers of every block multiply in float8, forward and backward, in place.

    Layers whose sides are no multiples of 16 stay, as the hardware asks. Weights keep their type.
    ValueError without torchao and for a model that does not compute in bfloat16.
    """
    if not model.half_precision:
        raise ValueError("--float8 rounds what bfloat16 computes: give --dtype bfloat16")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"--float8 needs torchao (pip install torchao): {error}") from error
    for block in blocks(model):
        convert_to_float8_training(
            block, module_filter_fn=lambda layer, name: not any(n % 16 for n in layer.weight.shape)
        )


def is_half(model: ModelConfig, device: str) -> bool:
    """Whether the forward pass runs in bfloat16."""
    return model.dtype == "bfloat16" or (model.dtype == "auto" and str(device).startswith("cuda"))


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold every parameter in `dtype`, in place, but those that are held in few bits.

    Unlike `model.to(dtype)` this leaves buffers alone, because rotary frequencies must not be
    rounded.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _classifier(
    model: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    num_labels: int,
    label_names: Sequence[str],
    device: str,
    seed: int,
) -> tuple[PreTrainedModel, str]:
    """The model with a head of `num_labels` scores, and a line for the user where that head is new.

    A new head is drawn from `seed`. ValueError for another number of names, for adapters of virtual
    tokens, for a model whose head does not read the last token, and for a head of another size.
    """
    if num_labels < 1 or len(label_names) not in (0, num_labels):
        raise ValueError(f"num_labels {num_labels}, label_names {label_names}: give a name a score")
    sources = resolve(model)
    if sources.media:
        raise ValueError(
            f"{sources.media} sees or hears, and a model with a head of scores would not: give the "
            "language model that it was made from"
        )
    trained = sources.adapter and read_config(sources.adapter)["peft_type"]
    kind = trained or ADAPTERS.get(adapter.adapter, "")
    if kind in PROMPT_LEARNING:
        raise ValueError(
            f"{kind} with a classification head: its virtual tokens shift the place where scores "
            "are read; give --adapter lora"
        )
    folder = read_folder(sources.base)
    old = folder.kind == "classifier"
    if old and folder.num_labels != num_labels:
        raise ValueError(
            f"{sources.base} has a head of {folder.num_labels} labels where {num_labels} are "
            "asked: give a model without a head, or its own number (--num-labels; rm.py trains 1)"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = load_base(model, "seq_cls", num_labels, device, quantize=compute.quantize)
    if not hasattr(loaded, "score") and not is_encoder_classifier(loaded):
        raise ValueError(
            f"{sources.base} is a {type(loaded).__name__}, which reads no score at the last token: "
            "give the folder of a causal language model, or of an encoder such as BERT"
        )
    if label_names:
        _name_classes(loaded, label_names)
    plural = "s" * (num_labels > 1)
    return loaded, "" if old else f"the head of {num_labels} score{plural} is new"


def _name_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Name the classes in the model's config, in place.

    ValueError where the model's own classes have other names.
    """
    own = [model.config.id2label[i] for i in range(len(names))]
    if own not in (list(names), [f"LABEL_{i}" for i in range(len(names))]):
        raise ValueError(
            f"--labels {' '.join(names)}: the model's own classes are {' '.join(own)}, in this "
            "order; give these"
        )
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}


def _wrap_and_shard(
    model: nn.Module,
    compute: ComputeConfig,
    device: str,
    half: bool,
    around: Callable[[LanguageModel], LanguageModel] | None,
    media: str | None,
) -> LanguageModel:
    """Wrap a model and find its mode on rank 0, then compile, checkpoint and shard it as asked."""
    found = on_rank_zero(lambda: wrap(model, compute.packing, torch.bfloat16 if half else None))
    wrapper, note = (LanguageModel(model, "packed"), "") if rank() else found
    mode, note = gather_objects((wrapper.mode, note))[0]
    wrapper.set_mode(mode).media_folder = media
    if around is not None:
        wrapper = around(wrapper)
    wrapper.note = note
    wrapper.half_precision, wrapper.recomputed = half, compute.activation_checkpointing
    if half:
        # what stands beside the language model is exported as it came
        frozen_to_bfloat16(wrapper.inner)
    if compute.float8:
        multiply_in_float8(wrapper)
    if compute.compile:
        compile_blocks(wrapper)
    if compute.activation_checkpointing:
        checkpoint_activations(wrapper, compute.keep_products)
    if world() > 1:
        wrapper.autocast = None
        shard(wrapper, device, half)
    return wrapper
