"""The command `ta`: run a recipe, copy one to edit, look at this machine.

    ta                        the recipes, a line each
    ta sft --data chats.jsonl the same as python recipes/sft.py --data chats.jsonl
    ta copy dpo my_method.py  a recipe to edit
    ta help                   this page; ta help TOPIC reads a chapter of the guide
    ta doctor                 versions, devices, extras, memory and disk
    ta from-turbo s.json      the command for a settings file of turbo-alignment
    ta convert FROM OUT       pickled weights, SentencePiece tokenizers and tables of pictures to
                              what is read here

`python -m ta` is the same command, also for torchrun: `torchrun -m ta sft ...`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ta.command_line import guard
from ta.convert import convert
from ta.files import write_atomic
from ta.from_turbo import from_turbo, script
from ta.recipe_files import PACKAGE, RECIPES, recipe_names

GUIDE = PACKAGE / "guide"
EXTRAS = {  # package: what it adds
    "vllm": "--engine vllm",
    "bitsandbytes": "--quantize 4bit and 8bit",
    "faiss": "--approximate search",
    "pyarrow": "data in parquet and arrow files",
    "tensorboard": "--log tensorboard",
    "wandb": "--log wandb",
    "trackio": "--log trackio",
    "clearml": "--log clearml",
}


def main() -> None:
    """Run the command that sys.argv names; exit code 2 where there is none of that name."""
    name, *rest = sys.argv[1:] or ["help"]
    commands = {"copy": copy, "doctor": doctor, "from-turbo": turbo, "convert": converted}
    commands |= dict.fromkeys(("help", "-h", "--help"), usage)
    if name in recipe_names():
        page = str(RECIPES / f"{name}.py")
        sys.argv = [page, *rest]
        runpy.run_path(page, run_name="__main__")
    elif name in commands:
        raise SystemExit(guard(lambda: commands[name](*rest)))
    else:
        raise SystemExit(guard(lambda: unknown(name)))


def usage(*words: str) -> None:
    """Print a chapter of the guide, or the commands and the recipes, a line each.

    ValueError for a chapter that does not exist.
    """
    topics = {path.stem: path for path in sorted(GUIDE.glob("*.md"))}
    if words:
        if words[0] not in topics:
            raise ValueError(f"ta help {words[0]}: give one of {', '.join(topics)}")
        text = re.sub(r"<!-- .* -->\n", "", topics[words[0]].read_text(encoding="utf-8"))
        return print(text)
    print(f"{__doc__}\nThe guide: {', '.join(topics)}\n\nThe recipes:\n")
    width = max(map(len, recipe_names()))
    columns = shutil.get_terminal_size().columns
    for name in recipe_names():
        text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
        first = " ".join(text.split('"""')[1].split("\n\n")[0].split())
        line = f"    {name.ljust(width)}  {first}"
        print(line if len(line) <= columns else line[: columns - 1] + "…")


def unknown(name: str) -> None:
    """ValueError for a command that does not exist."""
    raise ValueError(f"ta {name}: no such command; ta alone lists them")


def copy(*words: str) -> None:
    """Write a recipe to a file of the user's. ValueError where the file exists."""
    if len(words) != 2 or words[0] not in recipe_names():
        raise ValueError(f"give: ta copy RECIPE FILE.py, with one of {', '.join(recipe_names())}")
    name, file = words[0], Path(words[1])
    if file.exists():
        raise ValueError(f"{file} exists: give a new file")
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    write_atomic(file, text.replace(f"recipes/{name}.py", str(file)))
    print(f"{file}: edit it, then run python {file} (its settings: python {file} --help)")


def turbo(*words: str) -> None:
    """Print the commands for a settings file of turbo-alignment; write records that stand in it.

    ValueError where the file cannot be read or is none of theirs, and where records would replace
    a file that exists.
    """
    if len(words) != 1:
        raise ValueError("give: ta from-turbo SETTINGS.json")
    try:
        settings = json.loads(Path(words[0]).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{words[0]} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{words[0]} holds no settings: give an object")
    made = from_turbo(settings)
    for name, records in made.files.items():
        if Path(name).exists():
            raise ValueError(f"{name} exists, and the records of {words[0]} would replace it")
        write_atomic(Path(name), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print(script(made))


def converted(*words: str) -> None:
    """Convert a file or folder of another program. ValueError where it cannot be."""
    if len(words) != 2:
        raise ValueError("give: ta convert FROM OUT")
    print(convert(*words))


def doctor() -> None:
    """Print what this machine has, and what of ta will be slow or missing on it."""
    import torch

    print(f"python {sys.version.split()[0]}, ta in {RECIPES.parent}")
    for name in ("ta", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"):
        print(f"  {name} {_version(name) or 'missing'}")
    print("devices")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            card = torch.cuda.get_device_name(index)
            print(f"  {card}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    else:
        print("  no GPU: arithmetic is float32 on the CPU; models of more than 1B will be slow")
    vector = torch.backends.cpu.get_cpu_capability()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = shutil.disk_usage(".").free / 2**30
    print(f"  {os.cpu_count()} CPU cores ({vector}), {memory:.0f} GiB memory, {disk:.0f} GiB disk")
    print("extras")
    for name, use in EXTRAS.items():
        print(f"  {name} {_version(name) or ('present' if find_spec(name) else 'missing')}: {use}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
