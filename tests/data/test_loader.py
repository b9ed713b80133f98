"""From data to batches: the plan of a step, partners that never match, margins, and results that do not depend on the cut."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import agree, gradients, labelled_set, pair_set, recipe
from small import prepared, tiny

from ta.data.batch import lay_out
from ta.data.loader import (
    TrainBatches,
    check_margins,
    collate_chats,
    collate_classes,
    collate_pairs,
    first_learned,
    heaviest_step,
    labelled_collate,
    labels_of,
    micro_batches,
    mismatch,
    partners,
    read_ahead,
    records_of_step,
    train_batches,
)
from ta.data.micro import BatchConfig, split_micro, steps_in
from ta.data.prepare import lengths, sequence
from ta.reference import Reference, sequence_logps
from ta.training.loop import add_sums
from ta.training.progress import StepSums, means


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(1, 4))
@settings(deadline=None)
def test_an_epoch_is_a_permutation_and_a_pure_function(n, batch_size, seed, epochs):
    per_epoch = steps_in(n, batch_size, 1)
    assert (
        per_epoch == -(-n // batch_size) and steps_in(n, batch_size, epochs) == epochs * per_epoch
    )
    for epoch in range(epochs):
        steps = [
            records_of_step(n, batch_size, seed, epoch * per_epoch + k) for k in range(per_epoch)
        ]
        assert sorted(np.concatenate(steps)) == list(range(n))
        assert all(len(s) == batch_size for s in steps[:-1])
    assert (
        records_of_step(n, batch_size, seed, 1) == records_of_step(n, batch_size, seed, 1)
    ).all()


def test_seeds_and_epochs_give_other_orders():
    orders = {
        tuple(records_of_step(30, 30, seed, epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


@given(
    st.lists(st.integers(1, 100), max_size=60),
    st.integers(100, 400),
    st.sampled_from([1, 2, 3, 4]),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_micro_batches_hold_each_sequence_once_within_the_budget(lengths, budget, world, packed):
    ranks = split_micro(lengths, budget, world, packed)
    assert len(ranks) == world and len({len(micro) for micro in ranks}) == 1 and len(ranks[0]) >= 1
    assert sorted(i for micro in ranks for bin_ in micro for i in bin_) == list(range(len(lengths)))
    for micro in ranks:
        for places in micro:
            chosen = [lengths[i] for i in places]
            assert (sum(chosen) if packed else len(chosen) * max(chosen, default=0)) <= budget


def test_ranks_are_balanced():
    rng = np.random.default_rng(0)
    loads = [
        sum(lengths[i] for micro in rank for i in micro)
        for lengths in [rng.integers(32, 513, 256).tolist()]
        for rank in split_micro(lengths, 4096, 4)
    ]
    assert max(loads) < 1.05 * min(loads)


def test_packing_real_lengths_wastes_under_three_percent():
    """Chats of 32-512 tokens at a budget of 4,096: what is laid down is what was given, and bins are nearly full."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(32, 513, 512).tolist()
    (bins,) = split_micro(lengths, 4096)
    ids = [np.ones(n, np.int64) for n in lengths]
    laid = sum(
        lay_out([ids[i] for i in b], [np.ones(lengths[i]) for i in b]).tokens.numel() for b in bins
    )
    assert laid == sum(lengths)
    assert len(bins) <= 1.03 * sum(lengths) / 4096 + 1


def test_too_long_a_sequence_is_an_error():
    with pytest.raises(ValueError, match="101 tokens cannot fit into --max-tokens-per-micro 100"):
        split_micro([3, 101], 100)


def test_the_step_with_most_tokens_comes_first():
    """Of the first pass, and within it the fullest micro-batch, whatever the number of processes."""
    data = prepared(n=40)
    sizes = np.diff(data.offsets)
    steps = [records_of_step(40, 8, 0, s) for s in range(5)]
    assert heaviest_step(sizes, 8, 0, 5) == max(range(5), key=lambda s: sizes[steps[s]].sum())
    assert heaviest_step(sizes, 8, 0, 1) == 0
    batches = train_batches(data, BatchConfig(steps=10, batch_size=8, max_tokens_per_micro=60))
    seen = [set(batches.records(s)) for s in range(5)]
    assert sorted(map(len, seen)) == [8] * 5 and len(set.union(*seen)) == 40
    loads = [sum(sum(batch.lengths) for batch in batches.at(s)) for s in range(5)]
    assert loads[0] == max(loads) and len(set(loads)) > 1
    micro = [sum(batch.lengths) for batch in batches.at(0)]
    assert micro == sorted(micro, reverse=True)


