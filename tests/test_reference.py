"""References: DPO starts at ln 2 with each of them, numbers computed once are kept and resumed, a copy follows and survives a resume."""

import json
import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from judged import gradients, labelled_set, pair_set, recipe
from small import tiny

from ta import reference
from ta.builtin import models
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.loader import collate_pairs, labelled_collate, micro_batches, train_batches
from ta.data.micro import BatchConfig
from ta.folders import ModelConfig
from ta.model.adapters import AdapterConfig
from ta.model.load import ComputeConfig, load_model
from ta.reference import (
    Reference,
    ReferenceConfig,
    choose_reference,
    note_sync,
    open_reference,
    with_cached_reference,
)
from ta.training.loop import train
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.run_folder import LoopConfig, Run

LN2 = float(np.float32(math.log(2)))


@pytest.fixture(scope="module")
def tokenizer():
    return load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())


def opened(tokenizer, adapter=AdapterConfig(), **more):  # noqa: B008
    at = ModelConfig(**more)
    return load_model(at, adapter, ComputeConfig(), tokenizer), at


def frozen(model):
    """A reference that is another model."""
    return Reference("frozen", model.eval())


def learn(name="sigmoid"):
    """The step of recipes/dpo.py."""
    dpo = recipe("dpo")
    return partial(dpo.step, name, dpo.FLAGS[name])


def first_loss(model, ref, data, packed=True, budget=200, name="sigmoid"):
    before = lambda model, batches: ref.add_to(batches)
    model.train()
    packed = packed and model.packed
    return gradients(model, data, collate_pairs, learn(name), before, budget, packed)


@pytest.mark.parametrize("kind", ["adapter_off", "frozen", "cached", "synced"])
@pytest.mark.parametrize("lora", [True, False])
def test_training_starts_at_ln_2(tokenizer, tmp_path, kind, lora):
    if kind == "adapter_off" and not lora:
        pytest.skip("no adapter to turn off")
    adapter = AdapterConfig(adapter="lora", lora_rank=4) if lora else AdapterConfig()
    model, at = opened(tokenizer, adapter)
    ref = open_reference(ReferenceConfig(kind), model, tokenizer, at, adapter, ComputeConfig())
    config = BatchConfig(max_tokens_per_micro=200)
    made = pair_set()
    data = with_cached_reference(made, ref, collate_pairs, config, model.packed, str(tmp_path))
    assert (data.reference is not None) == (kind == "cached")
    start = first_loss(model, ref, data)
    assert start.loss == pytest.approx(LN2, abs=0 if kind != "cached" else 1e-6)
    assert max(g.abs().max() for g in start.grads.values()) > 0
    other = first_loss(
        model, frozen(tiny(seed=5)), pair_set()
    )  # guard: another reference starts elsewhere
    assert abs(other.loss - LN2) > 1e-3


def test_dropout_stays_off_beside_a_reference(tokenizer):
    noisy = tiny(resid_pdrop=0.3)
    copy = tiny(resid_pdrop=0.3).eval()
    assert first_loss(noisy, frozen(copy), pair_set()).loss != LN2  # guard
    noisy.dropout = False
    assert first_loss(noisy, frozen(copy), pair_set()).loss == LN2
    model, at = opened(tokenizer)
    open_reference(
        ReferenceConfig(), model, tokenizer, at, AdapterConfig(), ComputeConfig(), seed=0
    )
    assert not model.train().training


