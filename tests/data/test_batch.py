"""Layout: targets are the next tokens of their sequence, whether packed, padded or with a shared prompt."""

import numpy as np
import pytest
import torch

from ta.data.batch import ClassBatch, batch_of, lay_out, to_device


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
    outer = to_device(ClassBatch(batch, torch.tensor([3])), "cpu")
    assert isinstance(outer, ClassBatch) and batch_of(outer).lengths == (2,)
