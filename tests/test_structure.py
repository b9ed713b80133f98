"""Promises about structure: the ladder of modules, budgets of lines and flags, what must not be imported, what the README says."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in (ROOT / "ta").rglob("*.py")
}
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def test_a_recipe_imports_no_recipe():
    names = {path.stem for path in RECIPES}
    for path in RECIPES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(m and (m in names or m.startswith("recipes")) for m in modules), path


HOMES = {
    "peft": "ta.model",
    "vllm": "ta.generation",
    "PIL": ("ta.media", "ta.builtin"),
    "tyro": "ta.cli",
    "faiss": "ta.rag",
}


@pytest.mark.parametrize("package", HOMES)
def test_each_foreign_package_has_one_home(package):
    users = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if any(n.split(".")[0] == package for n in names):
                users.add(name)
    assert all(user.startswith(HOMES[package]) for user in users), users


def heavy_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after `code`."""
    check = f"import sys\n{code}\nprint(*(m for m in ('torch', 'transformers', 'peft', 'numpy', 'vllm', 'PIL') if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.split())


def test_chat_needs_no_torch():
    assert (
        heavy_after(
            "import ta, ta.chat.encode, ta.chat.template, ta.data.jsonl, ta.data.sources, ta.data.records"
        )
        == set()
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_help_answers_without_anything_heavy(path):
    code = f"""
        import contextlib, io, runpy
        sys.path.insert(0, {str(ROOT)!r})
        sys.argv = ["x", "--help"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_path({str(path)!r}, run_name="__main__")
    """
    assert heavy_after(textwrap.dedent(code)) <= {"numpy"}


@functools.cache
def flags_of(path: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(path), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    return re.findall(r"│ (--[a-z][a-z0-9-]*)", done.stdout)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_flags_are_flat_and_few(path):
    flags = flags_of(path)
    assert len(flags) == len(set(flags)), "two owners of one flag"
    assert 3 <= len(flags) <= 95 and not any("." in flag for flag in flags)


def test_readme_names_only_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"recipes/(\w+)\.py((?:[^\n`]|\\\n)*)", text)
    assert len(commands) > 5
    for recipe, rest in commands:
        path = ROOT / "recipes" / f"{recipe}.py"
        assert path.exists(), recipe
        known = set(flags_of(path))
        for flag in re.findall(r"(?<!\w)--[a-z][a-z0-9-]+", rest):
            assert flag in known or flag.replace("--no-", "--") in known, (
                f"{recipe}.py has no {flag}"
            )


def test_dependencies_are_those_agreed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z]+", d).group() for d in project["dependencies"]}
    assert names == {
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "pillow",
        "tyro",
        "numpy",
        "tqdm",
    }
