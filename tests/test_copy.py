"""A copy of a recipe is a method of one's own: edited inside the page alone, it trains, logs and resumes as the original does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import ROOT
from safetensors.torch import load_file

from ta.builtin import models, tasks

EDITS = {  # what stands in recipes/dpo.py: what stands in the copy
    # a loss with a flag of its own
    "    average: bool | None = None\n": (
        "    target: Annotated[float | None, Range(0)] = None\n"
        '    """Of squared: the wanted difference of the log-ratios (2)."""\n'
        "    average: bool | None = None\n"
    ),
    '"dpop", "nca_pair", "cal_dpo",\n    ] = "sigmoid"': (
        '"dpop", "nca_pair", "cal_dpo", "squared",\n    ] = "squared"'
    ),
    '    "cal_dpo": {"beta": 0.002},\n': (
        '    "cal_dpo": {"beta": 0.002},\n    "squared": {"target": 2.0},\n'
    ),
    '        case "kto_pair":\n': (
        '        case "squared":\n'
        "            ratios = policy.chosen - ref.chosen - policy.rejected + ref.rejected\n"
        '            return (ratios - settings["target"]) ** 2\n'
        '        case "kto_pair":\n'
    ),
    # another optimizer
    "        ta.make_optimizer(model, optim),\n": (
        "        torch.optim.SGD(model.parameters(), lr=optim.lr, momentum=0.9),\n"
    ),
    "    settings = loss_settings(config)\n": "    import torch\n\n    settings = loss_settings(config)\n",
    # another schedule
    "    optim: ta.OptimConfig = ta.OptimConfig()\n": "    optim: Halving = Halving()\n",
    "@dataclass(frozen=True)\nclass Config:\n": (
        "@dataclass(frozen=True)\n"
        "class Halving(ta.ScheduleConfig):\n"
        "    half_life: int = 100\n"
        "    def lr_at(self, step, steps):\n"
        "        return self.lr * 0.5 ** (step / self.half_life)\n\n\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
    ),
    # another evaluation, without the settings of the old one
    '    samples: ta.SamplesConfig = ta.SamplesConfig(sample_metrics=("accuracy", "contains"))\n': "",
    "        samples = ta.generate_samples(\n"
    "            run,\n"
    "            model,\n"
    "            tokenizer,\n"
    "            val_data,\n"
    "            done,\n"
    "            reference=reference and reference.of_new,\n"
    "        )\n"
    "        return ta.join_figures(figures, samples)\n": (
        "        weights = [p.detach().double().square().sum() for p in model.parameters()]\n"
        '        return {"half_loss": figures["loss"] / 2, "norm": float(sum(weights)) ** 0.5}\n'
    ),
}
STEPS = 40


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The copy, outside of the repository, and its flags."""
    folder = tmp_path_factory.mktemp("mine")
    text = (ROOT / "recipes" / "dpo.py").read_text()
    for old, new in EDITS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "mine.py").write_text(text)
    models.write_tiny(folder / "model")
    for split in ("train", "held_out"):
        tasks.write_jsonl(folder / f"{split}.jsonl", tasks.preferences(split, 16))
    return folder


def command(page, out, *more):
    """What stands after `python` to run the copy as a user does."""
    flags = ("--model-path", page / "model", "--data", page / "train.jsonl", "--out", out)
    flags += ("--val-data", page / "held_out.jsonl", "--batch-size", 2, "--lr", "1e-3")
    flags += ("--steps", STEPS, "--log-every", 1, "--max-tokens", 64, "--target", 3)
    flags += ("--half-life", 20, *more)
    return [str(page / "mine.py"), *map(str, flags)]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def ended(page, out, *more, code=0):
    """What the copy said until its end."""
    done = warm.run(command(page, out, *more), page, environment(), 300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return {row["step"]: row["loss"] for row in logged(out) if "loss" in row}


@pytest.mark.slow
def test_a_copied_page_with_a_method_of_its_own_resumes_bit_for_bit(page, tmp_path):
    ended(page, tmp_path / "whole")
    # the policy is its reference at first: (0 - 3)^2
    assert losses(tmp_path / "whole")[1] == pytest.approx(9.0, abs=1e-5)
    evaluated = [row for row in logged(tmp_path / "whole") if "val_half_loss" in row]
    assert [set(row) for row in evaluated] == [{"step", "val_half_loss", "val_norm"}] * 3
    assert evaluated[0]["val_half_loss"] == pytest.approx(4.5, abs=1e-5)
    assert evaluated[1]["val_norm"] != evaluated[0]["val_norm"] > 1
    last = [losses(tmp_path / "whole")[step] for step in range(STEPS - 9, STEPS + 1)]
    assert sum(last) / 10 < 8
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())["identity"]
    assert settings["optimizer"] == "SGD" and settings["target"] == 3.0
    rates = [row["lr"] for row in logged(tmp_path / "whole") if "lr" in row]
    assert rates == pytest.approx([1e-3 * 0.5 ** (step / 20) for step in range(STEPS)])

    for flag in ("--optimizer=muon", "--beta1=0.5", "--sample-records=3"):
        said = ended(page, tmp_path / "none", flag, code=2)
        assert f"Unrecognized options: {flag[:7]}" in said
    assert settings["clip"] == 1.0 and "beta1" not in settings

    cut = subprocess.Popen(
        [sys.executable, *command(page, tmp_path / "cut")],
        stderr=subprocess.PIPE,
        text=True,
        cwd=page,
        env=environment(),
    )
    log = tmp_path / "cut" / "metrics.jsonl"
    while cut.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.02)
    cut.send_signal(signal.SIGTERM)
    assert cut.wait(timeout=60) == 143, cut.stderr.read()[-3000:]
    assert 0 < max(losses(tmp_path / "cut")) < STEPS
    said = ended(page, tmp_path / "cut", "--resume", "--target", 4, code=2)
    assert "target was 3.0 and is 4.0" in said
    assert "resuming from" in ended(page, tmp_path / "cut", "--resume")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    name = f"checkpoints/step-{STEPS:08d}/shard-0.safetensors"
    ours, theirs = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and any("momentum_buffer/" in key for key in ours)
    assert all(ours[key].equal(theirs[key]) for key in ours)
