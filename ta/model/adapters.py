"""Adapters on a base model, with the rows of new tokens: added, saved, loaded, checked and merged. T columns, V vocabulary, D width, C labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ta.model.adapter_base import (
    BASE,
    ROWS,
    WEIGHTS,
    Facts,
    check_base,
    describe,
    read_config,
    read_facts,
    read_tensors,
    task_of,
    title,
)
from ta.model.adapter_settings import (
    PROMPT_LEARNING,
    AdapterConfig,
    check_adapter,
    lora_settings,
    prompt_settings,
    start_ids,
)
from ta.model.new_rows import resize, tables

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENCODER = "prompt_encoder.safetensors"
PROMPT = "prompt_encoder.default."  # where peft keeps what makes virtual tokens


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    new_token_ids: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
) -> PeftModel | PreTrainedModel:
    """The model with a new trainable adapter, everything else frozen; the model itself for "none".

    Adapter weights are float32 (float64 on a float64 base). The rows of `new_token_ids` train with LoRA in the input table and in an
    untied output table. The model is changed in place; randomness comes from `seed` alone. ValueError for what cannot work on this model.
    """
    check_adapter(config)
    if config.adapter == "none":
        return model
    if new_token_ids and config.adapter != "lora":
        raise ValueError(
            f"new tokens cannot train with --adapter {config.adapter}: it leaves the embeddings frozen; give --adapter lora"
        )
    settings = (
        lora_settings(model, config, new_token_ids)
        if config.adapter == "lora"
        else prompt_settings(model, config)
    )
    start = start_ids(model, config, tokenizer, seed) if config.adapter == "prompt" else None
    return _wrap(model, settings, Facts(describe(model), _rows(model, new_token_ids)), seed, start)


def load_adapter(model: PreTrainedModel, path: str, trainable: bool = False) -> PeftModel:
    """The model with the saved adapter in folder `path`, and with the rows of its new tokens; eval mode and frozen unless trainable.

    ValueError, naming both, for an adapter of another base (other architecture, task, vocabulary, shapes or weights).
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    kind, folder = read_config(path)["peft_type"], Path(path)
    if trainable and kind == "P_TUNING" and not (folder / ENCODER).exists():
        raise ValueError(
            f"{path} holds no {ENCODER}, without which p-tuning cannot go on training; it can only be used"
        )
    settings, facts = PeftConfig.from_pretrained(path), read_facts(path)
    if settings.task_type != task_of(model):
        raise ValueError(
            f"adapter {path} was trained for {settings.task_type}, the model given is {title(describe(model))}: give its base"
        )
    if facts.base:
        check_base(model, facts, path)
        _restore_rows(model, facts)
    else:
        facts = Facts(describe(model), _rows(model, _token_ids(settings), path))
    settings.base_model_name_or_path, settings.inference_mode = (
        model.name_or_path or None,
        not trainable,
    )
    if kind in PROMPT_LEARNING:  # sizes are this base's, and no tokenizer is looked up
        settings.token_dim = settings.num_layers = settings.num_attention_heads = None
        if kind == "PROMPT_TUNING":
            settings.prompt_tuning_init = "RANDOM"
    wrapped, weights = _wrap(model, settings, facts), read_tensors(folder / WEIGHTS)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    for name in sorted(expected.keys() | weights.keys()):
        ours, theirs = (
            tuple(side[name].shape) if name in side else "absent" for side in (expected, weights)
        )
        if ours != theirs:
            raise ValueError(
                f"adapter {path} of base {read_config(path).get('base_model_name_or_path')!r} does not fit the model {model.name_or_path!r}: "
                f"{name} is {theirs} in the adapter and {ours} by the model; give the base that the adapter was trained on"
            )
    set_peft_model_state_dict(wrapped, weights)
    if trainable and kind == "P_TUNING":
        wrapped.prompt_encoder["default"].load_state_dict(read_tensors(folder / ENCODER))
    return wrapped if trainable else wrapped.eval()


