"""Promises about structure: imports go one way, heavy packages come late, a flag is near its effect, what the README says."""

import ast
import contextlib
import functools
import io
import json
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from ta.builtin import pictures, tasks
from ta.builtin.model_folders import tiny_folder
from ta.flags import EQUAL, OURS, SETTING

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ta").rglob("*.py"))
}
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TOWER = (  # a module imports its own folder and what stands above it here, types included
    ("ta.recipe_files", "ta.printable", "ta.faces"),
    ("ta.screen",),
    ("ta.flags", "ta.from_turbo", "ta.files", "ta.parallel"),
    ("ta.command_line", "ta.losses"),
    ("ta.builtin",),
    ("ta.folders",),
    ("ta.chat",),
    ("ta.data",),
    ("ta.model",),
    ("ta.generation",),
    ("ta.training",),
    ("ta.reference", "ta.media", "ta.rag", "ta.rl"),
    ("ta.convert",),
    ("ta.__main__",),
)


def level(module: str) -> int:
    """The height in TOWER of a module's folder, 0 at the bottom."""
    for height, rooms in enumerate(TOWER):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return height
    raise AssertionError(f"{module} has no place in the tower")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules of ta that a module imports anywhere, for types too."""
    found = set()
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ta":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return frozenset(found - {"ta"})


def test_imports_go_one_way_between_folders():
    wrong = []
    for module in MODULES.keys() - {"ta"}:
        room = ".".join(module.split(".")[:2])
        for other in imports(module):
            same = other == room or other.startswith(room + ".")
            if not same and level(other) >= level(module):
                wrong.append(f"{module} -> {other}")
    assert not wrong, sorted(wrong)


def test_no_modules_import_each_other_in_a_circle():
    @functools.cache
    def height(module: str) -> int:
        return 1 + max((height(other) for other in imports(module)), default=0)

    try:
        assert max(map(height, MODULES.keys() - {"ta"})) < 40
    except RecursionError:
        pytest.fail("modules import each other in a circle")


def test_our_own_modules_are_imported_at_the_top():
    """But where a heavy package would come with them: then the line says why, or the module is one of these."""
    heavy = {name for name in MODULES if imports_heavy(name)}
    late = []
    for module, path in MODULES.items():
        for function in nodes(path):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ta"):
                    names = [f"{node.module}.{a.name}" for a in node.names] + [node.module]
                    if not any(name in heavy for name in names):
                        late.append(f"{module}:{node.lineno} {node.module}")
    assert not late, late


@functools.cache
def imports_heavy(module: str) -> bool:
    """Whether importing a module brings torch, transformers, peft, vllm or Pillow along."""
    heavy = ("torch", "transformers", "peft", "vllm", "PIL", "tokenizers")
    for node in tree(MODULES[module]).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.split(".")[0] in heavy:
                return True
            if name != module and name in MODULES and name != "ta" and imports_heavy(name):
                return True
    return False


def test_one_name_stands_in_one_module():
    homes = defaultdict(set)
    for module, path in MODULES.items():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(module)
    twice = {name: sorted(where) for name, where in homes.items() if len(where) > 1}
    assert not twice, twice


def test_json_files_are_written_by_one_function():
    """`json_text` knows that JSON has no number that is not finite; plain json.dumps does not."""
    for path in [*MODULES.values(), *RECIPES]:
        for node in nodes(path):
            if isinstance(node, ast.Call) and re.search(r"\bwrite(?!r)", ast.unparse(node.func)):
                assert "json.dump" not in ast.unparse(node), f"{path}:{node.lineno}"


@functools.cache
def all_flags() -> frozenset[str]:
    """Every flag of every recipe, and its --no- form."""
    flags = {flag for path in RECIPES for flag in flags_of(path)}
    return frozenset(flags | {flag.replace("--", "--no-", 1) for flag in flags})


def test_every_flag_named_in_a_string_exists():
    foreign = {
        "--nproc-per-node",
        "--standalone",
        "--nnodes",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--help",
        "--help-all",
        "--config",
        "--logprobs-mode",
        "--weight-transfer-config",
        "--no",
        *("--tmpfs", "--dev", "--chdir", "--unshare-all", "--die-with-parent", "--ro-bind"),
    }
    old = {*EQUAL, *SETTING, *OURS}
    wrong = []
    for path in [*MODULES.values(), *RECIPES]:
        for node in nodes(path):
            text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if text and "color-scheme" not in node.value:
                for flag in re.findall(
                    r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-]*[=_{])", node.value
                ):
                    if flag not in all_flags() | foreign | old:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {flag}")
    assert not wrong, wrong


EFFECTS = {  # flag: (recipe, more flags, where it takes effect)
    "--loss-on": ("sft", (), "loss_weights"),
    "--beta": ("dpo", ("--model-path", "TINY"), "sigmoid"),
    "--adapter": ("sft", ("--adapter", "lora"), "add_adapter"),
    "--max-tokens-per-micro": ("sft", (), "split_micro"),
    "--image-encoder": ("multimodal", ("--image-encoder", "builtin"), "load_encoder"),
}


@pytest.mark.slow
@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_is_near_its_effect(flag, tmp_path, monkeypatch):
    """From main to the line where a flag takes effect: at most 5 frames in at most 3 files."""
    recipe, more, effect = EFFECTS[flag]
    stacks: list[list[tuple[str, str]]] = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_name == effect and len(stacks) < 50:
            stack = []
            while frame is not None:
                name = frame.f_code.co_filename
                if name.startswith((str(ROOT / "ta"), str(ROOT / "recipes"))):
                    stack.append((Path(name).name, frame.f_code.co_name))
                if frame.f_code.co_name == "main" and "/recipes/" in name:
                    break
                frame = frame.f_back
            stacks.append(stack[::-1])

    if recipe == "multimodal":
        pictures.write_pictures(tmp_path, 4, 2)
        more = (*more, "--image-root", tmp_path / "images")
    else:
        kind = tasks.chats if recipe == "sft" else tasks.preferences
        tasks.write_jsonl(tmp_path / "train.jsonl", kind("train", 8))
    more = [tiny_folder() if word == "TINY" else word for word in more]
    argv = ["x", *more, "--steps", 1, "--sample-records", 0, "--out", tmp_path / "run"]
    argv += ["--data", tmp_path / "train.jsonl", "--val-data", tmp_path / "train.jsonl"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    sys.setprofile(profile)
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    finally:
        sys.setprofile(None)
    stack = min(stacks, key=len)  # evaluation calls the step once more, from further off
    assert stack[0][1] == "main", stack
    assert len(stack) <= 5 and len({file for file, _ in stack}) <= 3, stack


def test_a_recipe_imports_no_recipe():
    names = {path.stem for path in RECIPES}
    for path in RECIPES:
        for node in nodes(path):
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
    "PIL": ("ta.media", "ta.builtin", "ta.training.report"),
    "tyro": "ta.command_line",
    "faiss": "ta.rag",
    "pyarrow": "ta.data",
}


@pytest.mark.parametrize("package", HOMES)
def test_each_foreign_package_has_one_home(package):
    users = set()
    for name, path in MODULES.items():
        for node in nodes(path):
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


HEAVY = ("torch", "transformers", "peft", "numpy", "vllm", "PIL")


def heavy_after(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after `code`."""
    check = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
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


