"""recipes/evaluate.py: figures equal the metrics, intervals the bootstrap written out, perplexity plain transformers, and two files pair up by record."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ta.builtin import models, tasks
from ta.generation.evaluation import (
    check_answers,
    compare,
    figure,
    interval,
    metric_inputs,
    read_answers,
)
from ta.generation.metrics import METRICS


def written(path, records):
    tasks.write_jsonl(path, records)
    return str(path)


def made(n, seed, right):
    """n records, whose answers are right in a share of them."""
    random = np.random.default_rng(seed)
    hits = random.random(n) < right
    return [
        {"id": i, "answer": "a b c" if hit else "a d", "reference": "a b c"}
        for i, hit in enumerate(hits)
    ]


def result(door, tmp_path, *flags):
    code, said = door("evaluate", *flags, "--out", tmp_path / "out.json", "--overwrite")
    assert code == 0, said
    return json.loads((tmp_path / "out.json").read_text())


def test_figures_and_their_intervals(door, tmp_path):
    """The percentile bootstrap over records, written out; variety has no interval."""
    records = made(80, 0, 0.6)
    names = ("accuracy", "rouge_l", "bleu", "self_bleu")
    found = result(
        door, tmp_path, "--answers", written(tmp_path / "a.jsonl", records), "--metrics", *names
    )
    texts = [r["answer"] for r in records], [r["reference"] for r in records]
    for name in names:
        given = texts if len(METRICS[name].inputs) == 2 else texts[:1]
        assert found["figures"][name]["value"] == pytest.approx(METRICS[name].function(*given))
        assert found["figures"][name]["records"] == 80
    assert found["figures"]["self_bleu"]["low"] is None
    each = [METRICS["rouge_l"].function([a], [b]) for a, b in zip(*texts, strict=True)]
    assert [r["rouge_l"] for r in found["records"]] == [[pytest.approx(v)] for v in each]
    random = np.random.default_rng(0)
    means = [np.mean(np.array(each)[random.integers(0, 80, 80)]) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found["figures"]["rouge_l"]["low"] == pytest.approx(low)
    assert found["figures"]["rouge_l"]["high"] == pytest.approx(high)


def test_an_interval_covers_as_often_as_it_says():
    """Of means of 40 draws, about 95 % of the intervals hold the true mean (a little less at this size)."""
    random, held = np.random.default_rng(1), 0
    for _ in range(120):
        draws = random.normal(3, 2, 40)
        low, high = interval(lambda at, d=draws: d[at].mean(), 40, 200)
        held += low <= 3 <= high
    assert 0.86 <= held / 120 <= 0.99


def test_two_files_are_compared_record_by_record(door, tmp_path):
    """In any order and with records that only one has; differences are paired, so equal records cancel."""
    first, second = made(60, 0, 0.3), made(60, 0, 0.3)
    for record in second[:20]:
        record["answer"] = "a b c"
    shuffled = [second[i] for i in np.random.default_rng(0).permutation(60)] + [
        {**first[0], "id": "more"}
    ]
    files = [written(tmp_path / name, x) for name, x in (("a.jsonl", first), ("b.jsonl", shuffled))]
    found = result(door, tmp_path, "--answers", files[0], "--against", files[1])
    figures = found["figures"]["accuracy"]
    better = sum(r["answer"] != "a b c" for r in first[:20])
    assert better > 5
    assert figures["difference"]["value"] == pytest.approx(better / 60)
    assert figures["wins"]["value"] == pytest.approx(0.5 + better / 120)
    assert 0 < figures["difference"]["low"] < better / 60 < figures["difference"]["high"]
    pair = ("--answers", files[0], "--against", files[1])
    assert (
        "left out: 1 records that one file"
        in door("evaluate", *pair, "--out", tmp_path / "c2.json")[1]
    )
    bare = [{"id": record["id"], "answer": "a"} for record in second]
    bare = ("--answers", files[0], "--against", written(tmp_path / "bare.jsonl", bare))
    assert "for no record of both" in door("evaluate", *bare, "--out", tmp_path / "d.json")[1]
    same = result(door, tmp_path, "--answers", files[0], "--against", files[0])["figures"][
        "accuracy"
    ]
    assert same["difference"]["low"] == same["difference"]["high"] == 0
    for flags, said in (
        (("--against", files[0]), "give both"),
        (("--answers", files[0], "--against", files[1], "--metrics", "bleu"), "record by record"),
        (("--answers", files[0], "--metrics", "perplexity"), "needs logprobs"),
        (("--answers", tmp_path / "none"), "no such file"),
        (("--answers", written(tmp_path / "c.jsonl", [{"text": "x"}])), "c.jsonl:1: no answers"),
    ):
        code, text = door("evaluate", *flags, "--out", tmp_path / "other.json")
        assert code == 2 and said in text, text
    assert not (tmp_path / "other.json").exists()


OTHER_FORMS = [  # (fields, a metric, the line about it)
    ({"rewards": 0.5}, "accuracy", "a.jsonl:1: rewards lacks an answer"),
    ({"rewards": {"0": "high"}}, "reward", "a.jsonl:1: rewards lacks an answer"),
    ({"logprobs": -1.5}, "perplexity", "perplexity needs logprobs, and there is only answers, "),
    ({"gold": ["p"], "passages": ["p"]}, "mrr", "mrr needs retrieved and gold"),
    ({"label": 1, "probabilities": 3}, "roc_auc", "roc_auc needs scores"),
    ({"label": "0", "prediction": 0, "probabilities": [0.9, 0.1]}, "roc_auc", "needs scores"),
    ({}, "", "no metric to measure"),
]


@pytest.mark.parametrize(("fields", "metric", "said"), OTHER_FORMS)
def test_a_field_of_another_form_is_said_in_a_line(fields, metric, said, door, tmp_path):
    """Where a metric needs it; a metric that does not is measured."""
    file = written(tmp_path / "a.jsonl", [{"answer": "x", "reference": "x"} | fields])
    code, text = door("evaluate", "--answers", file, "--metrics", *[metric] * bool(metric))
    assert code == 2 and said in text and "Traceback" not in text, text
    if "rewards" not in fields:
        given = ("--answers", file, "--metrics", "contains")
        assert result(door, tmp_path, *given)["figures"]["contains"]["value"] == 1


def test_what_has_no_value_has_no_interval(recwarn):
    """ROC-AUC of one class, in no resample; nothing is warned of."""
    records = [{"scores": [x], "labels": [1]} for x in (0.1, 0.4, 0.9)]
    value, low, high, count = figure("roc_auc", records)
    assert math.isnan(value) and (low, high, count) == (None, None, 3)
    assert not [w for w in recwarn if "NaN" in str(w.message)]


def test_several_answers_of_a_record_belong_together():
    """Each counts once in the mean; the record is what is drawn."""
    records = [
        {
            "answers": ["a", "a"],
            "groups": [["a", "a"]],
            "predictions": ["a", "a"],
            "labels": ["a", "b"],
        },
        {"answers": ["b"], "groups": [["b"]], "predictions": ["b"], "labels": ["b"]},
        {"answers": ["c"], "groups": [["c"]]},
    ]
    assert figure("accuracy", records)[::3] == (2 / 3, 2)
    assert figure("self_bleu_of_prompt", records).value == pytest.approx(1 / 3)
    other = [records[0] | {"labels": ["a", "a"]}, *records[1:]]
    found = compare("accuracy", records, other)
    assert (found.first, found.second, found.difference.value, found.wins.value) == (
        0.75,
        1,
        0.25,
        0.75,
    )


def test_perplexity_and_win_rate_by_models(door, tmp_path):
    """Of the answers in a file, as plain transformers computes it in float64; rewards decide who wins."""
    models.write_tiny(tmp_path / "model")
    models.write_tiny(tmp_path / "rm", num_labels=1, seed=2)
    chats = tasks.chats("held_out", 6)
    data = written(tmp_path / "chats.jsonl", chats)
    flags = ("--model-path", tmp_path / "model", "--data", data)
    found = result(door, tmp_path, *flags, "--perplexity", "--loss-on", "last")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    total, count = 0.0, 0
    for record in chats:
        ids = tokenizer.apply_chat_template(record["messages"], return_dict=False)
        start = len(
            tokenizer.apply_chat_template(
                record["messages"][:-1], add_generation_prompt=True, return_dict=False
            )
        )
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        learned = [logps[i - 1, ids[i]].item() for i in range(start, len(ids))]
        total, count = total - sum(learned), count + len(learned)
    assert found["figures"]["perplexity"]["value"] == pytest.approx(
        math.exp(total / count), rel=1e-4
    )
    answered = result(
        door, tmp_path, *flags, "--max-new-tokens", "4", "--metrics", "accuracy", "length"
    )
    assert answered["figures"]["length"]["records"] == 6
    files = []
    for name, text in (("a", "yes"), ("b", "no")):
        rows = [{"id": r["id"], "messages": r["messages"][:-1], "answer": text} for r in chats]
        files.append(written(tmp_path / f"{name}.jsonl", rows))
    rewarded = ("--reward-model", tmp_path / "rm", "--metrics", "length")
    found = result(door, tmp_path, "--answers", files[0], "--against", files[1], *rewarded)
    rewards = [record["reward"] for record in found["records"]]
    assert found["figures"]["reward"]["wins"]["value"] == sum(b > a for a, b in rewards) / 6


def test_a_class_is_compared_with_its_label_by_place_or_by_name():
    """score.py writes both; the record's own label says which is meant."""
    scored = {"prediction": 1, "probabilities": [0.2, 0.5, 0.3], "class": "pos"}
    for label, right in ((1, 1), (2, 0), ("pos", 1), ("neg", 0), ("1", 0)):
        found = figure("accuracy", [metric_inputs(check_answers(scored | {"label": label}))])
        assert found.value == right, label
    assert figure("accuracy", [metric_inputs(check_answers({"label": "1", "prediction": 1}))]).value


