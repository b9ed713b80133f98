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
from ta.data.answer_batches import labelled, pairs

from ta import reference, reference_table
from ta.builtin import models
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.data.loader import training_feed
from ta.folders import ModelConfig
from ta.losses import choose
from ta.model.adapters import AdapterConfig
from ta.model.load import ComputeConfig, load_model
from ta.reference import (
    Reference,
    ReferenceConfig,
    adapter_off,
    dressed,
    open_reference,
    still,
    synced,
    with_reference,
)
from ta.training.loop import LoopConfig, train
from ta.training.optim import OptimConfig

LN2 = float(np.float32(math.log(2)))


@pytest.fixture(scope="module")
def tokenizer():
    return load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())


def opened(tokenizer, adapter=AdapterConfig(), **more):  # noqa: B008
    at = ModelConfig(**more)
    return load_model(at, adapter, ComputeConfig(), tokenizer), at


def first_loss(model, ref, data, packed=True, budget=200, name="sigmoid"):
    dpo = recipe("dpo")
    before = lambda model, batches: with_reference(ref, batches)
    model.train()
    return gradients(
        model,
        data,
        dressed(ref, data, pairs(data)),
        partial(dpo.step, choose(name)),
        before,
        budget,
        packed and model.mode == "packed",
    )


@pytest.mark.parametrize("kind", ["adapter_off", "frozen", "cached", "synced"])
@pytest.mark.parametrize("lora", [True, False])
def test_training_starts_at_ln_2(tokenizer, tmp_path, kind, lora):
    if kind == "adapter_off" and not lora:
        pytest.skip("no adapter to turn off")
    adapter = AdapterConfig(adapter="lora", lora_rank=4) if lora else AdapterConfig()
    model, at = opened(tokenizer, adapter)
    ref = open_reference(
        ReferenceConfig(kind),
        model,
        tokenizer,
        at,
        adapter,
        ComputeConfig(),
        seed=0,
        max_tokens_per_micro=200,
        folder=str(tmp_path),
    )
    start = first_loss(model, ref, pair_set())
    assert start.loss == pytest.approx(LN2, abs=0 if kind != "cached" else 1e-6)
    assert max(g.abs().max() for g in start.grads.values()) > 0
    other = first_loss(
        model, Reference(still(tiny(seed=5).eval())), pair_set()
    )  # guard: another reference starts elsewhere
    assert abs(other.loss - LN2) > 1e-3


def test_dropout_stays_off_beside_a_reference(tokenizer):
    noisy = tiny(resid_pdrop=0.3)
    copy = tiny(resid_pdrop=0.3).eval()
    assert first_loss(noisy, Reference(still(copy)), pair_set()).loss != LN2  # guard
    noisy.dropout = False
    assert first_loss(noisy, Reference(still(copy)), pair_set()).loss == LN2
    model, at = opened(tokenizer)
    open_reference(
        ReferenceConfig(), model, tokenizer, at, AdapterConfig(), ComputeConfig(), seed=0
    )
    assert not model.train().training


def test_adapter_off_is_the_base_also_when_the_adapter_has_learned(tokenizer):
    adapter = AdapterConfig(adapter="lora", lora_rank=4)
    model, _ = opened(tokenizer, adapter)
    base, _ = opened(tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    data = pair_set()
    dress = pairs(data)
    from ta.data.loader import micro_batches

    (batch,) = micro_batches(data, np.arange(13), 10_000, True, dress)
    assert torch.equal(adapter_off(model)(batch.seqs), still(base)(batch.seqs))
    assert not torch.allclose(still(model)(batch.seqs), still(base)(batch.seqs))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)


