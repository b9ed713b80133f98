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
MODULES = {path.stem: path for path in (ROOT / "ta").glob("*.py") if path.stem != "__init__"}
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
RUNGS = 6


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Names of the modules of ta that a file imports, anywhere in it but for types alone."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ta":
            found |= {alias.name for alias in node.names} & MODULES.keys()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ta."):
            found.add(node.module.removeprefix("ta."))
    return frozenset(found)


@functools.cache
def rung(module: str) -> int:
    """One more than the highest module it imports; a circle of imports has no end and fails."""
    return 1 + max((rung(name) for name in imports(MODULES[module])), default=-1)


def test_modules_stand_on_a_ladder():
    try:
        heights = {module: rung(module) for module in MODULES}
    except RecursionError:
        pytest.fail("modules import each other in a circle")
    assert max(heights.values()) < RUNGS, {m: h for m, h in heights.items() if h >= RUNGS}


def test_a_recipe_imports_no_recipe():
    names = {path.stem for path in RECIPES}
    for path in RECIPES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            assert not any(m and (m in names or m.startswith("recipes")) for m in modules), path


@pytest.mark.parametrize(("folder", "limit"), [("ta", 250), ("recipes", 120), ("bench", 250)])
def test_files_and_functions_stay_short(folder, limit):
    for path in sorted((ROOT / folder).glob("*.py")):
        text = path.read_text()
        assert text.count("\n") <= limit, f"{path.name} has {text.count(chr(10))} lines"
        tree = ast.parse(text)
        assert ast.get_docstring(tree), f"{path.name} does not say what it is"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
                public = folder == "ta" and not node.name.startswith("_") and length > 6
                assert not public or ast.get_docstring(node) or node in nested(tree), f"{path.name}: {node.name} has no docstring"


def nested(tree) -> set:
    """Functions inside functions."""
    return {
        inner
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for inner in ast.walk(f)
        if isinstance(inner, ast.FunctionDef) and inner is not f
    }


HOMES = {
    "peft": {"adapters", "adapter_settings", "adapter_base"},
    "vllm": {"vllm_engine", "vllm_checks"},
    "PIL": {"images", "pictures"},
    "tyro": {"cli"},
    "faiss": {"search"},
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
    assert users <= HOMES[package]


def heavy_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after `code`."""
    check = f"import sys\n{code}\nprint(*(m for m in ('torch', 'transformers', 'peft', 'numpy', 'vllm', 'PIL') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_chat_needs_no_torch():
    assert heavy_after("import ta.chat, ta.pieces, ta.templates, ta.records, ta.sources, ta.kinds") == set()


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
            assert flag in known or flag.replace("--no-", "--") in known, f"{recipe}.py has no {flag}"


def test_dependencies_are_those_agreed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z]+", d).group() for d in project["dependencies"]}
    assert names == {"torch", "transformers", "peft", "safetensors", "pillow", "tyro", "numpy", "tqdm"}
