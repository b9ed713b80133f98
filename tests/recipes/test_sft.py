"""recipes/sft.py as a user runs it: from flags to a folder that plain transformers loads, and wrong input answered in two lines."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time

import judged
import pytest
import safetensors.torch
import torch
from conftest import COMPILES_ON_GPU, ROOT, settings_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ta.builtin import tasks
from ta.command_line import cli

QUICK = (
    "--steps",
    3,
    "--batch-size",
    8,
    "--sample-max-new-tokens",
    4,
    "--sample-records",
    4,
    "--log-every",
    1,
)


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "train.jsonl", tasks.chats("train", 40)), write(
        tmp_path / "val.jsonl", tasks.chats("held_out", 12)
    )


def losses(folder):
    return [r["loss"] for r in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in r]


@pytest.mark.slow
def test_from_flags_to_a_folder_that_plain_transformers_loads(run, data, tmp_path):
    train, val = data
    out = tmp_path / "run"
    done = run("sft", "--data", train, "--val-data", val, "--out", out, *QUICK)
    assert (
        "samples at step 0" in done.stderr
        and "samples at step 3" in done.stderr
        and "40 records" in done.stderr
    )
    assert {
        "config.json",
        "metrics.jsonl",
        "samples.jsonl",
        "drops.jsonl",
        "report.html",
        "checkpoints",
        "final",
    } <= {p.name for p in out.iterdir()}
    logged = [json.loads(line) for line in open(out / "metrics.jsonl")]
    assert [r["step"] for r in logged] == [0, 1, 2, 3, 3]
    assert {"loss", "lr", "grad_norm", "tokens", "learned_tokens", "seconds"} <= logged[1].keys()
    assert {"val_loss", "val_accuracy"} <= logged[0].keys()
    model, tokenizer = (
        auto.from_pretrained(out / "final") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    assert torch.isfinite(model(ids).logits).all()
    again = run("sft", "--data", train, "--out", out, *QUICK, code=2)
    assert "holds a finished run" in again.stderr and "--resume" in again.stderr
    resumed = run("sft", "--data", train, "--val-data", val, "--out", out, *QUICK, "--resume")
    assert "at step 3" in resumed.stderr


def test_export_renders_what_was_trained(door, capsys, data, tmp_path):
    """An explicit template becomes the exported tokenizer's chat template: plain transformers gives the training ids."""
    train, _ = data
    template = (
        "--prefix-template",
        "<|im_start|>{role}\\n",
        "--suffix-template",
        "<|im_end|>",
        "--role-tags",
        "user=human",
        "assistant=bot",
        "system=sys",
    )
    assert door("sft", "--data", train, "--out", tmp_path / "run", *QUICK, *template)[0] == 0
    module = judged.recipe("inspect_data")
    with pytest.raises(SystemExit):
        cli(
            module.main,
            settings_of(module),
            [str(flag) for flag in ("--data", train, "--json", *template)],
        )
    shown = capsys.readouterr()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    for line, record in zip(shown.out.splitlines(), tasks.chats("train", 40), strict=True):
        assert json.loads(line)["ids"] == tokenizer.apply_chat_template(
            record["messages"], return_dict=False
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("sft", "lora --init-tokens <sep>=the_end"),
        ("sft", "prefix"),
        ("dpo", "prompt"),
        ("kto", "p-tuning"),
    ],
)
def test_two_processes_equal_one_with_adapters(forked, data, tmp_path, recipe, more):
    """Also where the base under the adapter is the reference, and where the first pass is a generation."""
    given = {"sft": ("--data", data[0], "--samples-data", data[1])}
    flags = given.get(recipe, ("--model-path", "builtin-small", "--lr", "1e-2"))
    flags += (*QUICK, "--max-tokens-per-micro", 300, "--adapter", *more.split())
    for n in (1, 2):
        forked(recipe, *flags, "--out", tmp_path / str(n), processes=n)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-6)
    one, two = (
        load_file(tmp_path / str(n) / "final" / "adapter_model.safetensors") for n in (1, 2)
    )
    assert one.keys() == two.keys() and all(
        torch.allclose(one[name], two[name], atol=1e-4) for name in one
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("more", "close"),
    [
        ("--activation-checkpointing", 1e-6),
        ("--dtype=bfloat16", 2e-2),
        ("--dtype=bfloat16 --adapter=lora", 2e-2),
        ("--dtype=bfloat16 --float8", 5e-2),
    ],
)
def test_memory_and_speed_options_change_no_loss(forked, data, tmp_path, processes, more, close):
    if "float8" in more:
        pytest.importorskip("torchao")
    kept = [flag for flag in more.split() if "adapter" in flag]
    flags = ("--data", data[0], *QUICK, "--max-tokens-per-micro", 300, *kept)
    forked("sft", *flags, "--out", tmp_path / "plain")
    changed = [flag for flag in more.split() if flag not in kept]
    forked("sft", *flags, "--out", tmp_path / "other", *changed, processes=processes)
    assert losses(tmp_path / "other") != losses(tmp_path / "plain") or "checkpointing" in more
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=close)


