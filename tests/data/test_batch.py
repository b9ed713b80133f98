"""Layout and plan: targets are the next tokens, every sequence appears once, ranks run the same number of passes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import prepared

from ta.data.batch import heaviest_step, lay_out, records_of_step, split_micro, steps_in, to_device
from ta.data.loader import read_ahead, training_feed


def random_sequences(rng, n, longest=20):
    ids = [rng.integers(1, 50, rng.integers(1, longest + 1)) for _ in range(n)]
    return ids, [rng.choice([0.0, 1.0, 0.5], len(x)).astype(np.float32) for x in ids]


def test_packed_by_hand():
    batch = lay_out(
        [np.array([5, 6, 7]), np.array([8, 9])], [np.array([0, 0, 1.0]), np.array([1.0, 2.0])]
    )
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.learned.tolist() == [
        1,
        3,
    ]  # 6 predicts 7, 8 predicts 9; a first token has nothing before it
    assert batch.targets.tolist() == [7, 9]
    assert batch.weights.tolist() == [1, 2]
    assert batch.owners.tolist() == [0, 1]
    assert batch.ends.tolist() == [2, 4]
    assert batch.lengths == (3, 2)


def test_padded_by_hand():
    batch = lay_out(
        [np.array([5, 6, 7]), np.array([8, 9])],
        [np.array([0, 0, 1.0]), np.array([0, 2.0])],
        packed=False,
    )
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.learned.tolist() == [1, 3]
    assert batch.ends.tolist() == [2, 4]


def test_shared_prompt_by_hand():
    """Two answers to one prompt: the prompt lies there once and its last position predicts both first tokens."""
    ids = [np.array([1, 2, 10, 11]), np.array([1, 2, 20])]
    batch = lay_out(ids, [np.array([0, 0, 1.0, 1]), np.array([0, 0, 1.0])], shared=(0, 2))
    assert batch.tokens.tolist() == [[1, 2, 10, 11, 20]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.learned.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [10, 11, 20]
    assert batch.owners.tolist() == [0, 0, 1]
    assert batch.ends.tolist() == [3, 4]
    assert (batch.lengths, batch.prefixes) == ((4, 1), (0, 2))


@pytest.mark.parametrize("packed", [True, False])
def test_every_target_is_the_next_token_of_its_sequence(packed):
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids, weights = random_sequences(rng, rng.integers(1, 8))
        batch = lay_out(ids, weights, packed)
        flat, places = batch.tokens.flatten(), batch.positions.flatten()
        seen = []
        for position, target, weight, owner in zip(
            batch.learned, batch.targets, batch.weights, batch.owners, strict=True
        ):
            place = places[position].item()
            assert flat[position] == ids[owner][place]
            assert target == ids[owner][place + 1]
            assert weight == weights[owner][place + 1]
            seen.append((owner.item(), place + 1))
        assert seen == [(n, i) for n, w in enumerate(weights) for i in np.flatnonzero(w) if i > 0]
        assert [flat[end].item() for end in batch.ends] == [x[-1] for x in ids]


def test_an_empty_micro_batch_learns_nothing():
    batch = lay_out([], [])
    assert batch.tokens.shape == (1, 1) and len(batch.learned) == len(batch.ends) == 0


def test_to_device_keeps_the_nest():
    batch = to_device(lay_out([np.array([1, 2])], [np.array([0, 1.0])]), torch.device("cpu"))
    assert batch.lengths == (2,) and batch.tokens.tolist() == [[1, 2]]


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
    from small import prepared

    from ta.data.loader import training_feed

    data = prepared(n=40)
    sizes = np.diff(data.offsets)
    steps = [records_of_step(40, 8, 0, s) for s in range(5)]
    assert heaviest_step(sizes, 8, 0, 5) == max(range(5), key=lambda s: sizes[steps[s]].sum())
    assert heaviest_step(sizes, 8, 0, 1) == 0
    feed = training_feed(data, batch_size=8, max_tokens_per_micro=60, seed=0, steps=10, epochs=1)
    seen = [set(feed.records(s)) for s in range(5)]
    assert sorted(map(len, seen)) == [8] * 5 and len(set.union(*seen)) == 40
    loads = [sum(sum(batch.lengths) for batch in feed.batches(s)) for s in range(5)]
    assert loads[0] == max(loads) and len(set(loads)) > 1
    micro = [sum(batch.lengths) for batch in feed.batches(0)]
    assert micro == sorted(micro, reverse=True)


def test_reading_ahead_changes_no_batch():
    feed = training_feed(
        prepared(20), batch_size=4, max_tokens_per_micro=200, seed=0, steps=7, epochs=1
    )
    made = []
    ahead = read_ahead(feed._replace(batches=lambda step: made.append(step) or feed.batches(step)))
    for step in (3, 4, 5, 6, 0, 2):  # in a row, as training does, and anew
        for one, other in zip(ahead.batches(step), feed.batches(step), strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.learned, other.learned)
    assert made[:4] == [3, 4, 5, 6] and 7 not in made, "each once, and none past the end"
    broken = read_ahead(feed._replace(batches=lambda step: 1 // (step - 2)))
    assert broken.batches(1) == -1
    with pytest.raises(ZeroDivisionError):
        broken.batches(2)