def test_reading_ahead_changes_no_batch():
    made, broken = [], []

    def collate(data, records, packed):
        made.append(records.tolist())
        if broken:
            raise ZeroDivisionError
        return collate_chats(data, records, packed)

    config = BatchConfig(steps=7, batch_size=4, max_tokens_per_micro=200)
    plain, ahead = (train_batches(prepared(20), config, collate=collate) for _ in range(2))
    ahead = read_ahead(ahead)
    assert ahead.steps == 7 and (ahead.records(3) == plain.records(3)).all()
    for step in (3, 4, 5, 6, 0, 2):  # in a row, as training does, and anew
        for one, other in zip(ahead.at(step), collated(plain, step), strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.learned, other.learned)
    ahead.at(4)
    made.clear()
    ahead.at(5), ahead.at(6)
    ahead._pool.shutdown()
    assert sum(map(len, made)) == 4, "each once, and none past the end: step 5 was begun before"
    broken.append(True)
    with pytest.raises(ZeroDivisionError):
        read_ahead(plain).at(2)


def collated(batches: TrainBatches, step):
    """The micro-batches of a step, made without the collate function of `batches`."""
    data, size = batches.prepared, batches.max_tokens
    return micro_batches(data, batches.records(step), size, batches.packed, collate_chats)


def test_how_many_steps_and_how_many_records():
    data = prepared(20)
    every = {
        (): (1, 64),
        (("batch_size", 8),): (3, 8),
        (("batch_size", 8), ("epochs", 2.0)): (6, 8),
        (("batch_size", 8), ("steps", 5)): (5, 8),
    }
    for given_, (steps, size) in every.items():
        batches = train_batches(data, BatchConfig(**dict(given_)))
        assert (batches.steps, batches.batch_size) == (steps, size)
    assert train_batches(data, BatchConfig(), default_batch_size=10).steps == 2


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
    return Reference("frozen", tiny(seed=1, dtype=torch.float64).eval())


def preference(name, reference):
    """What gradients() needs of recipes/dpo.py for the loss `name`."""
    dpo = recipe("dpo")

    def before(model, batches):
        batches = reference.add_to(batches)
        return dpo.with_kl(model, batches) if name == "kto_pair" else batches

    step = partial(dpo.step, name, dpo.FLAGS[name])
    return {"collate": collate_pairs, "step": step, "before": before}


def kto_parts(reference, data, **settings):
    """What gradients() needs of recipes/kto.py."""
    kto = recipe("kto")
    return {
        "collate": labelled_collate(data, 0),
        "step": partial(kto.step, kto.Config(**settings)),
        "before": lambda model, batches: kto.with_kl(model, reference.add_to(batches)),
    }


@pytest.mark.parametrize("name", recipe("dpo").FLAGS)
def test_preferences_do_not_depend_on_the_cut(policy, reference, name):
    data = pair_set(longest=24)
    runs = [
        gradients(policy, data, **preference(name, reference), budget=b, packed=p) for b, p in WAYS
    ]
    assert runs[0].batches > 5 and runs[2].batches == 1 and all(math.isfinite(r.loss) for r in runs)
    for other in runs[1:]:
        agree(runs[0], other)


def test_kto_does_not_depend_on_the_cut(policy, reference):
    data = labelled_set(longest=24)
    parts = kto_parts(reference, data, beta=0.3, desirable_weight=1.5)
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
    batches = micro_batches(data, np.arange(len(data.origin)), 40, True, labelled_collate(data, 0))
    assert len(batches) > 3
    theirs = Reference("frozen", models[1])
    filled = kto.with_kl(models[0], theirs.add_to(batches))
    for batch in filled:
        assert batch.kl.item() == pytest.approx(sign * np.mean(ratios), rel=1e-9) and batch.kl > 0


def test_kto_logs_the_mean_of_each_side(policy, reference):
    """Over steps that mostly lack the rare side: its mean over its own answers, by plain forwards in float64."""
    data, beta = labelled_set(n=12, longest=20), 0.1
    data.extras["desirable"][:] = 0
    data.extras["desirable"][[4, 5]] = 1
    raised, rewards = tiny(seed=1, dtype=torch.float64), []
    for i in range(12):
        ids, weights = (torch.tensor(x.copy()) for x in sequence(data, i))
        target, learned = ids[1:, None].long(), weights[1:, None] != 0
        ours, theirs = (
            m.inner(ids[None].long())
            .logits[0]
            .log_softmax(-1)[:-1]
            .gather(1, target)[learned]
            .sum()
            for m in (policy, raised)
        )
        rewards.append(beta * (ours - theirs).item())
    window, good = StepSums(), data.extras["desirable"] == 1
    for records in np.arange(12).reshape(3, 4):
        sums = {}
        parts = kto_parts(reference, data)
        for batch in parts["before"](
            policy, micro_batches(data, records, 40, True, parts["collate"])
        ):
            loss, count, metrics = parts["step"](policy, batch)
            add_sums(sums, loss, count, batch, metrics)
        window.add({name: float(value) for name, value in sums.items()})
        found = means({name: float(value) for name, value in sums.items()})
        assert ("reward_desirable" in found) == ("reward_margin" in found) == (4 in records)
    logged = window.mean()
    better, worse = np.mean(np.array(rewards)[good]), np.mean(np.array(rewards)[~good])
    assert logged["reward_desirable"] == pytest.approx(better, abs=1e-9)
    assert logged["reward_undesirable"] == pytest.approx(worse, abs=1e-9)
    assert logged["reward_margin"] == pytest.approx(better - worse, abs=1e-9)


