"""Reference log-probabilities of answers: the policy with its adapter off, a frozen copy, numbers computed once, or a copy that follows.

Letters: N sequences, P pairs of answers, n records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ta.chat.tokenizer import TokenizerConfig, load_tokenizer
from ta.files import cache_folder
from ta.folders import ModelConfig, fingerprint, resolve
from ta.model.adapter_settings import AdapterConfig
from ta.model.load import ComputeConfig, load_model
from ta.parallel import say
from ta.reference_table import cached

if TYPE_CHECKING:
    from torch import Tensor

    from ta.chat.tokenizer import ChatTokenizer
    from ta.data.answer_batches import Logps
    from ta.data.batch import Batch
    from ta.data.loader import Dress
    from ta.data.prepare import Prepared
    from ta.model.language_model import LanguageModel


@dataclass(frozen=True)
class ReferenceConfig:
    reference: Literal["auto", "adapter_off", "frozen", "cached", "synced"] = "auto"
    """What the policy is compared with: itself with its new adapter off, a frozen second copy, numbers computed once before training and kept, or a
    copy that follows the policy. auto is adapter_off for a new adapter, else frozen."""
    ref_path: str | None = None
    """Folder of another model as the reference (frozen, cached or synced); it must have the policy's vocabulary. Default: the policy at its start."""
    sync_every: int = 512
    """Steps between two updates of a synced reference (TR-DPO, arXiv 2404.09656)."""
    sync_alpha: float = 0.6
    """A synced reference becomes alpha * policy + (1 - alpha) * reference, tensor by tensor (with an adapter: of the adapter); 1 is a copy."""


class Reference(NamedTuple):
    """What `open_reference` gives to a recipe."""

    logps: Logps | None = None  # None: the method has no reference
    table: Callable[[Prepared, Dress, Any], Tensor] | None = (
        None  # (n, 2) numbers of a prepared set, where they are computed beforehand
    )
    after_step: Callable[[int], None] | None = None
    extra: dict[str, Tensor] | None = None  # what a checkpoint must hold besides the policy


def sequence_logps(model: LanguageModel, batch: Batch) -> Tensor:
    """(N,) the sum of log p over the learned tokens of each sequence."""
    from ta.model.logprobs import sequence_sums

    return sequence_sums(model.logprobs(batch), batch.owners, len(batch.ends))


def learned_tokens(batch: Batch) -> Tensor:
    """(N,) how many tokens each sequence learns."""
    import torch

    return torch.bincount(batch.owners, minlength=len(batch.ends))


def still(model: LanguageModel) -> Logps:
    """The log-probabilities of a model that is not trained here."""
    import torch

    def logps(batch: Batch) -> Tensor:
        with torch.no_grad():
            return sequence_logps(model, batch)

    return logps


def adapter_off(model: LanguageModel) -> Logps:
    """Those of the base under the policy's adapter: no second model."""
    import torch

    from ta.data.batch import lay_out, to_device

    if hasattr(
        model, "unshard"
    ):  # FSDP takes the type of gradients from what trains at the first pass, and without its adapter nothing does
        with torch.no_grad():
            model.hidden(to_device(lay_out([], []), next(model.parameters()).device))

    def logps(batch: Batch) -> Tensor:
        with torch.no_grad(), model.inner.disable_adapter():
            return sequence_logps(model, batch)

    return logps


def dressed(reference: Reference, prepared: Prepared, dress: Dress, depends: Any = None) -> Dress:
    """`dress`, with the reference's numbers filled in where they are computed beforehand; `depends` (JSON) is what else the batches hang on."""
    if reference.table is None:
        return dress
    table = reference.table(prepared, dress, depends)
    return lambda batch, records: dress(batch, records)._replace(ref=table[records])


def with_reference(reference: Reference, batches: list) -> list:
    """The batches with the reference's log-probabilities; they are there already where they were computed beforehand, or not wanted."""
    return (
        [batch._replace(ref=batch.both(reference.logps)) for batch in batches]
        if reference.logps
        else batches
    )


def synced(
    policy: LanguageModel, copy: LanguageModel, every: int, alpha: float
) -> tuple[Callable[[int], None], dict[str, Tensor]]:
    """TR-DPO, arXiv 2404.09656, eq. 5 and 6: after every n-th step the copy's tensors become alpha * policy's + (1 - alpha) * their own.

    -> after_step for `train`, and the tensors of the copy that change, by name.
    """
    import torch

    of, trained = (
        dict(copy.named_parameters()),
        {name: p for name, p in policy.named_parameters() if p.requires_grad},
    )
    if odd := [name for name, p in trained.items() if name not in of or of[name].shape != p.shape]:
        raise ValueError(
            f"a synced reference has the policy's shape, and this one's {odd[0]} is another: give --reference frozen"
        )
    pairs = [(of[name], parameter) for name, parameter in trained.items()]
    extra = {f"reference/{name}": of[name] for name in trained}

    def after_step(done: int) -> None:
        """Move the copy, where it is the time."""
        if done % every == 0:
            if hasattr(copy, "reshard"):
                copy.reshard()  # a sharded root stays gathered after a forward that no backward follows, and would go on with old weights
            with torch.no_grad():
                for theirs, ours in pairs:
                    theirs, ours = (
                        x.to_local() if hasattr(x, "to_local") else x for x in (theirs, ours)
                    )
                    theirs.lerp_(ours, alpha)

    return after_step, extra