@functools.cache
def helps() -> dict[str, dict]:
    """Of each recipe: what --help-all prints, and the heavy packages that are loaded then."""
    code = f"""
        import contextlib, io, json, runpy, sys
        found = {{}}
        for path in {[str(path) for path in RECIPES]!r}:
            sys.argv = [path, "--help-all"]
            text = io.TextIOWrapper(io.BytesIO(), "utf-8")
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                runpy.run_path(path, run_name="__main__")
            heavy = [m for m in {HEAVY!r} if m in sys.modules]
            text.flush()
            found[path] = {{"text": text.buffer.getvalue().decode(), "heavy": heavy}}
        print(json.dumps(found))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_help_answers_without_anything_heavy(path):
    assert helps()[str(path)]["heavy"] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_help_shows_no_default_that_says_nothing(path):
    """Of a flag that is off or whose words tell the default it would be None, "" or no word."""
    shown = " ".join(re.sub("[│─╭╰╮╯]", " ", helps()[str(path)]["text"]).split())
    assert "(default: " in shown and not re.findall(r"\S+ \(default:( None)? ?\)", shown)


def flags_of(path: Path) -> list[str]:
    return re.findall(r"│ (--[a-z][a-z0-9-]*)", helps()[str(path)]["text"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_flags_are_flat_and_few(path):
    flags = flags_of(path)
    assert len(flags) == len(set(flags)), "two owners of one flag"
    assert 3 <= len(flags) <= 120 and not any("." in flag for flag in flags)


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