class Counted:
    """A reference that counts its passes and fails in one of them."""

    def __init__(self, model, fail_at=None):
        self.logps, self.calls, self.fail_at = still(model.eval()), 0, fail_at

    def __call__(self, batch):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.logps(batch)


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_a_table_is_computed_once_and_resumed(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(reference_table, "PART", 4)
    data = pair_set() if kind == "pairs" else labelled_set()
    dress = pairs(data) if kind == "pairs" else labelled(data, 0)
    make = partial(
        reference_table.cached, folder=tmp_path, max_tokens_per_micro=60, packed=True, device="cpu"
    )
    model = tiny(dtype=torch.float64)
    whole = Counted(model)
    table = make(whole, data, dress, ["a"], folder=tmp_path / "other")
    assert table.shape == (13, 2) and table.dtype == torch.float64
    stopped = Counted(model, fail_at=whole.calls - 1)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, data, dress, ["a"])
    resumed = Counted(model)
    assert torch.equal(make(resumed, data, dress, ["a"]), table)
    assert 0 < resumed.calls < whole.calls  # the parts that were there are kept
    again = Counted(model)
    assert torch.equal(make(again, data, dress, ["a"]), table) and again.calls == 0
    (file,) = tmp_path.glob("*.safetensors")  # and the parts are gone
    make(again, data, dress, ["b"])
    assert again.calls == whole.calls  # other settings, other numbers
    file.write_bytes(file.read_bytes()[:-9])
    assert (
        torch.equal(make(again, data, dress, ["a"]), table)
        and "is damaged" in capsys.readouterr().err
    )
    for i in range(13):  # each row is its own record's, whatever batch it was computed in
        from ta.data.loader import lay_records

        batch = dress(lay_records(data, [i], True), np.array([i]))
        torch.testing.assert_close(batch.both(still(model))[0], table[i], rtol=1e-10, atol=1e-12)
        filled = dressed(Reference(table=lambda *_: table), data, dress)(
            lay_records(data, [i], True), np.array([i])
        )
        assert torch.equal(filled.ref, table[[i]])


def run_synced(folder, every=2, alpha=0.5, steps=5, stop=None, resume=False):
    """A short run of DPO with a synced reference; -> (policy, copy)."""
    dpo, data = recipe("dpo"), pair_set(n=24)
    policy, copy = tiny(), tiny().requires_grad_(False).eval()
    policy.dropout = copy.dropout = False
    follow, extra = synced(policy, copy, every, alpha)
    ref = Reference(still(copy))

    def after_step(done):
        follow(done)
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    folder.mkdir(exist_ok=True)
    feed = training_feed(
        data,
        batch_size=8,
        max_tokens_per_micro=200,
        seed=0,
        steps=steps,
        epochs=1,
        dress=pairs(data),
    )
    before = lambda model, batches: with_reference(ref, batches)
    loop = LoopConfig(out=str(folder), log_every=1, resume=resume)
    train(
        policy,
        feed,
        partial(dpo.step, choose("sigmoid")),
        loop,
        OptimConfig(lr=1e-2),
        before_step=before,
        after_step=after_step,
        extra=extra,
    )
    return policy, copy


def losses(folder):
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


def test_a_synced_reference_follows(tmp_path):
    policy, copy = tiny(seed=0), tiny(seed=1)
    before = [p.detach().clone() for p in copy.parameters()]
    follow, extra = synced(policy, copy, every=2, alpha=0.25)
    follow(1)
    assert all(torch.equal(a, b) for a, b in zip(before, copy.parameters(), strict=True))
    follow(2)
    for old, ours, new in zip(before, policy.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(new, 0.25 * ours + 0.75 * old)
    assert len(extra) == len(before)
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
    models.write_tiny(tmp_path / "same", seed=3)
    models.write_tiny(tmp_path / "other", seed=3)
    text = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[10:12]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="another vocabulary than the policy \\(2 tokens differ"):
        open_reference(
            ReferenceConfig(ref_path=str(tmp_path / "other")),
            model,
            tokenizer,
            at,
            AdapterConfig(),
            ComputeConfig(),
            seed=0,
        )
    ref = open_reference(
        ReferenceConfig(ref_path=str(tmp_path / "same")),
        model,
        tokenizer,
        at,
        AdapterConfig(),
        ComputeConfig(),
        seed=0,
    )
    assert abs(first_loss(model, ref, pair_set()).loss - LN2) > 1e-4


def test_settings_that_cannot_be():
    lora, none = AdapterConfig(adapter="lora"), AdapterConfig()
    assert (
        reference.choose(ReferenceConfig(), lora) == "adapter_off"
        and reference.choose(ReferenceConfig(), none) == "frozen"
    )
    assert reference.choose(ReferenceConfig(ref_path="m"), lora) == "frozen"
    assert reference.choose(ReferenceConfig(), AdapterConfig(), "a") == "frozen"
    for config, adapter, words in (
        (ReferenceConfig("adapter_off"), none, "there is no adapter"),
        (ReferenceConfig("adapter_off", ref_path="m"), lora, "no second model"),
        (ReferenceConfig("frozen", sync_every=3), none, "no effect"),
        (ReferenceConfig("synced", sync_alpha=0), none, "share above 0"),
        (ReferenceConfig("synced", ref_path="m"), lora, "leave --ref-path out"),
        (ReferenceConfig(), AdapterConfig(adapter="lora", lora_dropout=0.1), "--lora-dropout 0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            reference.choose(config, adapter)
    assert "never follows" in reference.never_synced(
        ReferenceConfig("synced"), 100
    ) and not reference.never_synced(ReferenceConfig(), 100)
