"""dpo, kto, rm and classify as a user runs them: from flags to an export that plain transformers loads, and wrong input answered in two lines."""

import json
import math
import os

import judged
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ta.builtin import fine_tuned, models, tasks
from ta.model.adapters import load_adapter

KIND = {"dpo": "preferences", "rm": "preferences", "kto": "labelled", "classify": "classes"}
QUICK = (
    "--steps",
    3,
    "--batch-size",
    8,
    "--sample-max-new-tokens",
    4,
    "--sample-records",
    12,
    "--log-every",
    1,
)
FIGURES = {
    "dpo": {
        "reward_chosen",
        "reward_rejected",
        "reward_margin",
        "reward_accuracy",
        "logp_chosen",
        "logp_rejected",
    },
    "kto": {
        "reward_desirable",
        "reward_undesirable",
        "reward_margin",
        "reward_accuracy",
        "logp",
        "kl",
    },
    "rm": {"ranking_accuracy", "reward_chosen", "reward_rejected", "reward_gap"},
    "classify": {"accuracy"},
}
HELD_OUT = {
    "dpo": {"accuracy"},
    "kto": {"accuracy", "preference"},
    "rm": set(),
    "classify": {"balanced_accuracy", "precision", "recall", "f1"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for kind in sorted(set(KIND.values())):
        for split, n in (("train", 40), ("held_out", 12)):
            tasks.write_jsonl(folder / f"{kind}-{split}.jsonl", getattr(tasks, kind)(split, n))
    return folder


def flags(recipe, model, data, out, *more):
    source = [data / f"{KIND[recipe]}-{split}.jsonl" for split in ("train", "held_out")]
    return (
        "--model-path",
        model,
        "--data",
        source[0],
        "--val-data",
        source[1],
        "--out",
        out,
        *QUICK,
        *more,
    )


def logged(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", KIND)
def test_from_flags_to_a_folder_that_plain_transformers_loads(run, recipe, model, data, tmp_path):
    out = tmp_path / "run"
    done = run(recipe, *flags(recipe, model, data, out))
    rows = logged(out)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3] and "done:" in done.stderr
    assert FIGURES[recipe] | {"loss", "grad_norm", "lr"} <= rows[1].keys()
    assert {f"val_{name}" for name in FIGURES[recipe] | HELD_OUT[recipe]} <= rows[0].keys()
    assert "samples at step 0" in done.stderr and (out / "samples.jsonl").exists()
    labels = {"rm": 1, "classify": 3}.get(recipe)
    loaded = (
        AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    ).from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=False
    )
    assert loaded(ids).logits.isfinite().all() and (
        not labels or loaded.config.num_labels == labels
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("dpo", ("--loss", "kto_pair")),
        ("dpo", ("--reference", "cached")),
        ("dpo", ("--reference", "synced", "--sync-every", 1)),
        ("kto", ("--adapter", "lora")),
        ("rm", ("--adapter", "lora")),
        ("classify", ("--class-weights", "auto")),
    ],
)
def test_two_processes_give_the_losses_and_the_export_of_one(
    forked, recipe, more, model, data, tmp_path
):
    for n in (1, 2):
        forked(
            recipe,
            *flags(recipe, model, data, tmp_path / str(n), "--lr", "1e-3", *more),
            processes=n,
        )
    one, two = (logged(tmp_path / str(n)) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        passing = {key for key in a if "second" in key}
        for key in a.keys() - passing - {"memory_gb", "val_accuracy", "val_reward_accuracy"}:
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4), key
    files = "adapter_model.safetensors" if "--adapter" in more else "model.safetensors"
    one, two = (load_file(tmp_path / str(n) / "final" / files) for n in (1, 2))
    assert one.keys() == two.keys() and any("score" in name for name in one) == (
        recipe in ("rm", "classify")
    )
    start = load_file(model / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=2e-3)
        assert name not in start or one[name].shape == start[name].shape


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rm", "classify"])
def test_a_head_is_saved_with_its_adapter(forked, recipe, model, data, tmp_path):
    """The export scores, after a new start, what the run's last evaluation scored; going on with it starts from there."""
    out, labels = tmp_path / "run", {"rm": 1, "classify": 3}[recipe]
    forked(recipe, *flags(recipe, model, data, out, "--adapter", "lora", "--lr", "1e-2"))
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=labels)
    whole = load_adapter(base, str(out / "final"))
    assert "score" in " ".join(load_file(out / "final" / "adapter_model.safetensors"))
    assert whole(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    forked(
        recipe,
        *flags(
            recipe, model, data, tmp_path / "next", "--adapter-path", out / "final", "--lr", "1e-9"
        ),
    )
    assert logged(tmp_path / "next")[0]["val_loss"] == pytest.approx(
        logged(out)[-1]["val_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_a_cached_reference_and_lora_across_a_resume(forked, model, data, tmp_path):
    """adapter_off and cached give the same losses; a run that was cut by --steps... is the same run when it goes on."""
    for kind in ("adapter_off", "cached"):
        forked(
            "kto",
            *flags(
                "kto",
                model,
                data,
                tmp_path / kind,
                "--adapter",
                "lora",
                "--reference",
                kind,
                "--lr",
                "1e-3",
            ),
        )
    one, two = (logged(tmp_path / kind) for kind in ("adapter_off", "cached"))
    one, two = ([row["loss"] for row in rows if "loss" in row] for rows in (one, two))
    assert len(one) == 3 and one == pytest.approx(two, rel=1e-5)
    again = forked(
        "kto",
        *flags(
            "kto",
            model,
            data,
            tmp_path / "cached",
            "--adapter",
            "lora",
            "--reference",
            "cached",
            "--lr",
            "1e-3",
            "--resume",
        ),
    )
    assert "reference log-probabilities of 40 records: from" in again and "at step 3" in again
    changed = forked(
        "kto",
        *flags(
            "kto", model, data, tmp_path / "cached", "--adapter", "lora", "--lr", "1e-3", "--resume"
        ),
        code=2,
    )
    assert "reference was 'cached' and is 'auto'" in changed


def write(path, records):
    tasks.write_jsonl(path, records)
    return path


def test_wrong_input_is_answered_before_anything_is_written(door, model, data, tmp_path):
    out = tmp_path / "run"
    pair = tasks.preferences("train", 4)
    lacking = write(
        tmp_path / "lacking.jsonl",
        [*pair[:2], {k: v for k, v in pair[2].items() if k != "answer_l"}],
    )
    equal = write(tmp_path / "equal.jsonl", [{**p, "answer_l": p["answer_w"]} for p in pair])
    labels = write(
        tmp_path / "labels.jsonl",
        [{**r, "label": i} for i, r in enumerate(tasks.classes("train", 5))],
    )
    models.write_tiny(tmp_path / "three", num_labels=3)
    cases = (
        ("dpo", ("--loss", "simpo", "--reference", "frozen"), "--loss simpo has no reference"),
        ("dpo", ("--loss", "hinge", "--gamma", "1"), "--gamma 1.0 would have no effect"),
        (
            "dpo",
            ("--loss", "sigmoid_with_margin"),
            "preferences-train.jsonl:1, and this loss is made of margins",
        ),
        ("dpo", ("--reference", "adapter_off"), "there is no adapter"),
        ("dpo", ("--adapter", "lora", "--lora-dropout", "0.1"), "--lora-dropout 0.1"),
        ("dpo", ("--data", lacking), "lacking.jsonl:3"),
        ("rm", ("--data", equal), "chosen equals rejected"),
        ("kto", ("--beta", "0"), "--beta 0.0: give a number above 0 to 2147483647\n"),
        ("rm", ("--adapter", "prompt"), "PROMPT_TUNING with a classification head"),
        ("rm", ("--model-path", tmp_path / "three"), "has a head of 3 labels where 1 are asked"),
        ("classify", ("--data", labels), "labels.jsonl:4 has label 3 of --num-labels 3"),
        ("classify", ("--class-weights", "1", "2"), "give auto, or 3 numbers"),
        ("classify", ("--gamma", "-1"), "--gamma -1.0: give a number from 0 to 2147483647"),
    )
    for recipe, more, words in cases:
        code, said = door(recipe, *flags(recipe, model, data, out, *more))
        assert code == 2 and words in said, (recipe, more, said)
        assert not out.exists(), (recipe, more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"), [("adapter_off", 2), ("frozen", 2), ("cached", 1), ("synced", 1)]
)
def test_rounded_to_bfloat16_the_policy_still_starts_at_its_reference(
    forked, model, data, tmp_path, kind, processes
):
    more = (
        "--dtype",
        "bfloat16",
        "--adapter",
        "lora",
        "--reference",
        kind,
        "--sample-records",
        0,
        "--steps",
        1,
    )
    more += ("--sync-every", 1) if kind == "synced" else ()
    forked("dpo", *flags("dpo", model, data, tmp_path / "run"), *more, processes=processes)
    assert logged(tmp_path / "run")[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_an_unknown_loss_is_answered_with_those_that_there_are(door, model, data, tmp_path):
    more = ("--loss", "squared", "--beta", 2.0)
    code, said = door("dpo", *flags("dpo", model, data, tmp_path / "run"), *more)
    assert code == 2 and "--loss" in said and not (tmp_path / "run").exists()
    assert all(name in said for name in judged.recipe("dpo").FLAGS)


def test_a_share_of_equal_pairs_is_counted(door, model, data, tmp_path):
    pair = tasks.preferences("train", 40)
    pair[3]["answer_l"] = pair[3]["answer_w"]
    mixed = write(tmp_path / "mixed.jsonl", pair)
    more = flags("rm", model, data, tmp_path / "run", "--data", mixed, "--steps", 1)
    code, said = door("rm", *more)
    assert (
        code == 2
        and f"{mixed}:4: chosen equals rejected" in said
        and "--max-bad-share 0.01" in said
    )
    code, said = door("rm", *more, "--max-bad-share", 0.05)
    assert code == 0 and "dropped 1: chosen equals rejected" in said and ":4" in said
    assert torch.isfinite(
        torch.tensor([row.get("loss", 0.0) for row in logged(tmp_path / "run")])
    ).all()


@pytest.mark.slow
def test_without_a_model_the_built_in_one_is_fine_tuned_once(forked, data, tmp_path):
    """By one of two processes; that of one alone is what others of these tests start from."""

    def before(rank):
        os.environ["TA_CACHE"] = str(tmp_path / "cache")
        for name in (fine_tuned.TUNED, fine_tuned.WORDY):
            fine_tuned.FINE_TUNINGS[name] = fine_tuned.FINE_TUNINGS[name]._replace(steps=2)

    more = ("--data", data / "preferences-train.jsonl", *QUICK)
    first, second = (
        forked("dpo", *more, "--out", tmp_path / name, processes=2, before=before) for name in "ab"
    )
    assert "fine-tuning the built-in model" in first and "fine-tuning" not in second
    assert (logged(tmp_path / "a")[0]["loss"], logged(tmp_path / "a")[1]["loss"]) == tuple(
        r["loss"] for r in logged(tmp_path / "b")[:2]
    )
