"""The root module around a language model: its methods compute from a Batch what a loss needs.

Inside these methods sharded weights are whole. Letters: B rows, T columns, N sequences, M learned
targets, V vocabulary, D model width, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ta.data.batch import Batch, lay_out, to_device
from ta.folders import copy_media
from ta.losses import at_least_float
from ta.model.adapters import base_model, is_prompt_learning
from ta.model.attention import Documents, native_attention, own_attention, pass_documents_down
from ta.model.logprobs import (
    Divergence,
    Head,
    cross_entropy_sum,
    divergences,
    token_logprobs,
)
from ta.model.new_rows import token_table
from ta.parallel import rank, world

Mode = Literal["packed", "padded", "native"]


class LanguageModel(nn.Module):
    """A root module around a transformers model, with or without adapter.

    Weights may be sharded: they are whole only inside the methods named in METHODS, which
    `parallel.shard` registers. These methods must not call one another.
    """

    METHODS = ("loss", "logprobs", "scores", "hidden", "divergences", "inside")

    # for the user: why the model does not run packed
    note = ""
    # whether ids are read beside embeddings, which then cannot be given in half precision
    reads_ids = False
    # whether the backward pass computes the blocks again
    recomputed = False
    # whether the elementwise operations of the head are compiled
    compiled = False
    # the model's error in a mode that it cannot run
    refusal = ""
    # holds the encoders and projectors that the model was made with, and that it keeps
    media_folder: str | None = None
    # where False, train() leaves dropout off: a reference must then agree to the last bit
    dropout = True
    # the model is softmax(logits / temperature), in training and in generation
    temperature = 1.0
    # of exported weights; None: as they are
    export_dtype: torch.dtype | None = None

    def __init__(self, inner: nn.Module, mode: Mode, autocast: torch.dtype | None = None):
        super().__init__()
        self.inner, self.mode, self.autocast = inner, mode, autocast
        self.half_precision = autocast is not None

    def train(self, mode: bool = True) -> LanguageModel:
        """As in torch, but dropout stays off where `dropout` is False."""
        return super().train(mode and self.dropout)

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of -log p over learned targets, a float32 scalar."""
        with self._arithmetic():
            batch, embeds = self._inputs(batch)
            if self.mode == "native":
                logps = self._native_logprobs(batch, embeds)
                return -(logps * batch.weights.to(logps)).sum()
            learned, head = self._predictions(batch, embeds)
            return cross_entropy_sum(learned, head, batch.targets, batch.weights)

    def logprobs(self, batch: Batch) -> Tensor:
        """log p of each learned target, (M,)."""
        with self._arithmetic():
            batch, embeds = self._inputs(batch)
            if self.mode == "native":
                return self._native_logprobs(batch, embeds)
            return token_logprobs(*self._predictions(batch, embeds), batch.targets)

    def predictions(self, batch: Batch) -> tuple[Tensor, Head]:
        """(hidden states (M, D) of learned targets, the head that makes logits of them).

        The model is not sharded, and not in native mode.
        """
        with self._arithmetic():
            return self._predictions(*self._inputs(batch))

    def divergences(
        self, batch: Batch, teacher: tuple[Tensor, Head], kind: Divergence, beta: float = 0.5
    ) -> Tensor:
        """(M,) how far this model is from a teacher's `predictions` at each learned target."""
        with self._arithmetic():
            return divergences(*self._predictions(*self._inputs(batch)), *teacher, kind, beta)

    def scores(self, batch: Batch) -> Tensor:
        """The scores of the classification head for each sequence, (N, C).

        A causal model's head reads the last token, an encoder's what its kind reads.
        """
        if self.generates:
            raise ValueError("a language model has no scores: load it with num_labels")
        with self._arithmetic():
            batch, embeds = self._inputs(batch)
            if is_encoder_classifier(self.base):
                inputs = {"input_ids": batch.tokens, "attention_mask": _real(batch)}
                scores = self.inner(**inputs).logits[: len(batch.ends)]
            else:
                last = self._hidden(batch, embeds).flatten(0, 1)[batch.ends]  # (N, D)
                scores = _in_float(self.base.score, last)
            return at_least_float(scores)

    def inside(self, work: Callable[[], None]) -> None:
        """Do work of many passes as one, on weights that are held whole.

        Sharded blocks then leave other streams alone, as recorded passes must.
        """
        work()

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden states before the head, (B, T, D)."""
        with self._arithmetic():
            batch, embeds = self._inputs(batch)
            return self._hidden(batch, embeds)[:, : batch.tokens.shape[1]]

    @property
    def base(self) -> nn.Module:
        """The transformers model inside adapters."""
        return base_model(self.inner)

    @property
    def device(self) -> torch.device:
        """Where the weights of this process are."""
        return next(self.parameters()).device

    @property
    def packed(self) -> bool:
        """Whether sequences stand one after another in one row; otherwise each has a padded row."""
        return self.mode == "packed"

    @property
    def heads(self) -> int:
        """Query heads of a block's attention."""
        return self.base.config.get_text_config().num_attention_heads

    @property
    def generates(self) -> bool:
        """Whether this is a language model, not a classifier."""
        return self.base.get_output_embeddings() is not None

    def set_mode(self, mode: Mode) -> LanguageModel:
        """Choose how batches are run; "native" sets the model's own attention again."""
        self.mode = mode
        if mode == "native":
            self.base.set_attn_implementation(native_attention(self.base))
        return self

    def save_parts(self, folder: Path | None) -> None:
        """Write what belongs to the model beside its weights into an export's folder.

        Every process calls this; rank 0 is given the folder.
        """
        if rank() == 0 and self.media_folder:
            copy_media(self.media_folder, folder)

    def _arithmetic(self) -> torch.autocast:
        kind, dtype = self.device.type, self.autocast
        # each weight is cast once a pass, so a cache would only keep every copy alive
        return torch.autocast(kind, dtype, dtype is not None, cache_enabled=False)

    def _inputs(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """The batch, and embeddings (B, T, D) that replace those of its tokens, or None."""
        return batch, None

    def _hidden(self, batch: Batch, embeds: Tensor | None) -> Tensor:
        """The last hidden states (B, T, D); a row with cuts has as many columns as they say."""
        base = self.base
        tokens, positions = batch.tokens, batch.positions
        lengths, prefixes = batch.lengths, batch.prefixes
        cuts = None if self.mode == "native" else batch.cuts
        parts = batch.part[1]
        if parts > 1:
            rest = tokens.shape[1] * parts - sum(lengths)
            lengths = (*lengths, rest) if rest else lengths
        elif cuts is not None and (rest := cuts.columns - tokens.shape[1]):
            tokens, positions = F.pad(tokens, (0, rest)), F.pad(positions, (0, rest))
            embeds = F.pad(embeds, (0, 0, 0, rest)) if embeds is not None else None
            lengths, prefixes = (*(lengths or (1,)), rest), (*prefixes, 0) if prefixes else ()
        if self.autocast is not None and not self.reads_ids:
            # the residual stream runs in half precision too, as on sharded models: half the traffic
            embeds = base.get_input_embeddings()(tokens) if embeds is None else embeds
            embeds = embeds.to(self.autocast)
        inputs = {"input_ids": tokens} if embeds is None else {"inputs_embeds": embeds}
        if self.mode == "native":
            inputs["attention_mask"] = _real(batch)
        else:
            inputs["documents"] = Documents(lengths, prefixes, cuts, parts)
        return base.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state

    def _predictions(self, batch: Batch, embeds: Tensor | None) -> tuple[Tensor, Head]:
        """`predictions` of a batch and the embeddings of its tokens."""
        assert self.mode != "native", "the head cannot be separated"
        return self._hidden(batch, embeds).flatten(0, 1)[batch.learned], self._head()

    def _head(self) -> Head:
        if not self.generates:
            raise ValueError("a classifier has no log-probabilities: load it without num_labels")
        layer = self.base.get_output_embeddings()
        config = self.base.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None) or 1
        scale = getattr(config, "logit_scale", None) or 1 / divisor
        bias = getattr(layer, "bias", None)
        if bias is None and hasattr(layer, "token_adapter"):
            bias = layer.token_adapter.base_layer.bias
        cap = getattr(config, "final_logit_softcapping", None)
        scale, cap = scale / self.temperature, cap and cap / self.temperature
        return Head(layer.weight, bias, scale, cap, self.compiled)

    def _native_logprobs(self, batch: Batch, embeds: Tensor | None) -> Tensor:
        """log p of each learned target, (M,), from all logits of padded rows.

        This is for models and adapters whose head cannot be separated. Virtual tokens stand in
        front; their logits are dropped.
        """
        inputs = {"input_ids": batch.tokens} if embeds is None else {"inputs_embeds": embeds}
        logits = self.inner(**inputs, attention_mask=_real(batch), use_cache=False).logits
        virtual = logits.shape[1] - batch.tokens.shape[1]
        learned = logits[:, virtual:].flatten(0, 1)[batch.learned]
        logits = at_least_float(learned) / self.temperature
        return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def _in_float(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a head gives of hidden states, in at least float32: half precision would make close
    scores equal.
    """
    parameters = {n: p for n, p in head.named_parameters() if p.is_floating_point()}
    exact = {name: at_least_float(parameter) for name, parameter in parameters.items()}
    with torch.autocast(hidden.device.type, enabled=False):
        return functional_call(head, exact, (at_least_float(hidden),))


def _real(batch: Batch) -> Tensor:
    """(B, T) int64 ones at the real tokens of right-padded rows."""
    columns, device = batch.tokens.shape[1], batch.tokens.device
    lengths = to_device(torch.tensor(batch.lengths or (columns,)), device)
    return (torch.arange(columns, device=device) < lengths[:, None]).long()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; the modules that trained before do so after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def is_encoder_classifier(model) -> bool:
    """Whether a model is an encoder of text, such as BERT, with a head of scores.

    Its tokens see each other both ways, and its head is its own.
    """
    return hasattr(model, "classifier") and not (
        hasattr(model, "score") or model.config.is_encoder_decoder
    )


def wrap(
    model, packing: bool = True, autocast: torch.dtype | None = None
) -> tuple[LanguageModel, str]:
    """LanguageModel(model) in the fastest mode that keeps the model's own results, and a note.

    Packed rows are tried first, then padded rows, then the model's own attention and logits. A mode
    passes where log-probabilities or scores agree with those of the model's own forward pass,
    without dropout. The note is for the user and empty where packed rows work or were not asked
    for.
    """
    with evaluating(model):
        return _fastest(model, packing, autocast)


def _fastest(model, packing: bool, autocast: torch.dtype | None) -> tuple[LanguageModel, str]:
    """As `wrap`, for a model in evaluation mode."""
    base = base_model(model)
    wrapper = LanguageModel(model, "packed" if packing else "padded", autocast)
    if autocast is not None and world() == 1:
        # sharded blocks compute in bfloat16 without autocast
        keep_input_dtype(model)
    pass_documents_down(model)
    # weights of few bits round by the other contents of the batch, half precision everywhere
    rounded = getattr(base, "is_quantized", False) or base.dtype in (torch.bfloat16, torch.float16)
    # Full precision shows whether documents see each other: a result is then off by more than
    # 2e-3. In half precision rounding alone may reach some tenths in a deep model.
    exact = 0.5 if rounded else 2e-3
    reason = ""
    if is_prompt_learning(model):
        reason = "prompt learning puts virtual tokens in front"
    elif hasattr(base.get_output_embeddings(), "lora_A"):
        # at its start it changes nothing, so that no trial shows it
        reason = "LoRA on the head is no matrix"
    if reason:
        check_padding(wrapper.set_mode("native"), exact)
        return wrapper, f"{reason}: padded batches and the model's own logits are used"
    if is_encoder_classifier(base):
        check_padding(wrapper.set_mode("native"), exact)
        note = "an encoder's tokens see each other both ways: batches are padded"
        return wrapper, note
    if not wrapper.generates and not hasattr(base, "score"):
        raise ValueError(
            f"{type(base).__name__} has its head in none of the places known here (score, "
            "classifier): give a model of another kind"
        )
    trials = [(None, exact)]
    if autocast is not None:
        trials.append((autocast, 0.5))
        wrapper.reads_ids = bool(refused_embeddings(wrapper))
    for mode in ("packed", "padded") if packing else ("padded",):
        wrapper.mode = mode
        for arithmetic, limit in trials:
            wrapper.autocast = arithmetic
            if (gap := self_check(wrapper)) >= limit:
                break
        else:
            reason = "packed documents would see each other, or not their shared prompt"
            if wrapper.refusal:
                reason = f"packed documents are refused ({wrapper.refusal})"
            padded = packing and mode == "padded"
            return wrapper, f"{reason}: batches are padded" if padded else ""
    wrapper.autocast = autocast
    reason = f"hidden states are off by {gap:.2g}"
    check_padding(wrapper.set_mode("native"), exact)
    if wrapper.refusal:
        reason = f"batches without its own attention are refused ({wrapper.refusal})"
    note = f"{reason}: padded batches, the model's own attention and logits are used"
    return wrapper, note


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) * (weight + offset) in one kernel and in x's own type.

    The weight is that of the module which this one replaces.
    """

    def __init__(self, weight: nn.Parameter, eps: float, offset: float):
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D); the kernel sums the squares in float32."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight + self.offset if self.offset else self.weight
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


