"""Samples: the prompts of every kind of record, their answers and metrics, and the same on a sharded model."""

import json
import os
from itertools import pairwise

import pytest

from ta.builtin import models, tasks
from ta.chat.encode import encode_prompt
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.folders import ModelConfig
from ta.generation.generate import generate
from ta.generation.metrics import METRICS, check_metrics
from ta.generation.samples import (
    MEASURED,
    Prompt,
    SamplesConfig,
    asked_text,
    dialogue_of,
    generate_samples,
    prompts_of,
)
from ta.generation.settings import GenerateConfig
from ta.model.language_model import wrap
from ta.model.load import load_base

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    models.write_tiny(tmp_path_factory.mktemp("tiny"))
    return load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_end_before_the_answer_wanted(tokenizer):
    """Of a chat, a pair and a labelled answer alike; a rejected answer and a prompt without an answer have nothing to compare with."""
    more = [USER, ANSWER, {"role": "user", "content": "And 3 + 3?"}]
    records = [
        {"messages": [*more, {"role": "assistant", "content": "6"}]},
        {"context": [USER], "answer_w": ANSWER, "answer_l": {"role": "assistant", "content": "5"}},
        {"context": [USER], "answer": {"role": "assistant", "content": "5"}, "is_desirable": False},
        {"context": [USER], "answer": {"role": "bot", "content": "4"}, "is_desirable": True},
        {"messages": more},
    ]
    found = prompts_of(records, tokenizer, ChatConfig())
    one, two = (encode_prompt(m, tokenizer, ChatConfig()) for m in ([USER], more))
    assert found == [
        Prompt(records[0], records[0]["messages"], two, "6"),
        Prompt(records[1], [USER, ANSWER], one, "4"),
        Prompt(records[3], [USER, ANSWER], one, "4"),
        Prompt(records[4], [USER, ANSWER], one, "4"),
    ]
    assert [asked_text(prompt.chat) for prompt in found] == ["And 3 + 3?", *["2 + 2?"] * 3]
    assert dialogue_of(records[3])[-1]["content"] == "4"


def test_a_random_cut_is_seeded_and_asks_before_any_answer(tokenizer):
    turns = [
        {"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")
    ]
    records = [{"messages": turns}] * 40
    found = prompts_of(records, tokenizer, ChatConfig(), 3)
    wanted = [prompt.reference for prompt in found]
    assert set(wanted) == {f"assistant {n}" for n in range(4)} and wanted == [
        p.reference for p in prompts_of(records, tokenizer, ChatConfig(), 3)
    ]
    assert wanted != [p.reference for p in prompts_of(records, tokenizer, ChatConfig(), 4)]
    assert {p.reference for p in prompts_of(records, tokenizer, ChatConfig())} == {"assistant 3"}
    for prompt in found:
        before = turns[: [turn["content"] for turn in turns].index(prompt.reference)]
        assert prompt.ids == encode_prompt(before, tokenizer, ChatConfig())
    assert (
        prompts_of([{"messages": [USER]}], tokenizer, ChatConfig(), 3)[0].reference == ""
    )  # no answer before which to cut


def test_answers_are_the_engines_and_are_measured_kept_and_shown(tokenizer, tmp_path, capsys):
    model, _ = wrap(load_base(ModelConfig()))
    records = tasks.chats("held_out", 6)
    config = SamplesConfig(
        sample_show=2,
        sample_max_new_tokens=5,
        sample_metrics=("accuracy", "rouge_l", "perplexity", "self_bleu"),
    )
    figures = generate_samples(model, tokenizer, records, ChatConfig(), config, tmp_path, 7)
    assert list(figures) == list(config.sample_metrics) and figures["perplexity"] > 1
    kept = lines(tmp_path / "samples.jsonl")
    prompts = [prompt.ids for prompt in prompts_of(records, tokenizer, ChatConfig())]
    settings = GenerateConfig(max_new_tokens=5, stop_strings=tuple(tokenizer.stop_strings))
    assert [k["answer"] for k in kept] == [
        a[0].text for a in generate(model, tokenizer.fast, prompts, settings, tokenizer.stop_ids)
    ]
    assert [(k["step"], k["id"], k["reference"]) for k in kept] == [
        (7, r["id"], r["messages"][-1]["content"]) for r in records
    ]
    shown = capsys.readouterr().err
    assert "samples at step 7" in shown and "book?" in shown and "hat?" not in shown  # two rows
    assert (
        generate_samples(model, tokenizer, [], ChatConfig(), config, tmp_path, 8)
        == {}
        == generate_samples(model, tokenizer, None, ChatConfig(), config, tmp_path, 8)
        and len(lines(tmp_path / "samples.jsonl")) == 6
    )


def test_metrics_that_cannot_be_measured_are_refused_before_anything_is_written(door, tmp_path):
    for name, message in (
        ("blue", "unknown metric 'blue'"),
        ("kl", "needs ref_logprobs"),
        ("recall_at_1", "needs retrieved and gold"),
    ):
        code, text = door("sft", "--sample-metrics", name, "--out", tmp_path / "run")
        assert code == 2 and message in text and not (tmp_path / "run").exists()
    fine = [m for m in METRICS if m.startswith(("rouge", "bleu", "distinct", "meteor", "length"))]
    assert len(fine) > 5
    check_metrics(fine, MEASURED)
    SamplesConfig(sample_metrics=tuple(fine)).check()


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_answers(run, tmp_path):
    """Two processes, each holding a part of the weights, show at step 0 what one shows, and their report tells it."""
    flags = (
        "--steps",
        2,
        "--batch-size",
        4,
        "--sample-records",
        6,
        "--sample-max-new-tokens",
        8,
        "--sample-random-cut",
        "--eval-every",
        1,
    )
    for processes in (1, 2):
        run(
            "sft",
            *flags,
            "--out",
            tmp_path / str(processes),
            processes=processes,
            TA_CACHE=os.environ["TA_CACHE"],
        )
    one, two = (lines(tmp_path / name / "samples.jsonl") for name in "12")
    assert [s for s in one if s["step"] == 0] == [s for s in two if s["step"] == 0]
    assert [s["step"] for s in two] == [0] * 6 + [1] * 6 + [2] * 6 and all(
        a["step"] <= b["step"] for a, b in pairwise(two)
    )
    assert "answer, step 2" in (tmp_path / "2" / "report.html").read_text()
    settings = json.loads((tmp_path / "2" / "config.json").read_text())
    assert settings["machine"]["processes"] == 2 and settings["identity"]["steps"] == 2
