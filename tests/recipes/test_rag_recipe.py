"""rag and generate --index as a user runs them: from passages to named answers, on two processes, across a stop; wrong input in two lines."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from ta.builtin import models, tasks
from ta.rag.embedding_settings import EncoderConfig
from ta.rag.index import begin_index, build_index, open_index

QUICK = (
    "--steps",
    4,
    "--batch-size",
    6,
    "--cherry-max-new-tokens",
    4,
    "--cherry-records",
    6,
    "--log-every",
    1,
    "--lr",
    "1e-3",
)
FIGURES = {
    "recall_at_1",
    "recall_at_3",
    "recall_at_5",
    "mrr",
    "retrieval_utility",
    "accuracy",
    "loss",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Generator, encoder, questions and an index of 60 passages."""
    folder = tmp_path_factory.mktemp("given")
    models.write_small(folder / "model")
    models.write_encoder(folder / "encoder")
    kept = tasks.passages()[:60]
    names = {p["id"] for p in kept}
    tasks.write_jsonl(folder / "passages.jsonl", kept)
    for split, n in (("train", 40), ("held_out", 12)):
        found = [q for q in tasks.questions(split, 1000) if q["gold"][0] in names][:n]
        tasks.write_jsonl(folder / f"{split}.jsonl", found)
    begin_index(
        folder / "index",
        [str(folder / "passages.jsonl")],
        EncoderConfig(encoder_path=str(folder / "encoder")),
    )
    build_index(folder / "index", "cpu")
    return folder


def flags(given, out, *more):
    places = (
        "--model-path",
        given / "model",
        "--index",
        given / "index",
        "--data",
        given / "train.jsonl",
        "--val-data",
        given / "held_out.jsonl",
    )
    return *places, "--out", out, "--num-passages", 3, "--encoder-lr", "1e-3", *QUICK, *more