def test_gold_is_an_id_or_a_list_of_texts_or_numbers():
    """As in the data of rag.py; passages of an index have texts as ids."""
    found = {"passages": [{"id": "7"}, {"id": "8"}]}
    for gold, rank in ((7, 1), ([8], 2), ("8", 2), (["9", 8], 2), ("9", None)):
        value = figure("mrr", [metric_inputs(found | {"gold": gold})]).value
        assert value == (1 / rank if rank else 0), gold


def test_answers_that_stand_otherwise(tmp_path):
    """The last line needs no end; classes and passages have their metrics; a torn line is named."""
    lines = [
        {"answer": "4", "reference": "4", "gold": ["b"], "passages": [{"id": "a"}, {"id": "b"}]},
        {"prediction": 1, "label": 0, "probabilities": [0.4, 0.6]},
        {"prediction": 0, "label": 1, "probabilities": [0.7, 0.3]},
        {"answers": [{"content": "x"}, {"content": "y"}], "rewards": {"0": 1.0, "1": 2.0}},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    inputs = [metric_inputs(record) for record in read_answers(str(tmp_path / "a.jsonl"))]
    values = {"accuracy": 1 / 3, "roc_auc": 0, "recall_at_1": 0, "mrr": 0.5, "reward": 1.5}
    for name, value in values.items():
        assert figure(name, inputs if name != "roc_auc" else inputs[1:3]).value == value
    for torn, said in (
        ("{", "a.jsonl:5"),
        ('{"answers": [{"id": 3}]}', "no text"),
        ('{"answers": ["x"], "rewards": {"1": 2}}', "each id"),
    ):
        (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
        with pytest.raises(ValueError, match=said):
            read_answers(str(tmp_path / "a.jsonl"))


def test_distinct_tokens_are_those_of_the_model_named(door, tmp_path):
    """Expectation-adjusted distinct-1 of the answers' ids by plain transformers; without a model no tokens."""
    models.write_tiny(tmp_path / "model")
    texts = ["2 + 2 is 4", "2 + 3 is 5", ""]
    rows = [{"id": i, "answer": text} for i, text in enumerate(texts)]
    flags = ("--answers", written(tmp_path / "a.jsonl", rows), "--metrics", "adjusted_distinct_1")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    v = len(tokenizer)
    found = result(door, tmp_path, *flags, "--model-path", tmp_path / "model")
    wanted = len(set(ids)) / (v * (1 - ((v - 1) / v) ** len(ids)))
    assert found["figures"]["adjusted_distinct_1"]["value"] == pytest.approx(wanted)
    code, said = door("evaluate", *flags, "--out", tmp_path / "other.json")
    assert code == 2 and "--model-path" in said
    unknown = (*flags[:2], "--against", flags[1], "--metrics", "no_such")
    code, said = door("evaluate", *unknown, "--out", tmp_path / "other.json")
    assert code == 2 and "unknown metric 'no_such'" in said
