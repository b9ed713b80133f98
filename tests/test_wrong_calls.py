"""A function that is called with other things than it takes says what was given and what to give."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ta
from ta.data.readers import as_line

CHAT = [{"role": "user", "content": "cup red"}, {"role": "assistant", "content": "cup"}]
USUAL, DATA, BUILTIN = ta.ChatConfig(), ta.DataConfig(), ta.ModelConfig()


@pytest.fixture(scope="module")
def its():
    tokenizer = ta.load_chat_tokenizer(BUILTIN, ta.TokenizerConfig(), USUAL)

    def load(num_labels=None, model=BUILTIN, label_names=()):
        settings = model, ta.AdapterConfig(), ta.ComputeConfig(), tokenizer
        return ta.load_model(*settings, num_labels=num_labels, label_names=label_names)

    return SimpleNamespace(tokenizer=tokenizer, load=load, model=load(), classifier=load(2))


def prepare(records, its, data=DATA):
    return ta.prepare_chats(records, its.tokenizer, USUAL, data)


def generate(prompts, its, model=None, **settings):
    config = ta.GenerateConfig(max_new_tokens=2, **settings)
    fast, stops = its.tokenizer.fast, its.tokenizer.stop_ids
    return ta.generate(model or its.model, fast, prompts, config, stops)


def pair(chosen, rejected):
    lengths = torch.ones(chosen), torch.ones(rejected)
    return ta.losses.Pair(-torch.ones(chosen), -torch.ones(rejected), *lengths)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: ta.load_chat_tokenizer("m", ta.TokenizerConfig(), USUAL), "'m' .* ta.Model"),
        (lambda x: x.load(model=ta.ModelConfig(model_path=Path("m"))), "model-path m: .*STR"),
        (lambda x: x.load(model=ta.ModelConfig(dtype="float8")), "float8: .*bfloat16"),
        (lambda x: x.load(2, label_names=["a"]), "num_labels 2"),
        (lambda x: x.load(0), "num_labels 0"),
        (lambda x: ta.encode_chat(CHAT, x.tokenizer, ta.ChatConfig(loss_on="x")), "x: .*answers"),
        (lambda x: ta.encode_chat("hi", x.tokenizer, USUAL), "'hi' is no chat"),
        (lambda x: ta.encode_prompt(CHAT[0], x.tokenizer, USUAL), "no chat"),
        (lambda x: ta.encode_prompts(CHAT, x.tokenizer, USUAL), "no chat"),
        (lambda x: ta.render_chat([{"content": "a"}], x.tokenizer.template), "has role None"),
        (lambda x: ta.render_chat(CHAT, x.tokenizer.template, weights=[1.0]), "each message"),
        (lambda x: ta.loss_weights(CHAT, "answer"), "'answer': .*answers, last, all"),
        (lambda x: ta.cut_dialogue(["user"], [1, 2], 9), "each role a length"),
        (lambda x: ta.lay_out([[1.5, 2]], [[1, 1]]), "whole numbers"),
        (lambda x: ta.lay_out([[-1, 2]], [[1, 1]]), "whole numbers"),
        (lambda x: ta.lay_out([[1, 2], [3]], [[1], [1, 1]]), "a weight for each id"),
        (lambda x: ta.lay_out([[1, 2]], [[1, float("nan")]]), "finite"),
        (lambda x: ta.lay_out([[1, 2], [1, 3]], [[1, 1]] * 2, False, [0, 1]), "packed"),
        (lambda x: prepare("chats.jsonl", x), "chats.jsonl.*a list of names"),
        (lambda x: prepare({"messages": CHAT}, x), "a list of records"),
        (lambda x: prepare([CHAT], x), "a list of records"),
        (lambda x: prepare([{"messages": CHAT, "x": b"a"}], x), "bytes"),
        (lambda x: prepare([{"messages": [CHAT[0] | {"content": "\ud800"}]}], x), "surrogate"),
        (lambda x: prepare(["a.jsonl"], x, ta.DataConfig(on_bad_record="x")), "x: .*skip"),
        (lambda x: ta.train_batches(None, ta.BatchConfig()), "no data"),
        (lambda x: ta.preview(None, x.tokenizer), "no tokens"),
        (lambda x: x.model.scores(ta.lay_out([[1]], [[1]])), "num_labels"),
        (lambda x: x.classifier.loss(ta.lay_out([[1, 2]], [[1, 1]])), "num_labels"),
        (lambda x: generate(["hi"], x), "'hi' is no prompt"),
        (lambda x: generate([CHAT], x), "is no prompt"),
        (lambda x: generate([1, 2], x), "1 is no prompt"),
        (lambda x: generate([[1]], x, x.classifier), "language model"),
        (lambda x: generate([[1]], x, stop_strings="ab"), "stop-strings ab"),
        (lambda x: ta.measure(["rouge_l"], answers="ab", references="ab"), "a list"),
        (lambda x: ta.losses.simpo(pair(1, 2)), r"shapes \(1,\) and \(2,\)"),
        (lambda x: ta.losses.sigmoid(pair(2, 2), pair(1, 1)), r"shapes \(2,\) and \(1,\)"),
        (lambda x: ta.losses.reward_loss(torch.ones(3), torch.ones(1)), "shapes"),
        (lambda x: ta.rl.advantages(torch.ones(2, 2), "group"), "'group': give grpo, centred"),
        (lambda x: ta.roc_auc([0.1, float("nan")], [0, 1]), "do not pair up"),
        (lambda x: ta.roc_auc([0.1, 0.2], [0, 2]), "0 or 1"),
    ],
)
def test_wrong_calls_are_answered(its, call, words):
    with pytest.raises(ValueError, match=words):
        call(its)


def test_natural_inputs_are_taken(its, tmp_path, monkeypatch):
    """Paths, generators, numbers of numpy, tensors: as the lists and numbers that they hold."""
    monkeypatch.setenv("TA_CACHE", str(tmp_path / "cache"))
    records = [{"messages": CHAT, "score": np.float32(0.5)}]
    (tmp_path / "d.jsonl").write_bytes(as_line(records[0]))
    ids = prepare(records, its).ids.tolist()
    for given in (tuple(records), (x for x in records), [tmp_path / "d.jsonl"]):
        assert prepare(given, its).ids.tolist() == ids
    prompt = ta.encode_prompt(CHAT, its.tokenizer, USUAL)
    answers = generate([prompt], its)
    assert generate(torch.tensor([prompt]), its) == generate(np.array([prompt]), its) == answers
    assert "labels" in ta.prepare_pairs.__doc__ and ta.prepare_pairs.__self__.name == "pair"
