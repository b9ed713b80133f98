"""The guide: its examples run as they stand, its files are valid, its flags exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import judged
import pytest
import yaml

from ta import __main__ as command
from ta.flags import settings_of
from ta.recipe_files import recipe_names

TOPICS = sorted(command.GUIDE.glob("*.md"))
BLOCK = re.compile(r"<!-- (\w+)(?: (\S+))? -->\n```\w+\n(.*?)```\n", re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """(what, its word, content) of each marked block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def test_there_is_a_chapter_for_each_subject():
    names = {path.stem for path in TOPICS}
    assert names >= {
        *(
            "data",
            "templates",
            "adapters",
            "preference",
            "reinforcement",
            "media",
            "retrieval",
            "vllm",
        ),
        *("clusters", "migration", "errors", "design"),
    }


@pytest.mark.parametrize("path", TOPICS, ids=lambda p: p.stem)
def test_every_flag_exists(path):
    text = path.read_text(encoding="utf-8")
    configs = (judged.recipe(name).Config for name in recipe_names())
    known = {setting.flag for config in configs for setting in settings_of(config)}
    foreign = {
        *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),
        *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"),
        *("--time", "--requeue", "--signal", "--node-rank", "--master-addr", "--master-port"),
        *("--learning-rate", "--gradient-accumulation-steps", "--logprobs-mode"),
        "--weight-transfer-config",
    }
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", text))
    assert flags - foreign - {"--no" + flag[1:] for flag in known} <= known


@pytest.mark.slow
@pytest.mark.parametrize("path", TOPICS, ids=lambda p: p.stem)
def test_the_examples_run(path, forked, few_records, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = blocks(path)
    assert any(what in ("run", "fails") for what, _, _ in found), "a chapter has an example"
    for what, name, content in found:
        if what == "file":
            Path(name).write_text(content)
    for what, code, content in found:
        for line in content.splitlines() if what in ("run", "fails") else ():
            words = shlex.split(line)
            assert words[0] == "ta"
            if words[1] in recipe_names():
                forked(words[1], *words[2:], code=int(code or 0))
            else:
                monkeypatch.setattr(sys, "argv", words)
                with pytest.raises(SystemExit, match=code or "0"):
                    command.main()


def test_the_files_for_clusters_are_valid(tmp_path):
    found = blocks(command.GUIDE / "clusters.md")
    script = next(content for what, _, content in found if what == "slurm")
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    sky, job = (yaml.safe_load(content) for what, _, content in found if what == "yaml")
    assert sky["num_nodes"] == 2 and "-m ta sft" in sky["run"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][0] == "torchrun" and "--resume" in container["args"]


def test_help_reads_a_chapter(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ta", "help", "errors"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    shown = capsys.readouterr().out
    assert shown.startswith("# Errors") and "<!--" not in shown
    monkeypatch.setattr(sys, "argv", ["ta", "help", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "give one of adapters, clusters" in capsys.readouterr().err