def test_adapter_off_is_the_base_also_when_the_adapter_has_learned(tokenizer, monkeypatch):
    adapter = AdapterConfig(adapter="lora", lora_rank=4)
    model, _ = opened(tokenizer, adapter)
    # peft's own way goes through all modules several times
    monkeypatch.setattr(model.inner, "get_model_status", None)
    base, _ = opened(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    data = pair_set()
    (batch,) = micro_batches(data, np.arange(13), 10_000, True, collate_pairs)
    sequences = batch.sequences
    assert torch.equal(
        Reference("adapter_off", model, True).logps(sequences), frozen(base).logps(sequences)
    )
    assert not torch.allclose(frozen(model).logps(sequences), frozen(base).logps(sequences))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


class Counted:
    """A reference that counts its passes and fails in one of them."""

    def __init__(self, model, fail_at=None):
        self.model, self.calls, self.fail_at = model.eval(), 0, fail_at

    def logprobs(self, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.model.logprobs(batch)


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_a_table_is_computed_once_and_resumed(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(reference, "PART", 4)
    data = pair_set() if kind == "pairs" else labelled_set()
    collate = collate_pairs if kind == "pairs" else labelled_collate(data, 0)
    config = BatchConfig(max_tokens_per_micro=60)

    def make(counted, key, folder=tmp_path / "cache", depends=None):
        ref = Reference("cached", counted, key=key)
        return with_cached_reference(data, ref, collate, config, True, str(folder), depends)

    model = tiny(dtype=torch.float64)
    whole = Counted(model)
    table = make(whole, ["a"], tmp_path / "other").reference
    assert table.shape == (13, 2) and table.dtype == torch.float64
    stopped = Counted(model, fail_at=whole.calls - 1)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, ["a"])
    resumed = Counted(model)
    assert torch.equal(make(resumed, ["a"]).reference, table)
    assert 0 < resumed.calls < whole.calls  # the parts that were there are kept
    again = Counted(model)
    assert torch.equal(make(again, ["a"]).reference, table) and again.calls == 0
    (file,) = tmp_path.glob("cache/**/*.safetensors")  # and the parts are gone
    for more in ({"key": ["b"]}, {"key": ["a"], "depends": ["seed", 1]}):
        other = Counted(model)
        make(other, **more)
        assert other.calls == whole.calls  # other settings, other numbers
    file.write_bytes(file.read_bytes()[:-9])
    assert torch.equal(make(again, ["a"]).reference, table)
    assert "is damaged" in capsys.readouterr().err and again.calls == whole.calls
    known = make(Counted(model, fail_at=1), ["a"])
    for i in range(13):  # each row is its own record's, whatever batch it was computed in
        batch = collate(data, np.array([i]), True)
        values = batch.both(frozen(model).logps)[0]
        torch.testing.assert_close(values, table[i], rtol=1e-10, atol=1e-12)
        assert torch.equal(collate(known, np.array([i]), True).reference, table[[i]])
    assert with_cached_reference(data, frozen(model), collate, config, True) is data


def synced(policy, copy, every, alpha):
    """A reference that follows the policy."""
    copy.requires_grad_(False)
    ref = Reference("synced", copy.eval(), every=every, alpha=alpha)
    reference._follow_policy(ref, policy)
    return ref


def run_synced(folder, every=2, alpha=0.5, steps=5, stop=None, resume=False):
    """A short run of DPO with a synced reference; -> (policy, copy)."""
    policy, copy = tiny(), tiny()
    policy.dropout = copy.dropout = False
    ref = synced(policy, copy, every, alpha)

    def before_step(done, micro_batches):
        if done + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        ref.follow(done)
        return ref.add_to(micro_batches)

    config = BatchConfig(steps=steps, batch_size=8, max_tokens_per_micro=200)
    batches = train_batches(pair_set(n=24), config, collate=collate_pairs)
    run, optim = Run(LoopConfig(out=str(folder), log_every=1, resume=resume)), OptimConfig(lr=1e-2)
    train(
        run,
        policy,
        batches,
        learn(),
        make_optimizer(policy, optim),
        optim,
        before_step=before_step,
        more_state=ref.state,
    )
    return policy, copy


def losses(folder):
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


def test_a_synced_reference_follows(tmp_path):
    policy, copy = tiny(seed=0), tiny(seed=1)
    before = [p.detach().clone() for p in copy.parameters()]
    ref = synced(policy, copy, every=2, alpha=0.25)
    ref.follow(0), ref.follow(1)
    assert all(torch.equal(a, b) for a, b in zip(before, copy.parameters(), strict=True))
    ref.follow(2)
    for old, ours, new in zip(before, policy.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(new, 0.25 * ours + 0.75 * old)
    assert len(ref.state) == len(before)
    # --weights bfloat16: of the policy alone
    held = [p.detach().clone() for p in copy.parameters()]
    ref = synced(policy, copy, every=1, alpha=1.0)
    policy.to(torch.bfloat16)
    ref.follow(1)
    for new, old, ours in zip(copy.parameters(), held, policy.parameters(), strict=True):
        assert new.dtype == old.dtype and torch.equal(new, ours.float())
    policy.float()
    with pytest.raises(ValueError, match="policy's shape"):
        synced(policy, tiny(n_embd=16), 1, 1.0)
    run_synced(tmp_path / "never", every=100)
    run_synced(tmp_path / "twice", every=2)
    run_synced(tmp_path / "always", every=1, alpha=1.0)
    never, twice, always = (losses(tmp_path / name) for name in ("never", "twice", "always"))
    assert (
        never[:2] == twice[:2] and never[2] != twice[2]
    )  # the effect starts after the second step
    assert always == pytest.approx(
        [math.log(2)] * 5, abs=1e-6
    )  # a reference that is always the policy


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_synced_reference_survives_a_resume(tmp_path, stop):
    whole, theirs = run_synced(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run_synced(tmp_path / "cut", stop=stop)
    policy, copy = run_synced(tmp_path / "cut", resume=True)
    for a, b in ((whole, policy), (theirs, copy)):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_another_vocabulary_is_an_error(tokenizer, tmp_path):
    model, at = opened(tokenizer)
    policy = (model, tokenizer, at, AdapterConfig(), ComputeConfig())
    models.write_tiny(tmp_path / "same", seed=3)
    models.write_tiny(tmp_path / "other", seed=3)
    text = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[10:12]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="another vocabulary than the policy \\(2 tokens differ"):
        open_reference(ReferenceConfig(ref_path=str(tmp_path / "other")), *policy)
    ref = open_reference(ReferenceConfig(ref_path=str(tmp_path / "same")), *policy)
    assert abs(first_loss(model, ref, pair_set()).loss - LN2) > 1e-4


def test_settings_that_cannot_be():
    lora, none = AdapterConfig(adapter="lora"), AdapterConfig()
    base, adapted = ModelConfig(), ModelConfig(adapter_path="a")
    assert choose_reference(ReferenceConfig(), base, lora) == "adapter_off"
    assert choose_reference(ReferenceConfig(), base, none) == "frozen"
    assert choose_reference(ReferenceConfig(ref_path="m"), base, lora) == "frozen"
    assert choose_reference(ReferenceConfig(), adapted, none) == "frozen"
    assert choose_reference(ReferenceConfig("adapter_off"), adapted, none) == "adapter_off"
    for config, adapter, words in (
        (ReferenceConfig("adapter_off"), none, "there is no adapter"),
        (ReferenceConfig("adapter_off", ref_path="m"), lora, "no second model"),
        (ReferenceConfig("frozen", sync_every=3), none, "no effect"),
        (ReferenceConfig("synced", ref_path="m"), lora, "leave --ref-path out"),
        (ReferenceConfig(), AdapterConfig(adapter="lora", lora_dropout=0.1), "--lora-dropout 0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_reference(config, base, adapter)
    with pytest.raises(ValueError, match="leave --ref-path out"):
        choose_reference(ReferenceConfig("synced", ref_path="m"), adapted, none)


def test_a_reference_that_never_follows_is_said(capsys):
    """It follows at the beginning of a step, so that the last update is before the last step."""
    for config, steps, said in (
        (ReferenceConfig("synced"), 100, True),
        (ReferenceConfig("synced", sync_every=100), 100, True),
        (ReferenceConfig("synced", sync_every=100), 101, False),
        (ReferenceConfig(), 100, False),
    ):
        note_sync(config, steps)
        assert ("never follows" in capsys.readouterr().err) == said


def test_a_share_of_nothing_is_refused(door):
    code, said = door("dpo", "--reference", "synced", "--sync-alpha", 0)
    assert code == 2 and "--sync-alpha 0.0: give a number above 0 to 1" in said
