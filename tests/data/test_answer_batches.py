"""Batches of pairs, labelled answers and classes: partners never match, margins arrive, results do not depend on how records are cut."""

import dataclasses
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from judged import agree, gradients, labelled_set, pair_set, recipe
from small import prepared, tiny

from ta.data.answer_batches import classes, first_learned, labelled, mismatch, pairs, partners
from ta.data.prepare import lengths, sequence
from ta.losses import PREFERENCE_LOSSES, choose
from ta.reference import Reference, still, with_reference

WAYS = [
    (40, True),
    (130, True),
    (10_000, True),
    (60, False),
    (10_000, False),
]  # token budget, packed


@pytest.fixture(scope="module")
def policy():
    model = tiny(dtype=torch.float64)
    model.dropout = False
    return model


@pytest.fixture(scope="module")
def reference():
    return Reference(still(tiny(seed=1, dtype=torch.float64).eval()))


def preference(name, reference, data, **settings):
    """What gradients() needs of recipes/dpo.py for the loss `name`."""
    dpo, loss = recipe("dpo"), choose(name, **settings)
    before = partial(
        dpo.with_kl if "kl_chosen" in loss.inputs else lambda r, m, b: with_reference(r, b),
        reference,
    )
    return {"dress": pairs(data), "step": partial(dpo.step, loss), "before": before}


def test_the_recipe_offers_every_loss_and_setting():
    dpo = recipe("dpo")
    assert all(
        re.search(rf"\b{name}\b", Path(dpo.__file__).read_text()) for name in PREFERENCE_LOSSES
    ), "--help names them"
    settings = {name for loss in PREFERENCE_LOSSES for name in choose(loss).settings}
    assert settings <= {field.name for field in dataclasses.fields(dpo.Dpo)}


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_preferences_do_not_depend_on_the_cut(policy, reference, name):
    data = pair_set(longest=24)
    runs = [
        gradients(policy, data, **preference(name, reference, data), budget=b, packed=p)
        for b, p in WAYS
    ]
    assert runs[0].batches > 5 and runs[2].batches == 1 and all(math.isfinite(r.loss) for r in runs)
    for other in runs[1:]:
        agree(runs[0], other)


def test_kto_does_not_depend_on_the_cut(policy, reference):
    kto, data = recipe("kto"), labelled_set(longest=24)
    config = kto.Kto(beta=0.3, desirable_weight=1.5)
    parts = {
        "dress": labelled(data, 0),
        "step": partial(kto.step, config),
        "before": partial(kto.with_kl, reference),
    }
    runs = [gradients(policy, data, **parts, budget=b, packed=p) for b, p in WAYS]
    assert runs[0].batches > 3 and runs[2].batches == 1
    for other in runs[1:]:
        agree(runs[0], other)


