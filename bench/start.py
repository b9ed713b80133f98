"""How long until the first step, from nothing to one optimizer step?

    python bench/start.py --peer-python PYTHON_WITH_TRL

Our recipe, transformers' Trainer, TRL's Python interface and its command. A saved Llama of 26.7
million weights and a JSONL file of chats of lognormal lengths, 16 a step; caches are empty.
`first_step_cpu_s` counts from the start of the process (imports, model, tokenizing, one step), for
the commands to the moment they have told the step's loss; `whole_cpu_s` goes to their end, with the
export (ours also writes a checkpoint). `peak_mb` is the largest process's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read

from bench.work import in_order, marks_of, model_of, settings


def inputs(flags) -> tuple[str, str, str]:
    """(model folder, chats, empty folder to write to)."""
    return (
        str(Path(flags.folder) / "model"),
        str(Path(flags.folder) / "chats.jsonl"),
        tempfile.mkdtemp(dir=flags.folder),
    )


def write_inputs(flags) -> None:
    import numpy as np

    from bench.tokenize import MARKED, chats
    from ta.builtin import models

    model, data, _ = inputs(flags)
    model_of("sdpa", flags).save_pretrained(model)
    tokenizer = models.tiny_tokenizer()
    tokenizer.save_pretrained(model)
    Path(flags.folder, "marked.jinja").write_text(MARKED)
    generator, one = np.random.default_rng(0), argparse.Namespace(records=1)
    # in either turn, of about two tokens each
    words = [max(2, int(np.exp(generator.normal(4.9, 0.7)) / 4)) for _ in range(flags.records)]
    with open(data, "w") as file:
        file.writelines(json.dumps({"messages": chats(one, 1, (n, n))[0]}) + "\n" for n in words)


def recipe_flags(flags) -> list[str]:
    model, data, out = inputs(flags)
    sizes = [
        "--steps",
        "1",
        "--batch-size",
        str(flags.batch),
        "--lr",
        "1e-4",
        "--max-tokens",
        str(flags.longest),
    ]
    os.environ["TA_CACHE"] = tempfile.mkdtemp(dir=flags.folder)
    return ["--model-path", model, "--data", data, "--out", f"{out}/run", *sizes]


def ours(flags) -> dict[str, float]:
    """recipes/sft.py, whose optimizer notes the time after its step."""
    import recipes.sft as recipe
    import ta
    from ta.training.optim import make_optimizer

    marks = []

    def noting(model, config):
        optimizer = make_optimizer(model, config)
        optimizer.register_step_post_hook(lambda *_: marks.append(time.process_time()))
        return optimizer

    ta.make_optimizer = noting
    try:
        ta.cli(recipe.main, recipe.Config, recipe_flags(flags))
    except SystemExit as end:
        assert not end.code
    return {"first_step_cpu_s": marks[0]}


def hf(flags) -> dict[str, float]:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    model, data, out = inputs(flags)
    marks, tokenizer, template = (
        [],
        AutoTokenizer.from_pretrained(model),
        Path(flags.folder, "marked.jinja").read_text(),
    )
    rows = []
    for line in Path(data).read_text().splitlines():
        made = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        labels = [
            i if mask else -100
            for i, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
        ]
        rows.append(
            {"input_ids": made["input_ids"][: flags.longest], "labels": labels[: flags.longest]}
        )
    trainer = in_order(Trainer)(
        AutoModelForCausalLM.from_pretrained(model),
        TrainingArguments(**settings(flags, out, flags.batch)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[marks_of([], marks)],
    )
    trainer.train()
    return {"first_step_cpu_s": marks[0]}


def trl(flags) -> dict[str, float]:
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    model, data, out = inputs(flags)
    marks = []
    given = settings(flags, out, flags.batch) | {
        "max_length": flags.longest,
        "assistant_only_loss": True,
    }
    given["chat_template_path"] = str(Path(flags.folder, "marked.jinja"))
    rows = load_dataset("json", data_files=data, split="train", cache_dir=f"{out}/cache")
    SFTTrainer(
        model, SFTConfig(**given), train_dataset=rows, callbacks=[marks_of([], marks)]
    ).train()
    return {"first_step_cpu_s": marks[0]}


def run_ours(flags) -> dict[str, float]:
    given = recipe_flags(flags)
    figures = Path(given[given.index("--out") + 1], "metrics.jsonl")
    seen = lambda output: figures.exists() and '"step": 1' in figures.read_text()
    return until(seen, [sys.executable, str(ROOT / "recipes" / "sft.py"), *given], flags)


def run_trl(flags) -> dict[str, float]:
    model, data, out = inputs(flags)
    folder = Path(out, "data")
    folder.mkdir()
    (folder / "train.jsonl").symlink_to(data)
    given = settings(flags, f"{out}/run", flags.batch) | {
        "max_length": flags.longest,
        "assistant_only_loss": True,
        "report_to": "none",
    }
    given |= {
        "chat_template_path": str(Path(flags.folder, "marked.jinja")),
        "dataset_name": str(folder),
        "model_name_or_path": model,
    }
    flat = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    os.environ |= {"HF_HOME": f"{out}/cache", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
    return until(
        lambda output: "'loss'" in output,
        [str(Path(sys.executable).with_name("trl")), "sft", *flat],
        flags,
    )


def until(seen: Callable[[str], bool], arguments: list[str], flags) -> dict[str, float]:
    """CPU seconds of a command and its children when it has told the loss of its first step.

    It is then let run to its end.
    """
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(arguments, stdout=out, stderr=out, start_new_session=True)
        spent = 0.0
        while process.poll() is None and not seen(_so_far(out)):
            spent = _session_seconds(process.pid)
            time.sleep(0.02)
        if process.wait():
            sys.exit(f"{arguments[0]} failed:\n{_so_far(out)[-3000:]}")
    return {"first_step_cpu_s": spent}


def _so_far(file) -> str:
    return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")


def _session_seconds(session: int) -> float:
    """User and system seconds of a session's processes and the children they waited for (Linux)."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # from the third on: state, parent, group, session, ...
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # has ended meanwhile
            continue
        ticks += sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


CONTENDERS = {"ours": ours, "HF": hf, "TRL": trl, "our command": run_ours, "TRL's command": run_trl}


def main(given: argparse.Namespace) -> None:
    if given.one:
        compare(CONTENDERS, given, "ours")
        return
    with tempfile.TemporaryDirectory() as folder:
        given.folder = folder
        sys.argv += ["--folder", folder]
        write_inputs(given)
        compare(CONTENDERS, given, "ours", ["TRL", "TRL's command"])


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--records", type=int, default=500)
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--longest", type=int, default=2048)
    flags.add_argument("--folder", help=argparse.SUPPRESS)
    main(read(flags.set_defaults(steps=1) or flags, records=20, batch=2))
