"""Export a finished model as a folder that plain transformers loads.

It holds the weights, the tokenizer with the template of training, and a generation config with the
tokens that end an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ta.chat.encode import Drop, encode_chats
from ta.chat.messages import ANSWER
from ta.chat.template import ChatConfig, export_template
from ta.chat.tokenizer import ChatTokenizer, disagreement
from ta.files import publishing
from ta.model.adapters import save_adapter, saved_tables
from ta.model.language_model import LanguageModel, base_model
from ta.parallel import gather_objects, on_rank_zero, rank, say, world

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
        temporary, failure = gather_objects(made)[0], None
        try:
            yield temporary
        except Exception as error:
            failure = error
        failures = gather_objects(failure and f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if failed := [text for text in failures if text]:
            raise OSError(f"{folder} is not written, another process failed ({failed[0]})")
        on_rank_zero(stack.close)


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
    folder, inner = Path(folder), model.inner
    base = base_model(inner)
    _say_disagreement(tokenizer, records)
    with published(folder) as temporary:
        state = gathered(inner, only_trained=base is not inner)
        model.save_parts(temporary)
        if rank() == 0:
            if card:
                (temporary / "README.md").write_text(card, encoding="utf-8")
            tokenizer.fast.chat_template = export_template(tokenizer.template)
            tokenizer.fast.save_pretrained(temporary)
            set_generation(base, tokenizer.fast, tokenizer.stop_ids)
            if base is not inner:
                save_adapter(inner, temporary, state)
                if base.can_generate():
                    base.generation_config.save_pretrained(temporary)
            else:
                whole(inner, state).save_pretrained(temporary, max_shard_size=MAX_FILE)
    say(f"done: {folder}")


def _say_disagreement(tokenizer: ChatTokenizer, records: Sequence[dict]) -> None:
    """Say where apply_chat_template of the export gives other ids than training."""
    chats = [record["messages"] for record in records if "messages" in record]
    chats = [chat for chat in chats if chat and chat[-1]["role"] == ANSWER]
    plain = [c for c in chats if all(isinstance(m["content"], str) and "type" not in m for m in c)]
    encoded = encode_chats(plain, tokenizer, ChatConfig())
    both = [(c, e.ids) for c, e in zip(plain, encoded, strict=True) if not isinstance(e, Drop)]
    trained, ids = [chat for chat, _ in both], [ids for _, ids in both]
    gap = disagreement(tokenizer.fast, tokenizer.template, trained, ids, tokenizer.day)
    if gap:
        say(
            "note: apply_chat_template of the export differs from training where pieces of text "
            f"meet: {gap}"
        )


def whole(model: PreTrainedModel, state: dict[str, Tensor] | None) -> PreTrainedModel:
    """The model, or where it is sharded a model like it that holds the gathered tensors."""
    return model if state is None else _plain(model, state)


def _plain(model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
    """A model like this one that is not sharded and holds the gathered tensors."""
    import torch

    with torch.device("meta"):
        plain = type(model)._from_config(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    if model.can_generate():
        plain.generation_config = model.generation_config
    return plain


def gathered(model: nn.Module, only_trained: bool = False) -> dict[str, Tensor] | None:
    """The state dict with whole tensors on rank 0 and {} elsewhere; None on one process.

    On one process the model's own state dict serves. `only_trained` leaves frozen tensors out.
    """
    if world() == 1:
        return None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if hasattr(model, "adapter_facts"):
        trained.update(saved_tables(model))
    out = {}
    for name, tensor in model.state_dict().items():
        if only_trained and name not in trained:
            continue
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if rank() == 0:
            out[name] = full.detach().cpu()
    return out


def set_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> None:
    """Make the generation config stop at `stop_ids` too, and pad; nothing for other models.

    What the base stopped at stays, as far as the vocabulary still holds it.
    """
    if not model.can_generate():
        return
    config, pad = model.generation_config, tokenizer.pad_token_id
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    before = {token for token in known if token is not None and token < len(tokenizer)}
    config.eos_token_id = sorted(before.union(stop_ids)) or tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
