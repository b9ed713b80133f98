"""The loop: results do not depend on how work is cut, resume is bitwise, signals and bad numbers stop it without harm."""

import json
import math
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import torch
from small import prepared, sft_step, tiny

from ta.data.batch import lay_out
from ta.data.loader import collate_chats, train_batches, val_batches
from ta.data.micro import BatchConfig
from ta.files import append_line
from ta.training import loop as training_loop
from ta.training.loop import mean_over
from ta.training.optim import OptimConfig, make_optimizer
from ta.training.report import comparison
from ta.training.run_folder import LoopConfig, Run, first_day


def batches_of(data, steps=6, batch_size=8, budget=64, **more):
    config = BatchConfig(steps=steps, batch_size=batch_size, max_tokens_per_micro=budget)
    return train_batches(data, config, **more)


def train(model, batches, step, run, optim, optimizer=None, **more):
    """`train` with AdamW."""
    optimizer = optimizer or make_optimizer(model, optim)
    return training_loop.train(run, model, batches, step, optimizer, optim, **more)


def losses(folder):
    return [
        (r["step"], r["loss"])
        for r in map(json.loads, open(folder / "metrics.jsonl"))
        if "loss" in r
    ]


def loop(folder, device="cpu", **more):
    folder.mkdir(exist_ok=True)
    return Run(LoopConfig(out=str(folder), log_every=1, **more), device)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_schedule_by_hand():
    config = OptimConfig(lr=1.0, warmup=0.2, schedule="linear", min_lr_ratio=0.1)
    assert [round(config.lr_at(s, 10), 6) for s in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.55, 0.1]
    cosine = OptimConfig(lr=2.0, warmup=0, schedule="cosine")
    half = math.cos(math.pi / 4)
    assert [cosine.lr_at(s, 4) for s in range(5)] == pytest.approx(
        [2.0, 1 + half, 1.0, 1 - half, 0.0]
    )
    assert {OptimConfig(lr=3.0, warmup=0, schedule="constant").lr_at(s, 9) for s in range(9)} == {
        3.0
    }
    assert (
        OptimConfig(lr=1.0, warmup=4).lr_at(3, 100) == 1.0
        and OptimConfig(lr=1.0, warmup=4).lr_at(0, 100) == 0.25
    )