def save_adapter(
    model: PeftModel, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter to `folder` in peft's layout (safetensors), with base.json and the base's rows of new tokens; no whole table is saved.

    `state` is the model's state dict where the caller has gathered it from shards; files are written in place, so save to a folder aside.
    """
    import copy

    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from torch.func import functional_call

    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    settings = copy.copy(model.peft_config["default"])
    settings.inference_mode = True
    for name in ("target_modules", "modules_to_save"):  # a set's order changes from run to run
        if isinstance(names := getattr(settings, name, None), (set, list)):
            setattr(
                settings,
                name,
                sorted(names) if isinstance(names, set) else list(dict.fromkeys(names)),
            )
    encoder = {
        n.removeprefix(PROMPT): t
        for n, t in (state or model.state_dict()).items()
        if n.startswith(PROMPT)
    }
    if (
        state and encoder
    ):  # peft would run the module that makes virtual tokens, whose own weights lie in shards
        tokens = model.prompt_tokens["default"][None, : settings.num_virtual_tokens]
        weights = {
            "prompt_embeddings": functional_call(
                model.prompt_encoder["default"], encoder, (tokens,)
            )[0]
        }
    else:
        weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    settings.save_pretrained(str(folder))
    (folder / BASE).write_text(json.dumps(model.adapter_facts.base, indent=1))
    if model.adapter_facts.rows:
        save_file(model.adapter_facts.rows, folder / ROWS)
    if settings.peft_type == "P_TUNING" and not model.peft_config["default"].inference_mode:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in encoder.items()}, folder / ENCODER
        )


def merge_adapter(model: PeftModel, tolerance: float | None = None) -> PreTrainedModel:
    """The base with the adapter's update in its weights, in place; ValueError for prompt learning and where the logits do not agree.

    They agree when they differ by at most `tolerance` of the greatest logit: by default 1e-3, in half precision (which rounds) 0.05.
    """
    import torch

    if is_prompt_learning(model):
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} cannot be merged: it adds virtual tokens and changes no weight of the base; "
            "serve the base with the adapter, or train LoRA"
        )
    before, base = probe_logits(model), model.get_base_model()
    dtype, tied = (
        base.get_input_embeddings().weight.dtype,
        base.config.get_text_config().tie_word_embeddings,
    )
    fully = tuple(model.active_peft_config.modules_to_save or ())
    merged = model.merge_and_unload()
    for name, module in merged.named_modules():
        if fully and name.endswith(fully):
            module.to(dtype)
    if (
        tied and (output := merged.get_output_embeddings()) is not None
    ):  # peft unties tables that it trained, also where they stayed equal
        same = torch.equal(output.weight, merged.get_input_embeddings().weight)
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = (
            same
        )
        merged.tie_weights()
    after = probe_logits(merged)
    tolerance = (0.05 if dtype.itemsize < 4 else 1e-3) if tolerance is None else tolerance
    if not logits_agree(before, after, tolerance):
        raise ValueError(
            f"the merged model is not the base with its adapter: logits differ by {(before - after).abs().max():.3g} "
            f"where they reach {before.abs().max():.3g}; check the adapter for non-finite weights, or merge in float32"
        )
    return merged


def probe_logits(model: nn.Module) -> Tensor:
    """Float32 logits (1, T, V) or (1, C), in eval mode, of ids spread over the whole vocabulary, its last ids among them."""
    import torch

    table = model.get_input_embeddings().weight
    ids = torch.linspace(0, table.shape[0] - 1, 64).round().long().unique()
    ids = torch.cat([ids, torch.arange(max(0, table.shape[0] - 32), table.shape[0])])[None].to(
        table.device
    )  # (1, T)
    training = model.training
    with torch.no_grad():
        out = model.eval()(input_ids=ids)
    model.train(training)
    return (out.logits if "logits" in out else out.last_hidden_state).float()


def logits_agree(left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether two sets of finite float32 logits differ by at most `tolerance` of the greatest; False for any NaN and another shape."""
    limit = (1e-3 if tolerance is None else tolerance) * max(left.abs().max().item(), 1e-6)
    return left.shape == right.shape and (left - right).abs().max().item() <= limit < float("inf")


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether the model has an adapter that puts virtual tokens in front (prefix tuning, prompt tuning, p-tuning)."""
    settings = getattr(model, "active_peft_config", None)
    return settings is not None and settings.is_prompt_learning


def virtual_embeddings(model: PeftModel) -> Tensor:
    """The input embeddings (virtual tokens, D) that prompt tuning and p-tuning put before every sequence; ValueError for other adapters."""
    if not is_prompt_learning(model) or model.active_peft_config.peft_type == "PREFIX_TUNING":
        raise ValueError(
            f"{type(model).__name__} has no virtual tokens with embeddings: give a model with prompt tuning or p-tuning"
        )
    return model.get_prompt(batch_size=1)[0]


def _wrap(
    model: PreTrainedModel,
    settings: PeftConfig,
    facts: Facts,
    seed: int = 0,
    start: Sequence[int] | None = None,
) -> PeftModel:
    import torch
    from peft import get_peft_model

    weight = model.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, settings)
    if settings.peft_type in PROMPT_LEARNING:  # peft guesses the table by its size
        wrapped.word_embeddings = model.get_input_embeddings()
    if start is not None:
        with torch.no_grad():
            vectors = wrapped.word_embeddings(
                torch.tensor(start, device=weight.device)
            )  # (virtual tokens, D), scaled as the model does
            wrapped.prompt_encoder["default"].embedding.weight.copy_(vectors)
    for parameter in wrapped.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    _mend(wrapped, weight.dtype)
    wrapped.adapter_facts = facts
    return wrapped


def _mend(model: PeftModel, dtype: torch.dtype) -> None:
    """Two things peft 0.21 leaves out: the bias of a head whose new rows train, and float32 modules inside a model of lower precision."""
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    def add_bias(module, inputs, output):
        return output if module.disable_adapters else output + module.original_module.bias

    def enter(module, inputs):
        return (
            inputs
            if module.disable_adapters
            else tuple(x.float() if x.is_floating_point() else x for x in inputs)
        )

    for name, module in model.named_modules():
        if (
            isinstance(module, TrainableTokensWrapper)
            and getattr(module.original_module, "bias", None) is not None
        ):
            module.register_forward_hook(add_bias)
        if isinstance(module, ModulesToSaveWrapper) and dtype.itemsize < 4:
            module.register_forward_pre_hook(enter)
            if not name.endswith(("score", "classifier", "lm_head")):
                module.register_forward_hook(lambda module, inputs, output: output.to(dtype))


def _token_ids(settings: PeftConfig) -> list[int]:
    ids = getattr(settings, "trainable_token_indices", None) or []
    return sorted(set().union(*ids.values()) if isinstance(ids, dict) else ids)


def _rows(model: PreTrainedModel, ids: Sequence[int], path: str | None = None) -> dict[str, Tensor]:
    """The rows of `ids` in each table of the base, float32 on the CPU: what the base's own folder does not have."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    if ids and not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(
            f"{path or 'new tokens'}: trained token ids up to {max(ids)}, but the model has {size} rows; add the tokens first"
        )
    if (
        not ids or model.get_input_embeddings().weight.is_meta
    ):  # shapes only: rank 0 has the rows and saves them
        return {}
    index = torch.tensor(sorted(set(ids)))
    return {
        "ids": index,
        **{name: table.detach()[index].float().cpu() for name, table in tables(model).items()},
    }


def _restore_rows(model: PreTrainedModel, facts: Facts) -> None:
    import torch

    if facts.base["vocabulary"] > model.get_input_embeddings().weight.shape[0]:
        resize(model, facts.base["vocabulary"])
    with torch.no_grad():
        for name, table in tables(model).items() if facts.rows else ():
            table[facts.rows["ids"].to(table.device)] = facts.rows[name].to(table)