class OutsideAutocast:
    """True where autocast is off: layers of an adapter must then widen their input themselves."""

    def __bool__(self) -> bool:
        return not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"))


def keep_input_dtype(model: nn.Module) -> None:
    """Under autocast, keep the input's type in norms and in the layers of adapters, in place.

    Without this a norm's float32 weight would widen its output, and peft all inputs of its layers.
    A norm is replaced where a probe in float32 shows that one kernel computes the same values.
    """
    for parent in list(model.modules()):
        if hasattr(parent, "cast_input_dtype_enabled"):
            parent.cast_input_dtype_enabled = OutsideAutocast()
        for name, module in parent.named_children():
            if (norm := _as_one_kernel(module)) is not None:
                setattr(parent, name, norm)


@torch.no_grad()
def _as_one_kernel(module: nn.Module) -> RootMeanSquareNorm | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "norm" not in type(module).__name__.lower() or eps is None:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        # it also takes a gate, perhaps
        return None
    if isinstance(module, RootMeanSquareNorm) or [n for n, _ in module.named_parameters()] != [
        "weight"
    ]:
        return None
    weight = module.weight
    if weight.dim() != 1 or weight.dtype != torch.float32 or weight.is_meta:
        return None
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    # small numbers show the epsilon
    x[1] *= 1e-3
    for offset in (0.0, 1.0):
        norm = RootMeanSquareNorm(weight, eps, offset).train(module.training)
        if torch.allclose(norm(x), module(x), rtol=1e-4, atol=1e-6):
            return norm
    return None


