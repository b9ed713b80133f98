"""The judge finds what is wrong: the project's own ids and weights, each changed in one way."""

import pytest
from cells import CELLS
from judge import judge
from ours import outcome
from test_encode import setting


@pytest.fixture
def judged(tmp_path):
    """(the plain tokenizer, the outcome of the multi-turn cell)."""
    made, tokenizer = setting("chatml")
    return made, outcome(made, "chatml", CELLS["multi-turn"], tokenizer, tmp_path)


def verdict(made, given, cell="multi-turn"):
    return judge(made, "chatml", CELLS[cell], given).status


def test_what_is_right_is_right_and_a_refusal_of_it_is_needless(judged):
    made, given = judged
    assert verdict(made, given) == "right"
    assert verdict(made, given._replace(sequences=(), error="no")) == "needless"


def test_one_other_id_or_weight_is_wrong(judged):
    made, given = judged
    ((ids, weights),) = given.sequences
    learned = [place for place, weight in enumerate(weights) if weight]
    border = {learned[0] - 1, learned[0], learned[0] + 1, 1}
    for place in sorted(border):
        flipped = [float(not w) if i == place else w for i, w in enumerate(weights)]
        assert verdict(made, given._replace(sequences=[(ids, flipped)])) == "wrong", place
    other = [ids[0], *ids[2:]]
    assert verdict(made, given._replace(sequences=[(other, weights[1:])])) == "wrong"


def test_what_a_template_leaves_out_must_be_said(judged, tmp_path):
    made, _ = judged
    _, tokenizer = setting("chatml")
    for cell in ("tools given", "reasoning"):
        given = outcome(made, "chatml", CELLS[cell], tokenizer, tmp_path)
        assert given.said and verdict(made, given, cell) == "right"
        assert verdict(made, given._replace(said=""), cell) == "wrong"
