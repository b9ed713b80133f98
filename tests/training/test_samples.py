"""Samples: the prompts of every kind of record, their answers and metrics, and the same on a sharded model."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest

from ta.builtin import models, tasks
from ta.chat.encode import encode_chat, encode_prompt
from ta.chat.template import ChatConfig
from ta.chat.tokenizer import TokenizerConfig, load_chat_tokenizer
from ta.folders import ModelConfig
from ta.generation.generate import generate
from ta.generation.metrics import METRICS, check_metrics
from ta.generation.settings import MEASURED, GenerateConfig, SamplesConfig
from ta.model.language_model import wrap
from ta.model.load import load_base
from ta.reference import sequence_logps
from ta.training.run_folder import LoopConfig, Run
from ta.training.samples import (
    Prompt,
    asked_text,
    dialogue_of,
    generate_samples,
    prompts_of,
)

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    models.write_tiny(tmp_path_factory.mktemp("tiny"))
    return load_chat_tokenizer(ModelConfig(), TokenizerConfig(), ChatConfig())


def run_of(config, folder):
    """A run with these settings of samples, which writes into a folder."""
    settings = SimpleNamespace(samples=config, chat=ChatConfig())
    return Run(LoopConfig(out=str(folder)), config=settings)


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
        {"messages": [USER, *({"role": "bot", "content": text} for text in ("good", "hi"))]},
    ]
    found = prompts_of(records, tokenizer, ChatConfig())
    one, two = (encode_prompt(m, tokenizer, ChatConfig()) for m in ([USER], more))
    assert found == [
        Prompt(records[0], more, two, "6"),
        Prompt(records[1], [USER], one, "4"),
        Prompt(records[3], [USER], one, "4"),
        Prompt(records[4], more, two, None),  # the question at its end has no answer yet
        Prompt(records[5], [USER], one, "good"),  # the answer that follows the question
    ]
    asked = ["And 3 + 3?", "2 + 2?", "2 + 2?", "And 3 + 3?", "2 + 2?"]
    assert [asked_text(prompt.chat) for prompt in found] == asked
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
        prompts_of([{"messages": [USER]}], tokenizer, ChatConfig(), 3)[0].reference is None
    )  # no answer before which to cut


def test_answers_are_the_engines_and_are_measured_kept_and_shown(tokenizer, tmp_path, capsys):
    model, _ = wrap(load_base(ModelConfig()))
    records = tasks.chats("held_out", 6)
    config = SamplesConfig(
        sample_show=2,
        sample_max_new_tokens=5,
        sample_metrics=("accuracy", "rouge_l", "perplexity", "self_bleu"),
    )
    figures = generate_samples(run_of(config, tmp_path), model, tokenizer, records, 7)
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
        generate_samples(run_of(config, tmp_path), model, tokenizer, [], 8)
        == {}
        == generate_samples(run_of(config, tmp_path), model, tokenizer, None, 8)
        and len(lines(tmp_path / "samples.jsonl")) == 6
    )


def with_answer(text):
    return {"messages": [USER, {"role": "assistant", "content": text}]}


def test_settings_sources_and_metrics_of_several_answers(tokenizer, tmp_path, capsys):
    """Figures carry the names of settings and sources; each is what the metric gives for those answers."""
    model, _ = wrap(load_base(ModelConfig()))
    for name, answers in (("easy", ["4", "5"]), ("hard", ["6", "7", "8"])):
        tasks.write_jsonl(tmp_path / f"{name}.jsonl", [with_answer(text) for text in answers])
    config = SamplesConfig(
        samples_data=(str(tmp_path / "easy.jsonl"), f"{tmp_path / 'hard.jsonl'}@2,system=Short."),
        sample_records=2,
        sample_max_new_tokens=4,
        sample_settings=("beam:beams=2", "warm:temperature=1.5,num_answers=3"),
        sample_metrics=(
            "rouge_l_characters",
            "self_bleu_of_prompt",
            "adjusted_distinct_1",
            "length",
        ),
    )
    config.check()
    figures = generate_samples(run_of(config, tmp_path), model, tokenizer, None, 0)
    names = [
        f"{m}@{s}{of}"
        for s in ("beam", "warm")
        for of in ("", "/easy", "/hard")
        for m in config.sample_metrics
    ]
    assert list(figures) == names
    rows = lines(tmp_path / "samples.jsonl")
    assert len({row["row"] for row in rows}) == len(rows) == 4 + 12
    warm = [row for row in rows if row["settings"] == "warm"]
    hard = [row["answer"] for row in warm if row["source"] == "hard"]
    assert figures["length@warm/hard"] == METRICS["length"].function(hard)
    of_prompt = METRICS["self_bleu_of_prompt"].function([hard[:3], hard[3:]])
    assert figures["self_bleu_of_prompt@warm/hard"] == of_prompt
    references = [row["reference"] for row in warm]
    assert figures["rouge_l_characters@warm"] == METRICS["rouge_l_characters"].function(
        [row["answer"] for row in warm], references
    )
    assert {row["chat"][0]["role"] for row in warm} == {"user", "system"}
    assert "samples at step 0, warm" in capsys.readouterr().err
    generate_samples(run_of(config, tmp_path), model, tokenizer, None, 5)
    said = capsys.readouterr().err
    assert (
        "samples at step 5, warm, 0 of 12 answers changed since the last time" in said
        and "(the same)" in said
    )
    with pytest.raises(ValueError, match="use a name twice"):
        SamplesConfig(sample_settings=("a:beams=2", "a:beams=3")).check()


def test_figures_of_references_leave_out_answers_without_one(tokenizer, tmp_path):
    model, _ = wrap(load_base(ModelConfig()))
    records = [with_answer("4"), {"messages": [USER]}]
    config = SamplesConfig(sample_max_new_tokens=3, sample_metrics=("accuracy", "length"))
    figures = generate_samples(run_of(config, tmp_path), model, tokenizer, records, 0)
    given = [row["answer"] for row in lines(tmp_path / "samples.jsonl")]
    assert figures["accuracy"] == float(given[0].strip() == "4") and len(given) == 2
    assert figures["length"] == METRICS["length"].function(given)
    alone = generate_samples(run_of(config, tmp_path), model, tokenizer, records[1:], 1)
    assert list(alone) == ["length"]


def test_sources_of_one_file_name_have_figures_of_their_own(tokenizer, tmp_path):
    """Their names are those that training gives them: the folders that tell them apart."""
    model, _ = wrap(load_base(ModelConfig()))
    for i, name in enumerate(("easy", "hard")):
        (tmp_path / name).mkdir()
        tasks.write_jsonl(tmp_path / name / "test.jsonl", tasks.chats("held_out", 4)[i::2])
    files = tuple(str(tmp_path / name / "test.jsonl") for name in ("easy", "hard"))
    config = SamplesConfig(samples_data=files, sample_max_new_tokens=2)
    figures = generate_samples(run_of(config, tmp_path), model, tokenizer, None, 0)
    assert list(figures) == ["accuracy", "accuracy/easy/test", "accuracy/hard/test"]


def test_rewards_and_the_distance_from_a_reference_equal_plain_transformers(tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    models.write_tiny(tmp_path / "rm", num_labels=1, seed=3)
    model, _ = wrap(load_base(ModelConfig()))
    other, _ = wrap(load_base(ModelConfig()))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    config = SamplesConfig(
        sample_max_new_tokens=5,
        sample_metrics=("kl_to_reference",),
        sample_reward_model=str(tmp_path / "rm"),
    )
    records = tasks.chats("held_out", 5)

    def same(batch):
        return sequence_logps(model, batch)

    def moved(batch):
        return sequence_logps(other, batch)

    for reference in (same, moved):
        figures = generate_samples(
            run_of(config, tmp_path), model, tokenizer, records, 0, reference=reference
        )
        assert list(figures) == ["kl_to_reference", "reward"]
        if reference is same:
            assert figures["kl_to_reference"] == 0
            (tmp_path / "samples.jsonl").unlink()
    rows, gap, tokens, rewards = lines(tmp_path / "samples.jsonl"), 0.0, 0, []
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    settings = GenerateConfig(max_new_tokens=5, stop_strings=tuple(tokenizer.stop_strings))
    prompts = prompts_of(records, tokenizer, ChatConfig())
    answers = generate(
        model, tokenizer.fast, [p.ids for p in prompts], settings, tokenizer.stop_ids
    )
    with torch.no_grad():
        for prompt, (answer,), row in zip(prompts, answers, rows, strict=True):
            ids = torch.tensor([prompt.ids + answer.ids])
            at = torch.arange(len(prompt.ids) - 1, ids.shape[1] - 1)
            ours, theirs = (
                m.inner.double()(ids).logits[0].log_softmax(-1)[at, ids[0, at + 1]].sum()
                for m in (model, other)
            )
            gap, tokens = gap + (ours - theirs).item(), tokens + len(answer.ids)
            chat = [*prompt.chat, {"role": "assistant", "content": row["answer"]}]
            scored = judge(torch.tensor([encode_chat(chat, tokenizer, ChatConfig()).ids])).logits
            rewards.append(scored.item())
    assert figures["kl_to_reference"] == pytest.approx(gap / tokens, rel=1e-3)
    assert [row["reward"] for row in rows] == pytest.approx(rewards, abs=1e-4)
    assert figures["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    with pytest.raises(ValueError, match="metric kl_to_reference: this run has no reference"):
        generate_samples(run_of(config, tmp_path), model, tokenizer, records, 0)


def test_metrics_that_cannot_be_measured_are_refused_before_anything_is_written(door, tmp_path):
    for name, message in (
        ("blue", "unknown metric 'blue'"),
        ("reward", "give a reward model's folder in --sample-reward-model"),
        ("recall_at_1", "needs retrieved and gold"),
    ):
        code, text = door("sft", "--sample-metrics", name, "--out", tmp_path / "run")
        assert code == 2 and message in text and not (tmp_path / "run").exists()
    fine = [m for m in METRICS if m.startswith(("rouge", "bleu", "distinct", "meteor", "length"))]
    assert len(fine) > 5
    check_metrics(fine, MEASURED)
    SamplesConfig(sample_metrics=tuple(fine)).check()


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_answers(forked, tmp_path):
    """Two processes, each holding a part of the weights, show at step 0 what one shows, and their report tells it."""
    tasks.write_jsonl(tmp_path / "train.jsonl", tasks.chats("train", 16))
    tasks.write_jsonl(tmp_path / "held_out.jsonl", tasks.chats("held_out", 12))
    flags = (
        "--data",
        tmp_path / "train.jsonl",
        "--val-data",
        tmp_path / "held_out.jsonl",
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
        forked("sft", *flags, "--out", tmp_path / str(processes), processes=processes)
    one, two = (lines(tmp_path / name / "samples.jsonl") for name in "12")
    assert [s for s in one if s["step"] == 0] == [s for s in two if s["step"] == 0]
    assert [s["step"] for s in two] == [0] * 6 + [1] * 6 + [2] * 6 and all(
        a["step"] <= b["step"] for a, b in pairwise(two)
    )
    page = (tmp_path / "2" / "report.html").read_text()
    assert "step 0" in page and "step 2" in page
    settings = json.loads((tmp_path / "2" / "config.json").read_text())
    assert settings["machine"]["processes"] == 2 and settings["identity"]["steps"] == 2
