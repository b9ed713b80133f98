"""Export a finished model as a folder that plain transformers loads.

It holds the weights, the tokenizer with the template of training, and a generation config with the
tokens that end an answer.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ta.chat.encode import Drop, encode_chats
from ta.chat.messages import ANSWER, template_arguments
from ta.chat.template import ChatConfig, export_template
from ta.chat.tokenizer import ChatTokenizer, disagreement, unlearned_end
from ta.chat.tokenizer_files import save_tokenizer
from ta.files import full_disk, json_text, publishing
from ta.folders import quiet, read_json
from ta.model.adapters import save_adapter, saved_tables
from ta.model.language_model import LanguageModel
from ta.parallel import gather_objects, on_rank_zero, rank, say, whole_tensor, world

# a larger model is written as several files with an index
MAX_FILE = "5GB"


@contextmanager
def published(folder: Path, replace: bool = True) -> Iterator[Path]:
    """`publishing` for all processes: a temporary folder that then replaces `folder`.

    Every process must come here, and gets the folder to write into. A failure of one process is
    raised on all of them, and nothing is left behind.
    """
    with ExitStack() as stack:
        made = on_rank_zero(lambda: stack.enter_context(publishing(folder, replace)))
        temporary = gather_objects(made)[0]
        with failing_together(folder):
            yield temporary
        on_rank_zero(stack.close)


@contextmanager
def failing_together(folder: Path) -> Iterator[None]:
    """What fails on one process, as it writes into `folder`, fails on all that come here.

    Others would wait for it. OSError, which tells of a full disk on all.
    """
    failure, said = None, None
    try:
        yield
    except Exception as error:
        failure, said = error, (full_disk(error), f"rank {rank()}: {error}")
    failed = [entry for entry in gather_objects(said) if entry]
    if failure is not None and not full_disk(failure):
        raise failure
    if failed:
        number, text = failed[0]
        reason = f"not written, earlier ones are kept ({text})"
        raise OSError(number or errno.EIO, reason, str(folder)) from failure


def export(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    folder: str | Path,
    records: Sequence[dict] = (),
    card: str = "",
) -> None:
    """Write model (or adapter) and tokenizer into `folder`, published by one rename.

    The exported tokenizer has the template of training, the generation config the tokens that end
    an answer. `model.save_parts` adds what else belongs to the model. A line on the screen says
    where the exported template gives other ids than training for a chat of `records`. `card` is
    the text of README.md.

    Every process must call this: sharded tensors are gathered one at a time, and only rank 0 keeps
    them. OSError where another process failed.
    """
    folder, inner, base = Path(folder), model.inner, model.base
    _say_disagreement(tokenizer, records)
    with published(folder) as temporary:
        state = gathered(inner, base is not inner, model.export_dtype)
        model.save_parts(temporary)
        if rank() == 0:
            if card:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            set_generation(base, tokenizer.fast, tokenizer.stop_ids, tokenizer.stop_strings)
            if base is inner:
                save_model(whole(inner, state), temporary, model.export_dtype)
            else:
                save_adapter(inner, temporary, state)
                if base.can_generate():
                    base.generation_config.save_pretrained(temporary)
            save_tokenizer(tokenizer.fast, temporary, export_template(tokenizer.template))
    say(f"done: {folder}")


def check_export(model: LanguageModel, tokenizer: ChatTokenizer) -> None:
    """Try, before step 1, what an export needs; ValueError where it would be misread.

    The tokenizer is written beside the model's config and read again. Lines on the screen say what
    an export will not have: weights as exact as they are trained, an end that the model learns.
    """
    base, dtype = model.base, model.export_dtype
    config = base.config if base is model.inner else None
    on_rank_zero(lambda: check_tokenizer(tokenizer.fast, config))
    if model.generates and (note := unlearned_end(tokenizer)):
        say(note)
    if config and dtype not in (None, base.dtype):
        stored, held = (str(kind).removeprefix("torch.") for kind in (dtype, base.dtype))
        say(
            f"note: the export is in {stored}, as the weights came; training holds them in {held} "
            f"(--export-dtype {held} keeps that)"
        )


def check_tokenizer(fast: PreTrainedTokenizerFast, config: PreTrainedConfig | None) -> None:
    """ValueError unless a tokenizer can be written beside a model's config and is read back right.

    None is an adapter, whose folder holds no config.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            config.save_pretrained(folder)
        save_tokenizer(fast, Path(folder))


