"""A run that is stopped anywhere, by a signal or without one, and started again tells the story of a run that was not: weights, logged losses, evaluations and samples."""

import json
import os
import signal

import pytest
import torch
from small import prepared, sft_step, tiny

from ta.data.loader import train_batches, val_batches
from ta.data.micro import BatchConfig
from ta.files import append_line
from ta.training.loop import mean_over, train
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.run_folder import LoopConfig, Run

STEPS, EVERY = 6, 3


class Story:
    """A run of six steps of about six micro-batches each, with evaluations of about ten batches."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def go(self, at=None, number=signal.SIGTERM, lr=1e-2, seed=0, data=0, **loop):
        """Run from what is there; `at` (kind, step, batch) is where `number` comes, None kills."""
        model, optim = tiny(), OptimConfig(lr=lr)
        records = prepared(seed=data)
        config = BatchConfig(steps=STEPS, batch_size=16, max_tokens_per_micro=50, seed=seed)
        held_out = val_batches(prepared(n=24, seed=9), config)
        place, calls = {"step": 0}, self.calls

        def met(kind, step):
            place[kind, step] = place.get((kind, step), -1) + 1
            here = (kind, step, place[kind, step])
            calls.append(here)
            if here == at and number is None:
                raise SystemError("killed")
            if here == at:
                os.kill(os.getpid(), number)

        def step(model, batch):
            met("train" if torch.is_grad_enabled() else "evaluation", place["step"])
            return sft_step(model, batch)

        def before_step(done, micro_batches):
            place["step"] = done + 1
            append_line(self.folder / "samples.jsonl", {"step": done + 1, "round": done})
            return micro_batches

        def evaluate(done):
            place["step"] = done
            append_line(self.folder / "samples.jsonl", {"step": done, "n": 0})
            figures = mean_over(model, held_out, step)
            append_line(self.folder / "samples.jsonl", {"step": done, "n": 1})
            return figures

        settings = LoopConfig(out=str(self.folder), log_every=4, eval_every=EVERY, **loop)
        run, batches = Run(settings), train_batches(records, config)
        train(
            run,
            model,
            batches,
            step,
            make_optimizer(model, optim),
            optim,
            evaluate=evaluate,
            before_step=before_step,
        )
        run.release()
        return model

    def told(self):
        """Logged figures but for times and memory, and samples."""
        logs = [
            [json.loads(line) for line in open(self.folder / f"{name}.jsonl")]
            for name in ("metrics", "samples")
        ]
        return [
            [
                {key: x for key, x in record.items() if "second" not in key and key != "memory_gb"}
                for record in log
            ]
            for log in logs
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    story = Story(tmp_path_factory.mktemp("runs") / "whole")
    model = story.go()
    steps = [record["step"] for record in story.told()[0]]
    assert steps == [0, 3, 4, 6, 6]  # evaluations at 0, 3, 6; lines of metrics at 4, 6
    batches = {
        kind: max(b for k, s, b in story.calls if k == kind) for kind in ("train", "evaluation")
    }
    assert batches["train"] > 2 and batches["evaluation"] > 5
    return story, model


def same(whole, story, model):
    for (name, a), b in zip(whole[1].named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert whole[0].told() == story.told()


QUICK = [("train", 2, 2), ("train", STEPS, 0), ("evaluation", 0, 4), ("evaluation", STEPS, 4)]
MORE = [("train", step, batch) for step in (1, 2, STEPS) for batch in (0, 2)]
MORE += [("evaluation", step, batch) for step in (0, 3, STEPS) for batch in (0, 4)]
PLACES = QUICK + [pytest.param(x, marks=pytest.mark.slow) for x in MORE if x not in QUICK]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_costs_no_step_more_and_no_evaluation(whole, tmp_path, capsys, place, number):
    kind, step, _ = place
    story = Story(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        story.go(at=place, number=number)
    assert end.value.code == 128 + number
    assert [call for call in story.calls if call[0] == kind and call[1] >= step][-1] == (
        (kind, step, max(b for k, s, b in whole[0].calls if (k, s) == (kind, step)))
        if kind == "train"
        else place
    )
    names = os.listdir(story.folder / "checkpoints") if step else []
    assert names == [f"step-{step:08d}"] * bool(step)
    said = capsys.readouterr().err
    assert (f"stopped after step {step}" if step else "stopped before step 1") in said
    assert "--resume goes on" in said and (story.folder / "report.html").exists()
    same(whole, story, story.go(resume=True))


@pytest.mark.parametrize(
    "save_every", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), 4]
)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_kill_anywhere_is_made_good(whole, tmp_path, place, save_every):
    """Before the first checkpoint the run starts anew, with its logs empty."""
    story = Story(tmp_path / "run")
    with pytest.raises(SystemError):
        story.go(at=place, number=None, save_every=save_every)
    (story.folder / ".lock").unlink()
    with open(story.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    same(whole, story, story.go(resume=True, save_every=save_every))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"lr": 2e-2}, "lr was 0.01 and is 0.02"), ({"seed": 1}, "seed was 0"), ({"data": 1}, "data")],
)
def test_settings_are_compared_before_there_is_a_checkpoint(whole, tmp_path, change, word):
    story = Story(tmp_path / "run")
    with pytest.raises(SystemError):
        story.go(at=("train", 2, 1), number=None)
    (story.folder / ".lock").unlink()
    before = {p.name: p.read_bytes() for p in story.folder.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=word):
        story.go(resume=True, **change)
    after = {p.name: p.read_bytes() for p in story.folder.iterdir() if p.is_file()}
    assert {name: after[name] for name in before} == before
    if "lr" in change:
        story.go(resume=True, allow_change=("lr",), **change)
    else:
        same(whole, story, story.go(resume=True))


def test_a_resume_without_anything_to_go_on_with_says_so(tmp_path, capsys):
    Story(tmp_path / "mistyped").go(resume=True)
    assert f"no checkpoint in {tmp_path / 'mistyped'}: starting before step 1" in (
        capsys.readouterr().err
    )
