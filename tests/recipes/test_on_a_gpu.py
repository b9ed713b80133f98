"""Recipes on a GPU, as a user runs them: in float32 the figures of the CPU, to rounding; tests with `-m gpu` see the GPU, all others do not."""

import json
import math

import pytest
import torch
from conftest import COMPILES_ON_GPU

from ta.builtin.model_folders import tiny_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
FEW = ("--steps", 3, "--batch-size", 8, "--log-every", 1, "--sample-records", 0)
TINY = ("--model-path", "TINY")
RECIPES = {
    "sft": TINY,
    "dpo": TINY,
    "kto": TINY,
    "rm": TINY,
    "classify": TINY,
    "multimodal": (),
    "rag": TINY,
    "grpo": (*TINY, "--max-new-tokens", 8, "--rewards", "length:20"),
    "distill": (*TINY, "--teacher-path", "TINY", "--max-new-tokens", 8),
}


def figures(run, recipe, out, *flags, **environment):
    """What a short run logs: its losses, and what the last evaluation found."""
    model = [tiny_folder() if flag == "TINY" else flag for flag in RECIPES[recipe]]
    run(recipe, *model, *FEW, *flags, "--out", out, **environment)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and (out / "final").is_dir()
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    return losses + held_out[-1:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_the_figures_of_the_cpu(run, tmp_path, recipe):
    ours = figures(run, recipe, tmp_path / "gpu", "--dtype", "float32")
    theirs = figures(run, recipe, tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    if recipe in ("grpo", "distill"):
        # a draw that rounding decides gives other answers
        assert len(ours) == len(theirs)
    else:
        assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_in_bfloat16(run, tmp_path, recipe):
    more = {"grpo": "--deterministic", "multimodal": "--deterministic"}
    if COMPILES_ON_GPU:
        more["dpo"] = "--compile"
    figures(run, recipe, tmp_path / "run", *filter(None, [more.get(recipe)]))


def test_answers_and_scores_of_a_run_are_those_of_the_cpu(run, tmp_path):
    """Greedy answers and rewards, in float32."""
    figures(run, "sft", tmp_path / "sft")
    figures(run, "rm", tmp_path / "rm")
    asked = [{"messages": [{"role": "user", "content": f"{word}?"}]} for word in ("cup", "a", "b")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = {}
    for name, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        answers, scores = tmp_path / f"answers-{name}.jsonl", tmp_path / f"scores-{name}.jsonl"
        common = ("--dtype", "float32", "--out")
        flags = ("--data", tmp_path / "asked.jsonl", "--max-new-tokens", 12)
        run("generate", "--model-path", tmp_path / "sft", *flags, *common, answers, **environment)
        flags = ("--data", tmp_path / "answers-gpu.jsonl")
        run("score", "--model-path", tmp_path / "rm", *flags, *common, scores, **environment)
        rows = map(json.loads, answers.read_text().splitlines())
        rewards = map(json.loads, scores.read_text().splitlines())
        found[name] = list(rows), [reward for row in rewards for reward in row["rewards"].values()]
    ours, theirs = found["gpu"], found["cpu"]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert [x["content"] for x in a["answers"]] == [x["content"] for x in b["answers"]]
    assert ours[1] == pytest.approx(theirs[1], abs=1e-4)