def model_bytes(model: nn.Module, dtype: torch.dtype | None = None, trained: bool = False) -> int:
    """The size of a model's parameters in `dtype` (None: their own), or of those that train."""
    parameters = [p for p in model.parameters() if p.requires_grad or not trained]
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)


def check_room(folder: Path, needed: int) -> None:
    """ValueError where the disk of a folder, which need not exist, has less than `needed` bytes."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(
            f"--out {folder}: {needed / 1e9:.3g} GB are needed on its disk, which has "
            f"{free / 1e9:.3g} GB: make room, or give another folder"
        )


def _say_disagreement(tokenizer: ChatTokenizer, records: Sequence[dict]) -> None:
    """Say where apply_chat_template of the export gives other ids than training."""
    known = {"role", "content", "loss"}
    chats = [r.get("messages") for r in records if not template_arguments(r)]
    chats = [chat for chat in chats if chat and chat[-1]["role"] == ANSWER]
    plain = [chat for chat in chats if all(message.keys() <= known for message in chat)]
    encoded = encode_chats(plain, tokenizer, ChatConfig(loss_on="last"))
    kept = [pair for pair in zip(plain, encoded, strict=True) if not isinstance(pair[1], Drop)]
    trained, ids = [chat for chat, _ in kept], [tokens.ids for _, tokens in kept]
    gap = disagreement(tokenizer.fast, tokenizer.template, trained, ids, tokenizer.day)
    if gap:
        say(
            "note: apply_chat_template of the export differs from training where pieces of text "
            f"meet: {gap}"
        )


def whole(model: PreTrainedModel, state: dict[str, Tensor] | None) -> PreTrainedModel:
    """The model, or where it is sharded a model like it that holds the gathered tensors."""
    if state is None:
        return model
    with torch.device("meta"):
        plain = type(model)._from_config(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def save_model(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights of a model that is not sharded, its config and its generation config.

    Parameters are written in `dtype` (None: as they are); buffers keep their own, because rotary
    frequencies must not be rounded. The config is one that transformers 4 reads as 5 does.
    """
    dtype = dtype or model.dtype
    state, known = model.state_dict(), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in state and parameter.dtype != dtype:
            # one tensor for all names of shared weights, as save_pretrained expects
            key = (parameter.data_ptr(), parameter.shape)
            known.setdefault(key, parameter.detach().to(dtype))
            state[name] = known[key]
    with quiet():
        model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_FILE)
    settings = _with_dtype(read_json(folder / "config.json"), str(dtype).removeprefix("torch."))
    write_for_older(type(model.config), settings, folder)