@pytest.mark.parametrize("packed", [True, False])
def test_one_update_equals_the_mean_over_the_whole_batch(tmp_path, packed):
    """float64: one step of the loop, cut into many micro-batches, moves weights as one plain AdamW step on the token mean does."""
    data, model, plain = prepared(), tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optim = OptimConfig(lr=1e-2, warmup=0, clip=0.5)
    batches = batches_of(data, steps=1, batch_size=24, budget=40, packed=packed)
    assert len(batches.at(0)) > 5
    train(model, batches, sft_step, loop(tmp_path), optim)
    (whole,) = batches_of(data, steps=1, batch_size=24, budget=10_000).at(0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    (plain.loss(whole) / whole.weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for (name, got), want in zip(weights(model).items(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("budget", [40, 100, 5000])
def test_losses_do_not_depend_on_the_token_budget(tmp_path, budget):
    data = prepared()
    runs = []
    for b in (60, budget):
        model = tiny(dtype=torch.float64)
        folder = tmp_path / str(b)
        train(model, batches_of(data, budget=b), sft_step, loop(folder), OptimConfig(lr=1e-2))
        runs.append(losses(folder))
    assert len(runs[0]) == 6
    for (_, a), (_, b) in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-10)


def test_it_learns_its_records(tmp_path):
    data, model = prepared(n=8, learn=1.0), tiny()
    train(model, batches_of(data, steps=60), sft_step, loop(tmp_path), OptimConfig(lr=1e-2))
    curve = losses(tmp_path)
    assert curve[0][1] > 3.9 and curve[-1][1] < 0.5


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_resume_is_bitwise(tmp_path, stop, lora):
    """A run that is stopped by a signal after any step and resumed ends with the same bits and tells the same story."""

    def fresh():
        model = tiny()
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(1)
            model.inner = get_peft_model(
                model.inner, LoraConfig(target_modules="all-linear", lora_dropout=0.3)
            )
        return model

    data, optim = prepared(), OptimConfig(lr=1e-2)
    whole = fresh()
    train(
        whole, batches_of(data), sft_step, loop(tmp_path / "whole"), optim, resume_key={"data": 1}
    )

    def interrupt(done, micro_batches):
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batches

    with pytest.raises(SystemExit) as exit_:
        train(
            fresh(),
            batches_of(data),
            sft_step,
            loop(tmp_path / "cut"),
            optim,
            resume_key={"data": 1},
            before_step=interrupt,
        )
    assert exit_.value.code == 143 and (tmp_path / "cut" / "report.html").exists()
    resumed = fresh()
    train(
        resumed,
        batches_of(data),
        sft_step,
        loop(tmp_path / "cut", resume=True),
        optim,
        resume_key={"data": 1},
    )
    for (name, a), b in zip(weights(whole).items(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_resume_refuses_changed_settings(tmp_path):
    data = prepared()
    train(
        tiny(),
        batches_of(data, steps=2),
        sft_step,
        loop(tmp_path),
        OptimConfig(lr=1e-3),
        resume_key={"data": "a", "lr": 1},
    )
    with pytest.raises(ValueError, match="data was 'a' and is 'b'"):
        train(
            tiny(),
            batches_of(data, steps=4),
            sft_step,
            loop(tmp_path, resume=True),
            OptimConfig(lr=1e-3),
            resume_key={"data": "b", "lr": 1},
        )


def test_a_checkpoint_of_another_format_is_refused_and_kept(tmp_path):
    """The first version wrote format 1."""
    data, optim = prepared(), OptimConfig(lr=1e-2)
    train(tiny(), batches_of(data, steps=2), sft_step, loop(tmp_path), optim)
    path = tmp_path / "checkpoints" / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    path.write_text(json.dumps(manifest | {"format": 1}))
    refused = r"no whole checkpoint in .*format 1, this version reads 2.*--overwrite"
    with pytest.raises(ValueError, match=refused):
        train(tiny(), batches_of(data, steps=2), sft_step, loop(tmp_path, resume=True), optim)
    assert path.exists()


def test_a_non_finite_loss_stops_before_the_update_and_names_records(tmp_path):
    data, model = prepared(), tiny()

    def step(model, batch):
        loss, count, metrics = sft_step(model, batch)
        return loss * (math.nan if (batch.tokens == data.ids[0]).any() else 1), count, metrics

    batches = batches_of(data, steps=20)
    before = None

    def remember(done, micro_batches):
        nonlocal before
        before = weights(model)
        return micro_batches

    before = weights(model)
    with pytest.raises(ValueError, match=r"not finite at step \d+.*made\.jsonl:\d+"):
        train(model, batches, step, loop(tmp_path), OptimConfig(lr=1e-2), before_step=remember)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.parameters(), strict=True))
    assert json.loads(open(tmp_path / "non_finite.jsonl").readline())["tokens"]


def test_a_step_that_learns_nothing_is_an_error(tmp_path):
    data = prepared()
    data = data._replace(weights=np.zeros_like(data.weights))
    with pytest.raises(ValueError, match="nothing to learn"):
        train(tiny(), batches_of(data), sft_step, loop(tmp_path), OptimConfig(lr=1e-3))


def test_a_step_without_a_token_moves_nothing_and_goes_on_bit_for_bit(tmp_path, capsys):
    """AdamW moves weights by its momentum alone too; the weights of the step before are the judge."""
    seen = {}

    def run(name, stop=None, **more):
        model = tiny()

        def before_step(done, micro_batches):
            seen.setdefault(done, weights(model))
            if done == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return [lay_out([], [])] if done in (2, 3) else micro_batches

        settings, batches = loop(tmp_path / name, **more), batches_of(prepared())
        train(model, batches, sft_step, settings, OptimConfig(lr=1e-2), before_step=before_step)
        return weights(model)

    whole = run("whole")
    assert "step 3 has no token to learn: no update\nstep 4 has" in capsys.readouterr().err
    for name, value in seen[2].items():
        assert torch.equal(value, seen[3][name]) and torch.equal(value, seen[4][name])
    assert any(not torch.equal(value, seen[5][name]) for name, value in seen[4].items())
    rows = [json.loads(line) for line in open(tmp_path / "whole" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] is None and row["grad_norm"] == 0 for row in rows[1:5]] == [0, 1, 1, 0]
    with pytest.raises(SystemExit):
        run("cut", stop=2)
    resumed = run("cut", resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_evaluation_is_the_token_mean_over_all_records():
    data, model = prepared(), tiny(dtype=torch.float64)
    many = mean_over(model, val_batches(data, BatchConfig(max_tokens_per_micro=40)), sft_step)
    (one,) = val_batches(data, BatchConfig(max_tokens_per_micro=10_000))
    assert many["loss"] == pytest.approx((model.loss(one) / one.weights.sum()).item(), rel=1e-10)


def test_decay_is_for_matrices_and_scales_for_named_parts():
    model = tiny()
    optimizer = make_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.1), {"inner.lm_head": 0.5})
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            plain = p.dim() < 2 or any(part in names[id(p)] for part in ("wte", "wpe"))
            assert group["weight_decay"] == (0.0 if plain else 0.1), names[id(p)]
            assert group["lr_scale"] == (0.5 if "lm_head" in names[id(p)] else 1.0)


def test_nothing_to_train_is_an_error():
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(model, OptimConfig(lr=1e-3))


def test_a_record_longer_than_the_budget_names_its_line():
    with pytest.raises(
        ValueError, match=r"made\.jsonl:\d+ has \d+ tokens, more than --max-tokens-per-micro 10"
    ):
        batches_of(prepared(), budget=10)


def test_batches_are_functions_of_the_step():
    batches = batches_of(prepared())
    one, two = batches.at(3), batches.at(3)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    assert len(batches.records(3)) == len(batches.names(3)) == 8


def test_a_dry_run_tells_memory_and_changes_nothing(tmp_path, capsys):
    """Weights, gradients and moments are exact; activations grow with the token budget."""
    from ta.training.memory import estimate

    model, data = tiny(), prepared()
    size = sum(p.numel() for p in model.parameters()) * 4 / 1e9
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    small, large = (
        estimate(model, batches_of(data, budget=budget), optimizer) for budget in (40, 160)
    )
    assert small["weights"] == pytest.approx(size, rel=0.2)
    assert small["gradients"] == pytest.approx(size) == small["moments"] / 2
    assert 2 < large["activations"] / small["activations"] < 8
    assert large["in all"] == pytest.approx(sum(v for k, v in large.items() if k != "in all"))
    plain = torch.optim.SGD(model.parameters(), lr=1)
    assert estimate(model, batches_of(data), plain)["moments"] == 0
    before = weights(model)
    with pytest.raises(SystemExit) as end:
        train(model, batches_of(data), sft_step, loop(tmp_path, dry_run=True), OptimConfig(lr=1e-2))
    assert end.value.code == 0 and "moments" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["SGD", "Adafactor", "RMSprop", "MuonAndAdamW", "AdamW8bit"])
def test_any_optimizer_resumes_bitwise(tmp_path, kind):
    """Its state is in the checkpoint, whatever it keeps; another kind is refused."""
    if kind == "AdamW8bit":
        pytest.importorskip("torchao")
    data, optim = prepared(), OptimConfig(lr=1e-2, warmup=0)
    make = {
        "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
        "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
        "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5),
        "MuonAndAdamW": lambda model: make_optimizer(model, replace(optim, optimizer="muon")),
        "AdamW8bit": lambda model: make_optimizer(model, replace(optim, optimizer="adamw8bit")),
    }[kind]

    def interrupt(done, micro_batches):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batches

    def run(name, before_step=None, optimizer=make, **more):
        model = tiny()
        where = loop(tmp_path / name, **more)
        stopped = pytest.raises(SystemExit) if before_step else nullcontext()
        with stopped:
            train(
                model,
                batches_of(data),
                sft_step,
                where,
                optim,
                optimizer(model),
                before_step=before_step,
            )
        return model

    whole = run("whole")
    run("cut", interrupt)
    with pytest.raises(ValueError, match=f"optimizer was '{kind}' and is 'AdamW'"):
        run("cut", resume=True, optimizer=lambda model: make_optimizer(model, optim))
    resumed = run("cut", resume=True)
    for (name, a), b in zip(weights(whole).items(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_trackers_get_what_is_logged(tmp_path, monkeypatch):
    from ta.training import trackers

    seen = []
    monkeypatch.setitem(
        trackers.TRACKERS,
        "tensorboard",
        lambda folder, first, config, known: (lambda *given: seen.append(given), None),
    )
    where = loop(tmp_path, log=("tensorboard",))

    def evaluate(done):
        append_line(tmp_path / "samples.jsonl", {"step": done, "answer": f"a{done}"})
        return {"figure": 1.0}

    settings = {"optim": OptimConfig(lr=1e-2), "evaluate": evaluate}
    train(tiny(), batches_of(prepared(), steps=3), sft_step, where, **settings)
    assert [(step, [x["answer"] for x in rows]) for step, _, rows in seen] == [
        *((0, ["a0"]), (1, []), (2, []), (3, []), (3, ["a3"]))
    ]
    named = [f["loss"] for _, f, _ in seen if "loss" in f]
    assert named == [value for _, value in losses(tmp_path)]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        trackers.check_trackers(["wandb"])


def test_a_run_without_held_out_data_has_a_live_report(tmp_path, monkeypatch):
    """Each half minute it is written anew and asks to be read again; the last one does not."""
    clock, seen = iter(range(0, 10_000, 31)), []
    monkeypatch.setattr(training_loop.time, "monotonic", lambda: next(clock))
    report = tmp_path / "report.html"

    def before_step(done, micro_batches):
        text = report.read_text() if report.exists() else ""
        seen.append((f"step {done} of 3" in text, 'http-equiv="refresh"' in text))
        return micro_batches

    where, optim = loop(tmp_path), OptimConfig(lr=1e-2)
    train(tiny(), batches_of(prepared(), steps=3), sft_step, where, optim, before_step=before_step)
    assert seen == [(False, False), (True, True), (True, True)]
    assert "step 3 of 3" in report.read_text() and "refresh" not in report.read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_gives_the_losses_of_the_cpu_and_resumes_bitwise(tmp_path):
    """float32: the same losses to rounding; a run stopped and resumed on the GPU has the weights of a whole one."""

    def trained(name, device, stop=0, **more):
        model = tiny().to(device)

        def before_step(done, micro_batches):
            if stop and done == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return micro_batches

        with nullcontext() if not stop else pytest.raises(SystemExit):
            train(
                model,
                batches_of(prepared(), steps=6),
                sft_step,
                loop(tmp_path / name, device, **more),
                OptimConfig(lr=1e-2),
                before_step=before_step,
            )
        return model

    trained("cpu", "cpu")
    whole = trained("gpu", "cuda")
    trained("cut", "cuda", stop=3)
    resumed = trained("cut", "cuda", resume=True)
    ours, theirs = (torch.tensor(losses(tmp_path / name)) for name in ("gpu", "cpu"))
    assert torch.allclose(ours, theirs, rtol=1e-4) and ours.shape == (6, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_several_held_out_sources_have_figures_of_their_own():
    data = prepared(40, seed=3)
    origin = data.origin.copy()
    origin[::3, 0] = 1
    sources = [{"path": f"{name}.jsonl", "name": name} for name in ("easy", "hard")]
    several = data._replace(origin=origin, info=data.info | {"sources": sources})
    model, budget = tiny(), BatchConfig(max_tokens_per_micro=60)
    figures = mean_over(model, val_batches(several, budget), sft_step)
    whole = mean_over(model, val_batches(data, budget), sft_step)
    assert set(figures) == {"loss", "loss/easy", "loss/hard"} and set(whole) == {"loss"}
    assert figures["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    learned = []
    for i, name in enumerate(("easy", "hard")):
        records = np.flatnonzero(origin[:, 0] == i)
        batch = collate_chats(data, records, False)
        own = -(model.logprobs(batch) * batch.weights).sum() / batch.weights.sum()
        assert figures[f"loss/{name}"] == pytest.approx(own.item(), rel=1e-5)
        learned.append(batch.weights.sum().item())
    joined = sum(w * figures[f"loss/{n}"] for w, n in zip(learned, ("easy", "hard"), strict=True))
    assert joined / sum(learned) == pytest.approx(whole["loss"], rel=1e-6)


def test_a_resumed_run_keeps_the_day_it_began(tmp_path):
    run = Run(LoopConfig(out=str(tmp_path / "run")), day="2026-03-01")
    assert first_day(run.loop) == date.today().isoformat()
    with run.held():
        run.record({}, {})
    run.release()
    assert first_day(run.loop) == date.today().isoformat(), "a new run has its own"
    assert first_day(replace(run.loop, resume=True)) == "2026-03-01"


LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: 3.5, 12: 2.0}  # of evaluations by step


def kept_run(folder, model, stop=None, **more):
    """12 steps with an evaluation every 2, whose losses are LOSSES; killed in the evaluation of step `stop`."""

    def evaluate(done):
        if done == stop:
            raise KeyboardInterrupt
        return {"loss": LOSSES[done], "right": -LOSSES[done]}

    settings = {"eval_every": 2, "keep": 1, "save_every": 3, "keep_best": "loss", **more}
    batches = batches_of(prepared(), steps=12)
    optim = OptimConfig(lr=1e-2)
    return train(model, batches, sft_step, loop(folder, **settings), optim, evaluate=evaluate)


def test_a_resume_leaves_as_many_checkpoints_as_a_run(tmp_path):
    """A kill may come before the old ones are deleted."""
    for more, left in (({"keep": 0}, [3, 6, 9, 12]), ({"keep": 2, "resume": True}, [9, 12])):
        kept_run(tmp_path, tiny(), keep_best="", **more)
        assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").iterdir()) == left


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """{step: weights} of an uninterrupted run of kept_run's settings."""
    found, plain = {}, tiny()

    def look(done):
        found[done] = weights(plain)
        return {"loss": LOSSES[done]}

    settings = loop(tmp_path_factory.mktemp("plain") / "run", eval_every=2)
    batches = batches_of(prepared(), steps=12)
    train(plain, batches, sft_step, settings, OptimConfig(lr=1e-2), evaluate=look)
    return found


@pytest.mark.parametrize("stop", [None, 6, 8, 10, 12])
@pytest.mark.parametrize("patience", [0, 3])
def test_the_best_checkpoint_is_kept_and_exported_exactly_on_resume(
    snapshots, tmp_path, stop, patience
):
    """The weights are those of the best step of one uninterrupted run; patience counts through a resume."""
    model, folder, how = tiny(), tmp_path / "run", {"patience": patience}
    if stop is not None and (stop <= 10 or not patience):
        with pytest.raises(KeyboardInterrupt):
            kept_run(folder, model, stop, **how)
        model = tiny()
        how["resume"] = True
    figures = kept_run(folder, model, **how)
    # of equal losses the first is the best; after 6, 8 and 10 patience is at its end
    best = 4 if patience else 12
    assert figures == {"loss": LOSSES[best], "right": -LOSSES[best]}
    for name, value in weights(model).items():
        assert torch.equal(value, snapshots[best][name]), name
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    evaluated = [row["step"] for row in rows if "val_loss" in row]
    assert evaluated == list(range(0, 11 if patience else 13, 2))
    steps = {int(path.name[5:]) for path in (folder / "checkpoints").iterdir()}
    assert best in steps and len(steps) <= 2
    again = kept_run(folder, tiny(), patience=patience, resume=True)
    assert again == figures


def test_the_best_may_be_the_highest_or_the_start(tmp_path):
    for name, figure, is_, best in (
        ("a", "loss", "higher", 0),
        ("b", "right", "auto", 12),
        ("c", "right", "lower", 0),
    ):
        model = tiny()
        start = weights(model)
        figures = kept_run(tmp_path / name, model, keep_best=figure, best_is=is_)
        assert figures["loss"] == LOSSES[best]
        same = all(torch.equal(x, start[n]) for n, x in weights(model).items())
        assert same == (best == 0)


def test_a_figure_that_no_evaluation_gives_leaves_nothing_behind(tmp_path):
    folder, no_such = tmp_path / "run", "--keep-best accuracy: the evaluations give loss, right"

    def refused(**more):
        with pytest.raises(ValueError, match=no_such):
            kept_run(folder, tiny(), keep_best="accuracy", **more)

    for more in ({}, {"resume": True}):
        refused(**more)
        assert not folder.exists()
    with pytest.raises(KeyboardInterrupt):
        kept_run(folder, tiny(), stop=6)
    kept = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    refused(resume=True)
    assert kept and kept == {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert kept_run(folder, tiny(), resume=True)["loss"] == min(LOSSES.values())

    # answers that a model has sampled are kept, though no checkpoint came after them
    folder = tmp_path / "online"
    with pytest.raises(KeyboardInterrupt):
        kept_run(folder, tiny(), stop=0)
    (folder / "rollouts").mkdir()
    refused(resume=True)
    assert (folder / "rollouts").exists()


def test_settings_of_evaluation_without_held_out_data_are_refused(door, tmp_path):
    data, turns = tmp_path / "a.jsonl", [{"role": "user", "content": "a"}]
    turns.append({"role": "assistant", "content": "b"})
    data.write_text(json.dumps({"messages": turns}))
    for flags, said in (
        (("--eval-every", "5"), "--eval-every 5 without held-out data has nothing to evaluate"),
        (("--keep-best", "loss"), "--keep-best loss without held-out data"),
        (("--patience", "2"), "name it in --keep-best"),
        (("--best-is", "lower"), "says nothing without --keep-best"),
    ):
        code, text = door("sft", "--data", data, "--out", tmp_path / "run", *flags)
        assert code == 2 and said in text and not (tmp_path / "run").exists()


def test_what_is_not_finite_is_null_in_all_that_is_written_and_read_as_such(tmp_path, capsys):
    """Python's json is the judge, told to refuse NaN and Infinity. A resumed run writes the same lines."""
    limits, values = {0: math.nan, 2: 5.0, 4: math.inf, 6: math.nan}, []

    def run(name, stop=None, **more):
        def step(model, batch):
            loss, count, metrics = sft_step(model, batch)
            return loss, count, metrics | {"high": math.inf, "none": math.nan}

        def evaluate(done):
            sample = {"step": done, "line": 1, "prompt": "a", "scores": [limits[done], 1.0]}
            append_line(tmp_path / name / "samples.jsonl", sample)
            return {"loss": limits[done], "right": limits[done]}

        def before_step(done, micro_batches):
            if done == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return micro_batches

        settings = {"log_every": 2, "eval_every": 2, "keep_best": "loss", **more}
        run = Run(LoopConfig(out=str(tmp_path / name), **settings))
        batches, optim = batches_of(prepared()), OptimConfig(lr=1e-2)
        how = {"evaluate": evaluate, "before_step": before_step}
        return train(tiny(), batches, step, run, optim, resume_key={"far": math.inf}, **how)

    figures = run("whole")
    assert figures == {"loss": 5.0, "right": 5.0}, "a loss that is not finite is never the best"
    with pytest.raises(SystemExit):
        run("cut", stop=2)
    assert run("cut", resume=True) == figures
    for name in ("whole", "cut"):
        written = [p for p in (tmp_path / name).rglob("*.json*") if p.is_file()]
        assert len(written) >= 4
        for path in written:
            whole = path.suffix == ".json"
            for text in [path.read_text()] if whole else path.read_text().splitlines():
                json.loads(text, parse_constant=pytest.fail)
        lines = map(json.loads, open(tmp_path / name / "metrics.jsonl"))
        timed = ("seconds", "memory_gb", "update_seconds", "update_tokens_per_second")
        values.append([{k: x for k, x in line.items() if k not in timed} for line in lines])
        assert run(name, resume=True, keep_best="") == pytest.approx(
            {"loss": math.nan, "right": math.nan}, nan_ok=True
        )
    assert values[0] == values[1]
    assert [row["high"] for row in values[0] if "high" in row] == [None] * 3
    assert [row["val_right"] for row in values[0] if "val_right" in row] == [None, 5.0, None, None]
    assert "before -> after training: loss nan -> nan" in capsys.readouterr().err
    assert "<svg" in comparison([tmp_path / "whole", tmp_path / "cut"])