def test_two_figures_of_one_name_are_refused():
    sums = {"loss": 2.0, "count": 4.0, "part 0 right": 2.0, "own 0 right": 4.0}
    assert means(sums) == {"loss": 0.5, "right": 0.5}
    with pytest.raises(ValueError, match="two figures are called loss"):
        means(sums | {"part 0 loss": 1.0, "own 0 loss": 1.0})
    window = StepSums()
    window.add(sums | {"tokens": 3, "learned": 2, "part 0 tokens": 1.0, "own 0 tokens": 1.0})
    with pytest.raises(ValueError, match="two figures are called tokens"):
        window.mean()


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_kto_of_one_kind_or_one_record_is_finite(policy, reference, desirable, n):
    data = labelled_set(n=n, desirable=desirable)
    got = gradients(policy, data, **kto_parts(reference, data))
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
    batches = micro_batches(data, np.arange(3), 64, True, labelled_collate(data, 0))
    (batch,) = kto.with_kl(policy, reference.add_to(batches))
    assert not batch.matched.any() and batch.kl == 0 and len(batch.mismatched.learned) == 0


def test_only_the_answer_counts_for_kto(policy):
    """An earlier learned-looking part of the context carries nothing: the sum is over the answer's tokens alone."""
    data = made([([7, 8, 9], [10, 11]), ([7], [10])])
    got = sequence_logps(policy, collate_chats(data, [0], True))
    logp = policy.inner(torch.tensor([[7, 8, 9, 10, 11]])).logits[0].log_softmax(-1)
    assert got.item() == pytest.approx((logp[2, 10] + logp[3, 11]).item(), rel=1e-12)


def test_margins_reach_the_losses(policy, reference):
    data = pair_set()
    none = data._replace(extras={"margin": np.full(13, np.nan)})
    rm, classifier = recipe("rm"), scorer()
    for model, parts in (
        (policy, preference("sigmoid_with_margin", reference)),
        (classifier, {"collate": collate_pairs, "step": rm.step}),
    ):
        with_margin, without = gradients(model, data, **parts), gradients(model, none, **parts)
        assert with_margin.loss > without.loss + 0.05
    zero = data._replace(extras={"margin": np.zeros(13)})
    agree(
        gradients(policy, zero, **preference("sigmoid_with_margin", reference)),
        gradients(policy, zero, **preference("sigmoid", reference)),
    )


def test_a_margin_that_is_missing_names_its_line(capsys):
    data = pair_set()
    data.extras["margin"][[4, 7]] = np.nan
    with pytest.raises(
        ValueError,
        match=r"2 records have no precomputed_margin, the first of them .*made\.jsonl:5,",
    ):
        check_margins(data, "needed")
    check_margins(data, "unused")
    assert "precomputed_margin of 11 of 13 records has no part" in capsys.readouterr().err
    check_margins(data, "used")
    assert "precomputed_margin of 11 of 13 records is in the loss" in capsys.readouterr().err
    check_margins(pair_set(margins=False), "unused")
    check_margins(pair_set(), "needed")
    check_margins(None, "needed")
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
    parts = {"collate": collate_classes, "step": partial(classify.step, weights, 2.0 * weighted)}
    runs = [gradients(model, data, **parts, budget=b, packed=p) for b, p in WAYS]
    two = pair_set(longest=24)
    ranks = [
        gradients(scorer(), two, collate=collate_pairs, step=rm.step, budget=b, packed=p)
        for b, p in WAYS
    ]
    for group in (runs, ranks):
        assert group[0].batches > 3
        for other in group[1:]:
            agree(group[0], other)


def test_labels_outside_and_classes_absent(capsys):
    data = prepared(4)._replace(extras={"label": np.array([0.0, 2.0, 5.0, 3.0])})
    with pytest.raises(
        ValueError,
        match=r"made\.jsonl:3 has label 5 of --num-labels 3 \(0 to 2\), the first of 2 such",
    ):
        labels_of(data, 3)
    assert labels_of(data, 6).tolist() == [0, 2, 5, 3]
    assert "no record of class 1, 4" in capsys.readouterr().err