@contextmanager
def _naming_refusals(prefix: str = "") -> Iterator[None]:
    """ValueError, in one line, for what a model's own code raises on a batch.

    Errors that say nothing about the model stay as they are.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(prefix + said) from error


@torch.no_grad()
def check_runs(wrapper: LanguageModel) -> None:
    """ValueError where a model's own forward pass fails too, with its error."""
    table = token_table(wrapper.base)
    ids = torch.arange(7, device=table.device) % len(table)
    prefix = f"the model does not run on {ids.device.type}: "
    with _naming_refusals(prefix), wrapper._arithmetic():
        (_logps_alone if wrapper.generates else _read_alone)(wrapper, ids)


@torch.no_grad()
def refused_embeddings(wrapper: LanguageModel) -> str:
    """Why a model needs the ids of its tokens beside their embeddings, or nothing.

    Its logits for the embeddings alone are other ones, or it takes none but those of its table.
    """
    base, name = wrapper.base, type(wrapper.base).__name__
    # positions of RoBERTa and its kind leave padding out
    padding = getattr(base.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[i for i in range(8) if i != padding]], device=token_table(base).device)
    embeds = base.get_input_embeddings()(ids)
    try:
        with _naming_refusals(), wrapper._arithmetic(), own_attention(base):
            by_ids = base(input_ids=ids, use_cache=False).logits
            by_embeds = base(inputs_embeds=embeds, use_cache=False).logits
            # some look the ids up in the table, where this is not
            base(inputs_embeds=embeds.mean(1, keepdim=True), use_cache=False)
    except ValueError as error:
        return f"{name} takes no embeddings ({error})"
    same = torch.allclose(by_embeds, by_ids, rtol=1e-2, atol=1e-3, equal_nan=True)
    return "" if same else f"{name} reads token ids beside their embeddings"