def _with_dtype(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Settings that name `dtype` wherever they name one, and no folder of this machine."""
    out = {key: value for key, value in settings.items() if key != "_name_or_path"}
    for key, value in out.items():
        if isinstance(value, dict):
            out[key] = _with_dtype(value, dtype)
        elif key == "dtype" and value:
            out[key] = dtype
    return out


def write_for_older(
    config_class: type[PreTrainedConfig], settings: dict[str, Any], folder: Path
) -> None:
    """Write a config.json with the rotary positions also where transformers 4 looks for them.

    They stand in one place where this transformers would read other positions from two, or none.
    """
    path, older = folder / "config.json", None
    path.write_text(json_text(settings, indent=2) + "\n")
    rope = _rope(config_class.from_pretrained(folder).to_dict())
    path.write_text(json_text(_with_old_rope(settings), indent=2) + "\n")
    with suppress(Exception):  # whatever a class raises that cannot read them from two places
        older = _rope(config_class.from_pretrained(folder).to_dict())
    if older != rope:
        path.write_text(json_text(settings, indent=2) + "\n")


def _with_old_rope(settings: dict[str, Any]) -> dict[str, Any]:
    settings = {k: _with_old_rope(v) if isinstance(v, dict) else v for k, v in settings.items()}
    rope = settings.get("rope_parameters") or {}
    # one kind of layer, or {kind of layer: ...}
    main = rope.get("full_attention") or rope
    if "rope_theta" not in main:
        return settings
    theta, local = main["rope_theta"], (rope.get("sliding_attention") or {}).get("rope_theta")
    fraction = main.get("partial_rotary_factor")
    rest = {k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = settings.get("model_type", "")
    older = {
        "rope_theta": theta,
        "rope_scaling": None if rest == {"rope_type": "default"} else rest,
        "partial_rotary_factor": fraction,
        "rope_local_base_freq": local if "gemma3" in kind else None,
    }
    if kind.startswith("modernbert"):
        older = {"global_rope_theta": theta, "local_rope_theta": local}
    if kind.startswith("gpt_neox"):
        older |= {"rotary_emb_base": theta, "rotary_pct": fraction}
    return settings | {key: value for key, value in older.items() if value is not None}


def _rope(settings: dict[str, Any]) -> list:
    """All rotary settings of a config as it was read, in order."""
    inner = [value for value in settings.values() if isinstance(value, dict)]
    return [settings.get("rope_parameters"), *(r for part in inner for r in _rope(part))]


def stored_dtype(folder: str | Path, asked: str | None = None) -> torch.dtype:
    """The dtype asked for, else that in which a model's folder holds its weights: by its config,
    else by its tensors.
    """
    settings = read_json(Path(folder) / "config.json")
    parts = [settings, settings.get("text_config") or {}]
    names = [asked, *(part.get(key) for part in parts for key in ("dtype", "torch_dtype"))]
    found = [getattr(torch, name, None) for name in names if isinstance(name, str)]
    for file in [] if found else sorted(Path(folder).glob("*.safetensors"))[:1]:
        with safe_open(file, "pt") as tensors:
            found = [tensors.get_tensor(name).dtype for name in list(tensors.keys())[:1]]
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return next((dtype for dtype in found if dtype in kinds), torch.float32)


def gathered(
    model: nn.Module, only_trained: bool = False, dtype: torch.dtype | None = None
) -> dict[str, Tensor] | None:
    """The state dict with whole tensors on rank 0 and {} elsewhere; None on one process.

    On one process the model's own state dict serves. `only_trained` leaves frozen tensors out.
    Parameters are given in `dtype`, None: as they are.
    """
    if world() == 1:
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    if hasattr(model, "adapter_facts"):
        # rank 0 alone holds the rows of new tokens, which decide
        trained.update(gather_objects(saved_tables(model))[0])
    out = {}
    for name, tensor in model.state_dict().items():
        if only_trained and name not in trained:
            continue
        full = whole_tensor(tensor)
        if rank() == 0:
            full = full.detach().cpu()
            out[name] = full.to(dtype) if dtype and name in named else full
    return out


def set_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: Collection[int],
    stop_strings: Collection[str] = (),
) -> None:
    """Make the generation config stop at `stop_ids` too, and pad; nothing for other models.

    What the base stopped at stays, as far as the vocabulary still holds it, and so do its settings
    of sampling. `stop_strings` take the place of those that it has.
    """
    if not model.can_generate():
        return
    config, pad = model.generation_config, tokenizer.pad_token_id
    known = config.eos_token_id
    known = known if isinstance(known, list) else [known]
    before = {token for token in known if token is not None and token < len(tokenizer)}
    config.eos_token_id = sorted(before.union(stop_ids)) or tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    config.stop_strings = list(stop_strings) or None
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