def test_the_reference_point_is_over_all_micro_batches(policy, reference):
    """The same by hand: mean log-ratio of every mismatched answer, each alone; a seed with a positive one, or the clamp would hide it."""
    kto, data = recipe("kto"), labelled_set(longest=24)
    partner = partners(data, 0)
    raised = tiny(seed=3, dtype=torch.float64)
    ratios = []
    for i in range(len(data.origin)):
        ids, weights = mismatch(data, i, partner(i))
        logps = [
            m.inner(torch.tensor(ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
            for m in (policy, raised)
        ]
        start, target = first_learned(weights), torch.tensor(ids.astype(np.int64))
        ours, theirs = (
            logp[start - 1 : -1].gather(1, target[start:, None]).sum()
            if start
            else logp[:-1].gather(1, target[1:, None]).sum()
            for logp in logps
        )
        ratios.append((ours - theirs).item())
    sign = 1 if np.mean(ratios) > 0 else -1  # one of the two directions is positive
    models = (policy, raised) if sign > 0 else (raised, policy)
    from ta.data.loader import micro_batches

    batches = micro_batches(data, np.arange(len(data.origin)), 40, True, labelled(data, 0))
    filled = kto.with_kl(Reference(still(models[1])), models[0], batches)
    for batch in filled:
        assert batch.kl.item() == pytest.approx(sign * np.mean(ratios), rel=1e-9) and batch.kl > 0
        assert batch.share.item() == pytest.approx(data.extras["desirable"].mean())


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_kto_of_one_kind_or_one_record_is_finite(policy, reference, desirable, n):
    kto, data = recipe("kto"), labelled_set(n=n, desirable=desirable)
    parts = {
        "dress": labelled(data, 0),
        "step": partial(kto.step, kto.Kto()),
        "before": partial(kto.with_kl, reference),
    }
    got = gradients(policy, data, **parts)
    assert math.isfinite(got.loss) and all(math.isfinite(v) for v in got.metrics.values())
    assert (
        all(g.isfinite().all() for g in got.grads.values())
        and max(g.abs().max() for g in got.grads.values()) > 0
    )


def made(rows):
    """A prepared set of (context, answer) token lists."""
    data = prepared(len(rows))
    ids = [np.array(context + answer) for context, answer in rows]
    weights = [
        np.array([0.0] * len(context) + [1.0] * len(answer), np.float32) for context, answer in rows
    ]
    offsets = np.concatenate([[0], np.cumsum([len(x) for x in ids])])
    return data._replace(
        ids=np.concatenate(ids).astype(np.int32), weights=np.concatenate(weights), offsets=offsets
    )


@pytest.mark.parametrize("seed", range(4))
def test_partners_never_match(seed):
    """Few contexts and answers, so that most neighbours match: the partner's answer and context differ, and nothing gets longer."""
    rng = np.random.default_rng(seed)
    rows = [([1] * int(rng.integers(1, 4)), [5] * int(rng.integers(1, 6))) for _ in range(40)]
    data, longest = made(rows), 0
    partner = partners(data, seed)
    longest, found = lengths(data).max(), 0
    for i, (context, answer) in enumerate(rows):
        j = partner(i)
        assert j == partner(i)
        allowed = [
            k
            for k, (c, a) in enumerate(rows)
            if c != context and a != answer and len(context) + len(a) <= longest
        ]
        assert (j in allowed) if allowed else j is None
        ids, weights = mismatch(data, i, j)
        assert ids.tolist() == context + (rows[j][1] if j is not None else answer)
        assert weights.any() == (j is not None)
        found += j is not None
    assert found > 20
    assert [partners(data, seed)(i) for i in range(40)] != [
        partners(data, seed + 1)(i) for i in range(40)
    ]


def test_without_a_partner_the_reference_point_is_zero(policy, reference):
    kto, data = recipe("kto"), made([([1, 2], [3]), ([4], [3]), ([5, 6], [3])])
    data = data._replace(extras={"desirable": np.array([1.0, 0.0, 1.0])})
    dress = labelled(data, 0)
    from ta.data.loader import micro_batches

    (batch,) = kto.with_kl(reference, policy, micro_batches(data, np.arange(3), 64, True, dress))
    assert not batch.matched.any() and batch.kl == 0 and len(batch.mismatched.learned) == 0


def test_only_the_answer_counts_for_kto(policy):
    """An earlier learned-looking part of the context carries nothing: the sum is over the answer's tokens alone."""
    from ta.data.loader import lay_records
    from ta.reference import sequence_logps

    data = made([([7, 8, 9], [10, 11]), ([7], [10])])
    got = sequence_logps(policy, lay_records(data, [0], True))
    logp = policy.inner(torch.tensor([[7, 8, 9, 10, 11]])).logits[0].log_softmax(-1)
    assert got.item() == pytest.approx((logp[2, 10] + logp[3, 11]).item(), rel=1e-12)


def test_margins_reach_the_losses(policy, reference):
    data = pair_set()
    none = data._replace(extras={"margin": np.full(13, np.nan)})
    rm, classifier = recipe("rm"), scorer()
    for model, parts in (
        (policy, lambda d: preference("sigmoid_with_margin", reference, d)),
        (classifier, lambda d: {"dress": pairs(d), "step": rm.step}),
    ):
        with_margin, without = (
            gradients(model, data, **parts(data)),
            gradients(model, none, **parts(none)),
        )
        assert with_margin.loss > without.loss + 0.05
    zero = data._replace(extras={"margin": np.zeros(13)})
    agree(
        gradients(policy, zero, **preference("sigmoid_with_margin", reference, zero)),
        gradients(policy, zero, **preference("sigmoid", reference, zero)),
    )


def test_a_margin_that_is_missing_names_its_line(capsys):
    data = pair_set()
    data.extras["margin"][[4, 7]] = np.nan
    with pytest.raises(
        ValueError, match=r"made\.jsonl:5 has no precomputed_margin, nor have 1 other"
    ):
        pairs(data, "needed")
    pairs(data, "unused")
    assert "precomputed_margin of 11 of 13 records has no part" in capsys.readouterr().err
    pairs(pair_set(margins=False), "unused")
    assert capsys.readouterr().err == ""


def scorer(dtype=torch.float64, num_labels=1):
    """A classifier over 64 tokens whose padding token is also its last one."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    from ta.model.attention import register
    from ta.model.language_model import wrap

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=num_labels,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return wrap(
        GPT2ForSequenceClassification._from_config(config, attn_implementation=register()).to(dtype)
    )[0]


def test_scores_do_not_depend_on_company():
    """Alone, packed, shared prompt or padded, also where a text ends in the padding token; as transformers' own on a text that does not."""
    from ta.data.batch import lay_out

    model, rng = scorer(num_labels=3), np.random.default_rng(0)
    texts = [rng.integers(1, 64, n) for n in (5, 9, 1, 12)]
    texts[1][-1] = 0
    none = [np.zeros(len(t), np.float32) for t in texts]
    with torch.no_grad():
        alone = torch.cat(
            [model.scores(lay_out([t], [w])) for t, w in zip(texts, none, strict=True)]
        )
        for packed in (True, False):
            torch.testing.assert_close(
                model.scores(lay_out(texts, none, packed)), alone, rtol=1e-10, atol=1e-12
            )
        twice = lay_out(
            [texts[1], np.concatenate([texts[1][:6], texts[0]])],
            [none[1], np.zeros(11)],
            True,
            [0, 6],
        )
        fresh = lay_out([np.concatenate([texts[1][:6], texts[0]])], [np.zeros(11)])
        torch.testing.assert_close(
            model.scores(twice)[1:], model.scores(fresh), rtol=1e-10, atol=1e-12
        )
        theirs = torch.cat(
            [model.inner(torch.tensor(t)[None]).logits for t in (texts[0], texts[3])]
        )
    torch.testing.assert_close(alone[[0, 3]], theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_classification_and_rewards_do_not_depend_on_the_cut(weighted):
    classify, rm = recipe("classify"), recipe("rm")
    model, data = scorer(num_labels=3), prepared(13, longest=24)
    data = data._replace(extras={"label": np.arange(13) % 3 * 1.0})
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64) if weighted else None
    parts = {"dress": classes(data, 3), "step": partial(classify.step, weights, 2.0 * weighted)}
    runs = [gradients(model, data, **parts, budget=b, packed=p) for b, p in WAYS]
    two = pair_set(longest=24)
    ranks = [
        gradients(scorer(), two, dress=pairs(two), step=rm.step, budget=b, packed=p)
        for b, p in WAYS
    ]
    for group in (runs, ranks):
        assert group[0].batches > 3
        for other in group[1:]:
            agree(group[0], other)


def test_labels_outside_and_classes_absent(capsys):
    data = prepared(4)._replace(extras={"label": np.array([0.0, 2.0, 5.0, 3.0])})
    with pytest.raises(
        ValueError, match=r"made\.jsonl:3 has label 5 of --num-labels 3 \(0 to 2\), as have 1 other"
    ):
        classes(data, 3)
    assert "no record of class 1, 4" in (classes(data, 6), capsys.readouterr().err)[1]
    assert sequence(data, 0)
