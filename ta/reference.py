"""Reference log-probabilities of answers, with which a policy is compared.

The reference is the policy with its adapter off, a frozen copy, a table computed once before
training, or a copy that follows the policy. Letters: N sequences, P pairs of answers, n records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ta.chat.tokenizer import ChatTokenizer, load_tokenizer
from ta.data.batch import Batch, to_device
from ta.data.loader import Collate
from ta.data.micro import BatchConfig
from ta.data.prepare import Prepared
from ta.files import cache_folder, hash_json, writing
from ta.folders import ModelConfig, fingerprint, read_tensors, resolve, write_tensors
from ta.model.adapters import without_adapter
from ta.model.language_model import LanguageModel
from ta.model.load import load_model
from ta.model.logprobs import sequence_sums
from ta.model.settings import AdapterConfig, ComputeConfig, ReferenceConfig
from ta.parallel import gather_objects, rank, say
from ta.screen import progress
from ta.training.loop import by_record

Logps = Callable[[Batch], Tensor]  # -> (N,)

# records in each file of a table that is being computed
PART = 2048


@dataclass
class Reference:
    """An open reference; a cached one has already put its log-probabilities into the data."""

    kind: str
    # a copy, or the policy
    model: LanguageModel
    # whether it is the base under the model's adapter
    adapter_off: bool = False
    # JSON that decides the values of a cached reference
    key: Any = None
    # steps between two updates of a synced reference
    every: int = 0
    alpha: float = 1.0
    # (tensor of a synced reference, tensor of the policy)
    moving: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # tensors of a synced reference that a checkpoint must hold
    state: dict[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def of_new(self) -> Logps | None:
        """`logps` for sequences that come up in training; a cached reference has none."""
        return None if self.kind == "cached" else self.logps

    def add_to(self, batches: Iterable) -> list:
        """The batches with the reference's log-probabilities, unless they hold them already."""
        placed = [to_device(batch, self.device) for batch in batches]
        if self.kind == "cached":
            return placed
        return [batch._replace(reference=batch.both(self.logps)) for batch in placed]

    def token_logps(self, batch: Batch) -> Tensor:
        """(M,) log p of each learned token of a batch, without gradients."""
        off = without_adapter(self.model.inner) if self.adapter_off else nullcontext()
        with torch.no_grad(), off:
            return self.model.logprobs(batch)

    def logps(self, batch: Batch) -> Tensor:
        """(N,) their sum over each sequence."""
        return sequence_sums(self.token_logps(batch), batch.owners, len(batch.ends))

    def follow(self, done: int) -> None:
        """Move a synced reference towards the policy, where `done` is a multiple of `every`.

        TR-DPO, arXiv 2404.09656, eq. 5 and 6: a tensor of the reference becomes alpha * policy + (1
        - alpha) * reference.
        """
        if self.kind != "synced" or not done or done % self.every:
            return
        with torch.no_grad():
            for pair in self.moving:
                moved, policy = (x.to_local() if hasattr(x, "to_local") else x for x in pair)
                moved.lerp_(policy.to(moved.dtype), self.alpha)


def sequence_logps(model: LanguageModel, batch: Batch) -> Tensor:
    """(N,) the sum of log p over the learned tokens of each sequence."""
    return sequence_sums(model.logprobs(batch), batch.owners, len(batch.ends))


def count_learned(batch: Batch) -> Tensor:
    """(N,) the number of learned tokens of each sequence."""
    # bincount would wait for a GPU
    return sequence_sums(torch.ones_like(batch.weights), batch.owners, len(batch.ends))