def never_synced(config: ReferenceConfig, steps: int) -> str:
    """What to tell the user where a synced reference stays as it is, or nothing."""
    if config.reference != "synced" or config.sync_every <= steps:
        return ""
    return f"note: --sync-every {config.sync_every} is more than the {steps} steps of this run, so the reference never follows"


def choose(config: ReferenceConfig, adapter: AdapterConfig, adapter_path: str | None = None) -> str:
    """The reference that "auto" stands for, or the one given; ValueError, before anything is loaded, for settings that cannot be."""
    new, default = adapter.adapter != "none", ReferenceConfig()
    choice = config.reference
    if choice == "auto":
        choice = "adapter_off" if new and config.ref_path is None else "frozen"
    if choice == "adapter_off" and (config.ref_path or not (new or adapter_path)):
        what = (
            f"it is no second model as --ref-path {config.ref_path} is"
            if config.ref_path
            else "there is no adapter"
        )
        raise ValueError(f"--reference adapter_off: {what}; give frozen")
    if choice != "synced" and (config.sync_every, config.sync_alpha) != (
        default.sync_every,
        default.sync_alpha,
    ):
        raise ValueError(
            f"--sync-every and --sync-alpha have no effect with --reference {choice}: give --reference synced"
        )
    if choice == "synced" and config.ref_path and (new or adapter_path):
        raise ValueError(
            f"--reference synced follows the adapter, which --ref-path {config.ref_path} does not have: leave --ref-path out"
        )
    if config.sync_every < 1 or not 0 < config.sync_alpha <= 1:
        raise ValueError(
            f"--sync-every {config.sync_every} --sync-alpha {config.sync_alpha}: give at least 1 step, and a share above 0 and up to 1"
        )
    if adapter.lora_dropout:
        raise ValueError(
            f"--lora-dropout {adapter.lora_dropout} would part the policy from its reference, which agree at step 0: leave it out"
        )
    return choice


def open_reference(
    config: ReferenceConfig,
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    at: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    *,
    seed: int,
    **cache: Any,
) -> Reference:
    """The reference of a policy that was opened from `at` and `adapter` with `seed`. The policy's dropout is turned off for good.

    `cache` is what `cached` takes besides: max_tokens_per_micro, and as `folder` the cache's. ValueError for what has no effect or cannot be.
    """
    trained = resolve(at).adapter
    choice = choose(config, adapter, trained)
    device = str(next(model.parameters()).device)
    model.dropout = False
    model.eval()
    if choice == "adapter_off":
        return Reference(adapter_off(model))
    if choice == "cached" and config.ref_path is None:
        fresh = adapter.adapter != "none"
        logps = adapter_off(model) if fresh else still(model)
        key = [fingerprint(resolve(at).base, at.hub), trained and fingerprint(trained)]
    else:
        own = adapter if config.ref_path is None and choice == "synced" else AdapterConfig()
        copy = _second(config.ref_path, model, tokenizer, at, own, compute, device, seed)
        logps, key = still(copy), [fingerprint(config.ref_path or at.model_path, at.hub)]
    if choice == "cached":
        tokens = [[token.text, *token.pieces] for token in tokenizer.new_tokens]
        key = [*key, at.dtype, compute.quantize, device.partition(":")[0], tokens, at.model_args]
        folder = cache_folder(cache.pop("folder", "")) / "references"
        shape = {"packed": model.mode == "packed", "device": device}
        return Reference(
            table=lambda prepared, dress, depends: cached(
                logps, prepared, dress, [*key, depends], folder, **shape, **cache
            )
        )
    if choice == "synced":
        after_step, extra = synced(model, copy, config.sync_every, config.sync_alpha)
        return Reference(logps, None, after_step, extra)
    return Reference(logps)


def _second(
    path: str | None,
    policy: LanguageModel,
    tokenizer: ChatTokenizer,
    at: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    device: str,
    seed: int,
) -> LanguageModel:
    """A frozen model opened like the policy, or from `path`; both then run in the same mode."""
    if path is not None:
        at = dataclasses.replace(at, model_path=path, adapter_path=None)
        _check_vocabulary(resolve(at).base, tokenizer)
    bare = (adapter.adapter == "none" and resolve(at).adapter is None) and any(
        not p.requires_grad for p in policy.parameters()
    )  # the policy's base is then held rounded
    around = (lambda model: model.requires_grad_(False)) if bare else (lambda model: model)
    copy = load_model(at, adapter, compute, tokenizer, device, seed=seed, around=around)
    copy.requires_grad_(False).eval()
    copy.dropout = False
    if copy.mode != policy.mode:
        slower = max(copy.mode, policy.mode, key=("packed", "padded", "native").index)
        say(f"the reference runs {copy.mode}, the policy {policy.mode}: both run {slower}")
        for model in (copy, policy):
            model.set_mode(slower)
    return copy


def _check_vocabulary(folder: str, tokenizer: ChatTokenizer) -> None:
    mine, theirs = tokenizer.fast.get_vocab(), load_tokenizer(folder, TokenizerConfig()).get_vocab()
    declared = {token.text for token in tokenizer.new_tokens} | set(
        tokenizer.fast.all_special_tokens
    )
    odd = [t for t, i in theirs.items() if mine.get(t) != i] + [
        t for t in mine if t not in theirs and t not in declared
    ]
    if odd:
        raise ValueError(
            f"--ref-path {folder} has another vocabulary than the policy ({len(odd)} tokens differ, such as {odd[0]!r}), so its "
            "log-probabilities are of other tokens: give a model of the same family"
        )