@pytest.mark.slow
def test_torchrun_stops_at_a_signal_and_two_processes_that_die_go_on_to_the_same_end(
    forked, data, tmp_path
):
    """The losses of one process after SIGTERM to the real launcher, after kill -9 of one of two, and under the launcher to the end."""
    flags = ("--data", data[0], *QUICK, "--steps", 24, "--save-every", 1)
    flags += ("--max-tokens-per-micro", 300)
    forked("sft", *flags, "--out", tmp_path / "one")
    out = tmp_path / "two"
    launcher = torchrun(out, flags)
    wait_for_losses(out, 1)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0 and any((out / "checkpoints").glob("step-*/manifest.json"))
    begun = len(losses(out))

    def die():
        wait_for_losses(out, begun + 1)
        os.kill(os.getpid(), signal.SIGKILL)

    def before(rank):
        if rank:
            threading.Thread(target=die, daemon=True).start()

    flags += ("--resume",)
    forked("sft", *flags, "--out", out, processes=2, before=before, code=[1, -signal.SIGKILL])
    assert begun < len(losses(out)) < 24
    assert torchrun(out, flags).wait(60) == 0
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def torchrun(out, flags):
    """The launcher of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", ROOT / "recipes/sft.py", *flags, "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.DEVNULL)


def wait_for_losses(out, n):
    """Until a run in `out` has logged n steps, at most a minute."""
    for _ in range(3000):
        if (out / "metrics.jsonl").exists() and len(losses(out)) >= n:
            return
        time.sleep(0.02)
    raise TimeoutError(f"no {n} steps in {out}")


def test_no_room_is_said_in_a_line_and_the_run_goes_on_later(door, data, tmp_path, monkeypatch):
    out, real = tmp_path / "run", safetensors.torch.save_file
    flags = ("--data", data[0], *QUICK, "--save-every", 1, "--out", out)

    def full(tensors, path, *more, **named):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        return real(tensors, path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr("ta.training.checkpoint.save_file", full)
        code, said = door("sft", *flags)
    assert code == 3 and "No space left" in said.splitlines()[-1] and "Traceback" not in said
    code, said = door("sft", *flags, "--resume")
    assert code == 0 and "step-00000001 at step 1" in said and len(losses(out)) == 3


def test_bad_flags_and_folders(door, data, tmp_path):
    """Each answered with exit code 2, what was given and what to give, no traceback, nothing written."""
    out = tmp_path / "run"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    good = ("--data", data[0])
    cases = [
        (("--data", tmp_path / "absent.jsonl"), "no such file"),
        ((*good, "--model-path", tmp_path / "absent"), "no model folder"),
        ((*good, "--max-tokens", 4), "max_tokens"),
        ((*good, "--role-tags", "user=u"), "assistant"),
        ((*good, "--learning-rates", "1"), "--learning-rate"),
        ((*good, "--out", tmp_path / "other"), "thesis.txt"),
        ((*good, "--system-prompt", "a", "--ignore-system-prompt"), "--ignore-system-prompt"),
        ((*good, "--init-tokens", "x"), "needs a token"),
        ((*good, "--max-tokens-per-micro", 5), "--max-tokens-per-micro 5"),
        ((*good, "--batch-size", 0), "--batch-size 0"),
        ((*good, "--lr", "nan"), "--lr nan"),
        ((*good, "--beta2", 1), "--beta2 1.0: give a number from 0 to below 1"),
        ((*good, "--eval-every", -1), "--eval-every -1"),
    ]
    for flags, message in cases:
        code, text = door("sft", "--out", out, *flags)
        assert code == 2 and message in text, (flags, text)
        assert "Traceback" not in text and not out.exists(), flags


LINES = {
    "not JSON": "{",
    "nested too deep": "[" * 100_000,
    "lone surrogate": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "number": '{"messages": [{"role": "user", "content": NaN}]}',
    "content": '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "a"}]}',
    "role": '{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "a"}]}',
    "messages": '{"messages": []}',
    "answer": '{"messages": [{"role": "user", "content": "a"}]}',
}


@pytest.mark.parametrize("word", LINES)
def test_a_bad_line_is_named(door, tmp_path, word):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "bad.jsonl", [good, LINES[word], good])
    code, text = door("inspect_data", "--data", path)
    assert code == 2 and f"{path}:2" in text and word in text and "Traceback" not in text


def test_a_cut_gzip_file_is_named(door, tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(
        gzip.compress(b"".join(json.dumps(r).encode() + b"\n" for r in tasks.chats("train", 50)))[
            :-20
        ]
    )
    code, text = door("inspect_data", "--data", path)
    assert code == 2 and "gzip" in text and "Traceback" not in text


def test_all_dropped_says_why(door, tmp_path):
    path = write(tmp_path / "long.jsonl", tasks.chats("train", 5))
    code, text = door("inspect_data", "--data", path, "--max-tokens", 6)
    assert code == 2 and "all 5 records are dropped" in text and "max_tokens" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_deterministic_runs_end_with_the_same_bits(run, tmp_path):
    """Packed rows and bfloat16, as a user has them."""
    for name in ("one", "two"):
        run("sft", "--steps", 12, "--deterministic", "--out", tmp_path / name)
    one, two = (
        (tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert one == two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("more", ["", "--compile", "--adapter lora", "--activation-checkpointing"])
def test_on_a_gpu_the_built_in_model_learns_in_bfloat16(run, tmp_path, more):
    """As a user runs it: bfloat16 is the default there; held-out chats are answered, and plain transformers loads the export."""
    if more == "--compile" and not COMPILES_ON_GPU:
        pytest.skip("the emulated GPU has no Triton")
    steps = () if not more else ("--steps", 20)
    run("sft", *steps, *more.split(), "--out", tmp_path / "run", timeout=600)
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    seen = [row["loss"] for row in rows if "loss" in row]
    assert seen[-1] < seen[0]
    if not more:
        assert rows[-1]["val_accuracy"] >= 0.9
    if "lora" not in more:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