def choose_reference(config: ReferenceConfig, model: ModelConfig, adapter: AdapterConfig) -> str:
    """The reference that "auto" stands for, or the one given; ValueError where it cannot work."""
    new, default = adapter.adapter != "none", ReferenceConfig()
    choice = config.reference
    if choice == "auto":
        choice = "adapter_off" if new and config.ref_path is None else "frozen"
    # a new one, or the trained one with which the run goes on
    adapted = new or resolve(model).adapter
    if choice == "adapter_off" and (config.ref_path or not adapted):
        reason = "there is no adapter"
        if config.ref_path:
            reason = f"it is no second model as --ref-path {config.ref_path} is"
        raise ValueError(f"--reference adapter_off: {reason}; give frozen")
    own = replace(config, reference=default.reference, ref_path=None)
    if choice != "synced" and own != default:
        raise ValueError(
            f"--sync-every and --sync-alpha have no effect with --reference {choice}: "
            "give --reference synced"
        )
    if choice == "synced" and config.ref_path and adapted:
        raise ValueError(
            f"--reference synced follows the adapter, which --ref-path {config.ref_path} does not "
            "have: leave --ref-path out"
        )
    if adapter.lora_dropout:
        raise ValueError(
            f"--lora-dropout {adapter.lora_dropout} would part the policy from its reference, "
            "which agree at step 0: leave it out"
        )
    return choice


def open_reference(
    config: ReferenceConfig,
    policy: LanguageModel,
    tokenizer: ChatTokenizer,
    model: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    seed: int = 0,
) -> Reference:
    """The reference of a policy that was loaded from `model`, `adapter` and `compute` with `seed`.

    The policy's dropout is turned off for good. ValueError for settings that have no effect or
    cannot work.
    """
    choice = choose_reference(config, model, adapter)
    sources = resolve(model)
    model = replace(model, model_path=sources.base, adapter_path=sources.adapter)
    device = str(policy.device)
    policy.dropout = False
    policy.eval()
    new = adapter.adapter != "none"
    # what the policy is at its start, without a second model
    own = choice == "adapter_off" or (choice == "cached" and config.ref_path is None)
    reference = Reference(choice, policy, device=device)
    reference.adapter_off = own and (new or choice == "adapter_off")
    if not own:
        if config.ref_path is not None:
            model = replace(model, model_path=config.ref_path, adapter_path=None)
            check_same_vocabulary("--ref-path", resolve(model).tokenizer, tokenizer)
        if choice != "synced" and not model.adapter_path:
            adapter = AdapterConfig()
        reference.model = _second_model(policy, tokenizer, model, adapter, compute, seed)
    if choice == "cached":
        start = None if new else model.adapter_path and fingerprint(model.adapter_path)
        tokens = [[token.text, *token.pieces] for token in tokenizer.new_tokens]
        key = [fingerprint(model.model_path, model.hub), *[start] * own, model.dtype]
        key += [compute.quantize, device.partition(":")[0], tokens, model.model_args]
        reference.key = key
    if choice == "synced":
        reference.every, reference.alpha = config.sync_every, config.sync_alpha
        _follow_policy(reference, policy)
    return reference


def _follow_policy(reference: Reference, policy: LanguageModel) -> None:
    """Pair the tensors of a synced reference with those of the policy that train.

    ValueError where their shapes differ.
    """
    copy = dict(reference.model.named_parameters())
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    differ = [n for n, p in trained.items() if n not in copy or copy[n].shape != p.shape]
    if differ:
        raise ValueError(
            f"a synced reference has the policy's shape, and this one's {differ[0]} is another: "
            "give --reference frozen"
        )
    reference.moving = [(copy[name], parameter) for name, parameter in trained.items()]
    reference.state = {f"reference/{name}": copy[name] for name in trained}


def _second_model(
    policy: LanguageModel,
    tokenizer: ChatTokenizer,
    model: ModelConfig,
    adapter: AdapterConfig,
    compute: ComputeConfig,
    seed: int,
) -> LanguageModel:
    """A frozen model of these settings; it and the policy then run in the same mode."""
    # where the policy's base is frozen it is held in half precision, and so must its copy be
    adapted = model.adapter_path or adapter.adapter != "none"
    bare = not adapted and any(not p.requires_grad for p in policy.parameters())
    device = str(policy.device)
    freeze = (lambda loaded: loaded.requires_grad_(False)) if bare else None
    copy = load_model(model, adapter, compute, tokenizer, device, seed=seed, around=freeze)
    copy.requires_grad_(False).eval()
    copy.dropout = False
    if copy.mode != policy.mode:
        slower = max(copy.mode, policy.mode, key=("packed", "padded", "native").index)
        say(f"the reference runs {copy.mode}, the policy {policy.mode}: both run {slower}")
        for each in (copy, policy):
            each.set_mode(slower)
    return copy