def logged(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.slow
def test_from_an_index_to_answers_that_name_their_passages(forked, given, tmp_path):
    out, final = tmp_path / "run", tmp_path / "run" / "final"
    said = forked("rag", *flags(given, out, "--reembed-every", 2, "--adapter", "lora"))
    rows = logged(out)
    assert {f"val_{name}" for name in FIGURES} <= rows[0].keys() and rows[0].keys() == rows[
        -1
    ].keys()
    assert "best_weight" in rows[1] and "samples at step 4" in said
    (sample, *_) = (json.loads(line) for line in open(out / "samples.jsonl"))
    (passage,) = sample["passages"]
    assert sample["prompt"].startswith(passage["id"].replace("-", " ")) and isinstance(
        passage["score"], float
    )
    index = open_index(final / "index")
    assert index.encoder == str(final / "encoder") and index.vectors.shape == (60, 128)
    assert not torch.equal(index.vectors, open_index(given / "index").vectors)
    words = [
        AutoModel.from_pretrained(folder / "encoder").embeddings.word_embeddings.weight
        for folder in (final, given)
    ]
    assert not torch.equal(*words)
    answers = tmp_path / "answers.jsonl"
    ask = ("--data", given / "held_out.jsonl", "--max-new-tokens", 3, "--out", answers)
    forked("generate", "--model-path", final, "--index", final / "index", *ask)
    records = [json.loads(line) for line in open(answers)]
    assert len(records) == 12 and all(
        len(r["passages"]) == 1 and r["answers"] and len(r["messages"]) == 1 for r in records
    )
    forked(
        "generate",
        "--model-path",
        final,
        "--index",
        final / "index",
        "--num-passages",
        3,
        "--with-prompt",
        *ask,
        "--overwrite",
    )
    for record in map(json.loads, open(answers)):
        scores = [passage["score"] for passage in record["passages"]]
        places = [
            record["prompt"].index(passage["id"].replace("-", " "))
            for passage in record["passages"]
        ]
        assert (
            len(scores) == 3 and scores == sorted(scores, reverse=True) and places == sorted(places)
        )


@pytest.mark.slow
def test_two_processes_give_the_losses_and_the_export_of_one(forked, given, tmp_path):
    for n in (1, 2):
        forked(
            "rag",
            *flags(given, tmp_path / str(n), "--in-batch", 2, "--reembed-every", 2),
            processes=n,
        )
    one, two = (logged(tmp_path / str(n)) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        passing = {key for key in a if "second" in key}
        for key in a.keys() - passing - {"memory_gb", "val_accuracy"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), key
    for name in ("model.safetensors", "encoder/model.safetensors", "index/vectors.safetensors"):
        one, two = (load_file(tmp_path / str(n) / "final" / name) for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-2, atol=2e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "final") is not None


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(forked, given, tmp_path):
    """Checkpoints before and after a re-embedding: the table of passages is the one that was searched."""
    more = ("--reembed-every", 2, "--steps", 6, "--save-every", 3, "--keep", 0)
    forked("rag", *flags(given, tmp_path / "whole", *more))
    out = tmp_path / "cut"
    forked("rag", *flags(given, out, *more))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    shutil.rmtree(out / "final")
    shutil.copytree(given / "index", tmp_path / "moved")  # an index is compared by content
    encoder = ("--index", tmp_path / "moved", "--encoder-path", given / "encoder")
    said = forked("rag", *flags(given, out, *more, *encoder, "--resume"))
    assert "at step 3" in said
    for name in ("model.safetensors", "encoder/model.safetensors", "index/vectors.safetensors"):
        assert (out / "final" / name).read_bytes() == (
            tmp_path / "whole" / "final" / name
        ).read_bytes()
    losses = [
        [row["loss"] for row in logged(folder) if "loss" in row]
        for folder in (out, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_wrong_input_is_answered_before_anything_is_written(door, given, tmp_path):
    out = tmp_path / "run"
    models.write_encoder(tmp_path / "other", seed=3)
    chat = {"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]}
    asked = tasks.questions("train", 1)[0]
    tasks.write_jsonl(tmp_path / "none.jsonl", [chat])
    tasks.write_jsonl(tmp_path / "odd.jsonl", [asked | {"gold": [True]}])
    tasks.write_jsonl(tmp_path / "gone.jsonl", [asked | {"gold": "nowhere"}])
    cases = (
        (("--index", tmp_path / "nothing"), "no index at"),
        (("--encoder-path", tmp_path / "other"), "was built with another encoder"),
        (("--num-passages", 61), "--num-passages 61: "),
        (("--num-passages", 0), "--num-passages 0: give a number from 1 to 2147483647"),
        (
            ("--data", tmp_path / "none.jsonl"),
            "none.jsonl:1: no message of a user comes before the answer",
        ),
        (("--data", tmp_path / "odd.jsonl"), "odd.jsonl:1: gold is"),
        (("--data", tmp_path / "gone.jsonl"), "gone.jsonl:1: gold names passage 'nowhere'"),
        (("--max-tokens", 8), "all 40 records are dropped"),
        (("--in-batch", -1), "--in-batch -1: give a number from 0 to 2147483647"),
        (("--score-scale", 0), "--score-scale 0.0: give a number above 0 to 2147483647"),
    )
    for more, words in cases:
        code, said = door("rag", *flags(given, out, *more))
        assert code == 2 and words in said, (more, said)
        assert not out.exists(), more
    code, said = door(
        "rag", *flags(given, out, "--max-tokens-per-micro", 60)
    )  # known when the first passages are found
    assert code == 2 and "more than --max-tokens-per-micro 60" in said and not out.exists()


def test_wrong_input_of_answering_from_an_index(door, given, tmp_path):
    base = (
        "--model-path",
        given / "model",
        "--data",
        given / "held_out.jsonl",
        "--out",
        tmp_path / "out.jsonl",
    )
    tasks.write_jsonl(
        tmp_path / "long.jsonl", [{"messages": [{"role": "user", "content": "key " * 99}]}]
    )
    cases = (
        (("--num-passages", 2), "settings of retrieval without --index"),
        (("--index", tmp_path / "nothing"), "no index at"),
        (
            ("--index", given / "index", "--num-passages", 61),
            "holds 60 passages; give at most that",
        ),
        (
            ("--index", given / "index", "--data", tmp_path / "long.jsonl", "--max-tokens", 50),
            "can be answered",
        ),
    )
    for more, words in cases:
        code, said = door("generate", *base, *more)
        assert code == 2 and words in said, (more, said)
        assert not (tmp_path / "out.jsonl").exists()


def test_evaluate_measures_what_a_passage_adds(door, given, tmp_path):
    """Of an index of one passage: log p of each answer behind it less that without it, a token, by plain transformers."""
    passage = {"id": "one", "title": "Keys", "text": "Anna's is red tea."}
    tasks.write_jsonl(tmp_path / "passages.jsonl", [passage])
    encoder = EncoderConfig(encoder_path=str(given / "encoder"))
    begin_index(tmp_path / "index", [str(tmp_path / "passages.jsonl")], encoder)
    build_index(tmp_path / "index", "cpu")
    flags = ("--model-path", given / "model", "--data", f"{given / 'held_out.jsonl'}@4")
    flags += ("--index", tmp_path / "index", "--num-passages", 1, "--out", tmp_path / "out.json")
    code, said = door("evaluate", *flags, "--perplexity")
    assert code == 0, said
    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    model = AutoModelForCausalLM.from_pretrained(given / "model").double()

    def learned(messages):
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        asked = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [logps[i - 1, ids[i]].item() for i in range(len(asked), len(ids))]

    found = json.loads((tmp_path / "out.json").read_text())
    asked = {q["id"]: q["messages"] for q in map(json.loads, open(given / "held_out.jsonl"))}
    assert len(found["records"]) == 4
    for record in found["records"]:
        *before, question, answer = asked[record["id"]]
        behind = {**question, "content": "Keys\nAnna's is red tea.\n\n" + question["content"]}
        alone, after = learned([*before, question, answer]), learned([*before, behind, answer])
        wanted = (sum(after) - sum(alone)) / len(alone)
        assert record["retrieval_utility"] == [pytest.approx(wanted, abs=1e-4)]
        assert record["perplexity"] == [pytest.approx(math.exp(-sum(alone) / len(alone)), rel=1e-4)]
    assert found["figures"]["retrieval_utility"]["value"] == pytest.approx(
        sum(record["retrieval_utility"][0] for record in found["records"]) / 4
    )
    for more, words in (
        (("--index", tmp_path / "index", "--answers", tmp_path / "out.json"), "--index"),
        (("--perplexity", "--metrics", "bleu"), "generates nothing"),
        (("--num-passages", 2), "--index"),
    ):
        code, said = door("evaluate", *more, "--out", tmp_path / "none.json")
        assert code == 2 and words in said, said
