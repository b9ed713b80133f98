"""Recipes without a flag, or nearly: held-out figures of tasks with a right answer rise from chance to what the README promises."""

import json
import shutil

import pytest

from ta.builtin import data_files

pytestmark = pytest.mark.slow


def logged(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """recipes/sft.py as a newcomer runs it; what it exports is the model that preference recipes start from."""
    import subprocess
    import sys

    from conftest import ROOT

    out = tmp_path_factory.mktemp("sft") / "run"
    subprocess.run(
        [sys.executable, str(ROOT / "recipes/sft.py"), "--out", str(out)],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    data_files.tiny_folder()
    shutil.copytree(
        out / "final", data_files.tuned_folder()
    )  # as warm_start would leave it: the same steps from the same seed
    return out


def test_sft_learns_to_answer(taught):
    """Exact match on held-out chats from under 5 % to at least 90 %."""
    figures = [row["val_accuracy"] for row in logged(taught) if "val_accuracy" in row]
    assert figures[0] < 0.05 and figures[-1] >= 0.9


@pytest.mark.parametrize(
    ("recipe", "start", "end"),
    [
        ("rm", {}, {"ranking_accuracy": 0.95}),
        ("dpo", {"reward_accuracy": 0.5}, {"reward_accuracy": 0.9}),
        ("kto", {"preference": 0.5}, {"preference": 0.9}),
    ],
)
def test_preferences_are_learned_and_the_task_stays(taught, forked, tmp_path, recipe, start, end):
    said = forked(recipe, "--out", tmp_path / "run", "--cherry-records", 256)
    rows = logged(tmp_path / "run")
    for name, value in start.items():
        assert rows[0][f"val_{name}"] == value
    for name, least in end.items():
        assert rows[-1][f"val_{name}"] >= least and name in said
    if recipe != "rm":
        assert (
            rows[-1]["val_accuracy"] >= rows[0]["val_accuracy"] - 0.03
            and rows[0]["val_accuracy"] > 0.9
        )