def check_same_vocabulary(flag: str, folder: str, tokenizer: ChatTokenizer) -> None:
    """ValueError where the tokenizer in `folder`, which `flag` named, gives other ids."""
    policy = tokenizer.fast.get_vocab()
    reference = load_tokenizer(folder).get_vocab()
    declared = {token.text for token in tokenizer.new_tokens}
    declared |= set(tokenizer.fast.all_special_tokens)
    differ = [t for t, i in reference.items() if policy.get(t) != i]
    differ += [t for t in policy if t not in reference and t not in declared]
    if differ:
        raise ValueError(
            f"{flag} {folder} has another vocabulary than the policy ({len(differ)} tokens "
            f"differ, such as {differ[0]!r}), so its log-probabilities are of other tokens: "
            "give a model of the same family"
        )


def with_cached_reference(
    prepared: Prepared | None,
    reference: Reference | None,
    collate: Collate,
    config: BatchConfig,
    packed: bool,
    cache_dir: str = "",
    depends: Any = None,
) -> Prepared | None:
    """The data with `reference` (n, 2), where the reference is a cached one; otherwise as given.

    The values are read from the cache, or computed once and kept there under the content of model
    and data. `depends` (JSON) names what else the batches depend on. A file is written after every
    PART records, so that a stopped run goes on from there. All processes take part.
    """
    if reference is None or reference.kind != "cached" or prepared is None:
        return prepared

    n, folder = len(prepared.origin), cache_folder(cache_dir) / "references"
    about = [[*reference.key, depends], prepared.info["fingerprint"]]
    name = hash_json([*about, Path(prepared.info.get("folder", "")).name, n])[:32]
    whole = folder / f"{name}.safetensors"
    table = _read_table(whole, n)
    if table is not None:
        say(f"reference log-probabilities of {n:,} records: from {whole}")
        return prepared._replace(reference=table)
    device, size, parts = reference.device, config.max_tokens_per_micro, []
    values = lambda batch: batch.both(reference.logps)  # (P, 2)
    bar = progress(n, "reference", "record", show=rank() == 0, delay=2, leave=False)
    for start in range(0, n, PART):
        records = np.arange(start, min(n, start + PART))
        path = folder / f"{name}-{start}.safetensors"
        part = _read_table(path, len(records))
        if part is None:
            part = by_record(values, prepared, records, size, packed, device, collate)
            if rank() == 0:
                _write_table(path, part)
        parts.append(part)
        bar.update(len(records))
    bar.close()
    table = torch.cat(parts)
    if rank() == 0:
        _write_table(whole, table)
        for path in folder.glob(f"{name}-*.safetensors"):
            path.unlink()
    return prepared._replace(reference=table)


def _read_table(path: Path, n: int) -> Tensor | None:
    """The (n, 2) table in a file, which rank 0 reads for all; None where there is none.

    A damaged file is reported on the screen and gives None too.
    """
    table, damage = None, ""
    if rank() == 0 and path.exists():
        try:
            table = read_tensors(path).get("logps")
        except ValueError as error:
            damage = f"is damaged ({error})"
        else:
            if table is None or table.shape != (n, 2) or not table.isfinite().all():
                table, damage = None, f"does not hold {n} x 2 finite numbers"
    if damage:
        say(f"{path} {damage}: computing it again")
    return gather_objects(table)[0]


def _write_table(path: Path, table: Tensor) -> None:
    with writing(path) as aside:
        write_tensors({"logps": table}, aside)


def note_sync(config: ReferenceConfig, steps: int) -> None:
    """Print a note where a run of `steps` steps never updates its synced reference."""
    if config.reference == "synced" and config.sync_every >= steps:
        say(
            f"note: --sync-every {config.sync_every} is not below the {steps} steps of this run, "
            "so the reference never follows"
        )