@torch.no_grad()
def check_padding(wrapper: LanguageModel, limit: float) -> None:
    """ValueError where a model does not run, or gives other values of a document beside a longer
    one, with its padding; `limit` bounds their difference as a share.
    """
    table = token_table(wrapper.base)
    documents = [np.arange(n) % len(table) for n in (11, 6)]
    read = wrapper.logprobs if wrapper.generates else wrapper.scores
    precision, wrapper.autocast = wrapper.autocast, None
    with _naming_refusals(f"the model does not run on {table.device.type}: "):
        together, *alone = (
            read(to_device(lay_out(some, [np.ones(len(x)) for x in some], False), table.device))
            for some in (documents, documents[:1], documents[1:])
        )
    wrapper.autocast, alone = precision, torch.cat(alone)
    if not (together - alone).abs().max() < limit * alone.abs().max():
        raise ValueError(
            f"{type(wrapper.base).__name__} gives other values of a document beside a longer one, "
            "as if padding were text: give a model of another kind"
        )


@torch.no_grad()
def self_check(wrapper) -> float:
    """The greatest difference between documents in a batch, two with one prompt, and each alone.

    It compares what the head reads (the length of the difference over its own), and of a language
    model log p (nats), with the model's own forward pass. The former shows more where a model is
    new and sure of nothing. It is inf where the model refuses such a batch; `wrapper.refusal` is
    then its error.

    torch.OutOfMemoryError, torch.AcceleratorError, and ImportError from a torch without the kernel
    for many documents, are raised: they say nothing about the model.
    """
    base, table = wrapper.base, token_table(wrapper.base)
    device = table.device
    generator = np.random.default_rng(0)
    first, second, third = (generator.integers(0, len(table), n) for n in (11, 7, 6))
    # the third goes on from the beginning of the second, which lies there once if packed
    documents = [first, second, np.concatenate([second[:4], third])]
    weights = [np.ones(len(document), np.float32) for document in documents]
    packed = wrapper.mode == "packed"
    batch = to_device(lay_out(documents, weights, packed, [0, 0, 4] if packed else ()), device)
    try:
        with _naming_refusals():
            if wrapper.generates:
                read, head = wrapper.predictions(batch)
                logps = token_logprobs(read, head, batch.targets)
            else:
                read = wrapper.hidden(batch).flatten(0, 1)[batch.ends]
    except ValueError as error:
        wrapper.refusal = str(error)
        return float("inf")
    with wrapper._arithmetic(), own_attention(base):
        ids = [torch.tensor(document, device=device) for document in documents]
        alone = torch.cat([_read_alone(wrapper, document) for document in ids])
        gaps = (read.float() - alone).norm(dim=-1) / alone.norm(dim=-1)
        if wrapper.generates:
            own = torch.cat([_logps_alone(wrapper, document) for document in ids])
            gaps = torch.cat([gaps, (logps - own).abs()])
    gap = gaps.max().item()
    return gap if gap == gap else float("inf")


def _read_alone(wrapper: LanguageModel, ids: Tensor) -> Tensor:
    """The last hidden states of one document (T,) that the head reads, by the model's own pass.

    They are those that predict its tokens (T - 1, D), or a classifier's last one (1, D).
    """
    body = wrapper.base.base_model
    hidden = body(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()  # (T, D)
    return hidden[:-1] if wrapper.generates else hidden[-1:]


def _logps_alone(wrapper: LanguageModel, ids: Tensor) -> Tensor:
    """log p (T - 1,) of the tokens of one document (T,) after its first, by the model itself."""
    logits = wrapper.inner(input_ids=ids[None], use_cache=False).logits[0]  # (T, V)
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
