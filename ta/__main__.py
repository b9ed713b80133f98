"""The command `ta`: run a recipe, copy one to edit, look at this machine.

    ta                       the recipes, a line each
    ta sft --data c.jsonl    the same as python recipes/sft.py --data c.jsonl
    ta sft --help            the flags of a recipe
    ta copy dpo mine.py      a recipe to edit
    ta help TOPIC            a chapter of the guide
    ta doctor                versions, devices, extras, memory and disk
    ta from-turbo s.json     the command for a settings file of turbo-alignment
    ta convert FROM OUT      pickled weights, tables: to what is read here

`python -m ta` is the same command, also for torchrun: `torchrun -m ta sft ...`.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import ta
from ta.command_line import guard
from ta.files import cache_folder, write_atomic, write_jsonl
from ta.folders import read_json
from ta.from_turbo import from_turbo, script
from ta.recipe_files import PACKAGE, RECIPES, recipe_names
from ta.screen import hanging, wrapped_page

GUIDE = PACKAGE / "guide"
EXTRAS = {  # module: what to install, what it adds
    "vllm": ("vllm", "--engine vllm"),
    "bitsandbytes": ("bitsandbytes", "--quantize 4bit and 8bit"),
    "torchao": ("torchao", "--optimizer adamw8bit and --float8"),
    "faiss": ("faiss-cpu", "--approximate search"),
    "jsonschema": ("jsonschema", "schema:FILE rewards"),
    "pyarrow": ("pyarrow", "data in parquet and arrow files"),
    "sentencepiece": ("sentencepiece protobuf", "ta convert tokenizer.model"),
    "tensorboard": ("tensorboard", "--log tensorboard"),
    "wandb": ("wandb", "--log wandb"),
    "trackio": ("trackio", "--log trackio"),
    "clearml": ("clearml", "--log clearml"),
}


def main() -> None:
    """Run the command that sys.argv names; exit code 2 where there is none of that name."""
    name, *words = sys.argv[1:] or ["help"]
    raise SystemExit(guard(lambda: run(name, words)))


def run(name: str, words: list[str]) -> None:
    """Run a recipe or a command; ValueError for what is none, and for words it does not take."""
    commands = {
        "copy": (copy, "RECIPE FILE.py"),
        "from-turbo": (turbo, "SETTINGS.json"),
        "convert": (converted, "FROM OUT"),
        "doctor": (doctor, ""),
    }
    if name in recipe_names():
        sys.argv = [str(RECIPES / f"{name}.py"), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif name in ("help", "-h", "--help"):
        usage(words)
    elif name not in commands:
        raise ValueError(f"ta {name}: no such command; ta alone lists them")
    else:
        action, takes = commands[name]
        if len(words) != len(takes.split()):
            raise ValueError(f"give: ta {name} {takes}".rstrip())
        action(*words)


def usage(words: list[str]) -> None:
    """Print a chapter of the guide, or the commands and the recipes.

    A terminal gets it in its own width, a file or a pipe as it is written. ValueError for a chapter
    that does not exist.
    """
    topics = {path.stem: path for path in sorted(GUIDE.glob("*.md"))}
    if words:
        if len(words) > 1 or words[0] not in topics:
            flags = f"ta {words[0]} --help shows its flags; " * (words[0] in recipe_names())
            raise ValueError(f"ta help {' '.join(words)}: {flags}give one of {', '.join(topics)}")
        text = re.sub(r"<!-- .* -->\n", "", topics[words[0]].read_text(encoding="utf-8"))
        return print(wrapped_page(text) if sys.stdout.isatty() else text)
    columns = shutil.get_terminal_size().columns
    print(wrapped_page(f"{__doc__}\nThe guide: {', '.join(topics)}\n\nThe recipes:\n"))
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
        first = text.split('"""')[1].split("\n\n")[0]
        print(hanging(first, columns, width + 6, f"    {name.ljust(width)}  "))


def copy(name: str, path: str) -> None:
    """Write a recipe to a file of the user's. ValueError where the file exists."""
    if name not in recipe_names():
        raise ValueError(f"ta copy {name}: give one of {', '.join(recipe_names())}")
    file = Path(path)
    if file.exists():
        raise ValueError(f"{file} exists: give a new file")
    text = (RECIPES / f"{name}.py").read_text(encoding="utf-8")
    write_atomic(file, text.replace(f"recipes/{name}.py", str(file)))
    print(f"{file}: edit it, then run python {file} (its settings: python {file} --help)")


def turbo(path: str) -> None:
    """Print the commands for a settings file of turbo-alignment; write records that stand in it.

    ValueError where the file cannot be read or is none of theirs, and where records would replace
    a file that exists.
    """
    made = from_turbo(read_json(Path(path)))
    for name, records in made.files.items():
        if Path(name).exists():
            raise ValueError(f"{name} exists, and the records of {path} would replace it")
        write_jsonl(name, records)
    print(script(made))


def converted(source: str, out: str) -> None:
    """Convert a file or folder of another program. ValueError where it cannot be."""
    print(ta.convert.convert(source, out))


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
    print(f"  {os.cpu_count()} CPU cores ({vector})")
    print("free")
    print(f"  {_free_memory() / 2**30:.0f} GiB memory")
    print(f"  {shutil.disk_usage('.').free / 2**30:.0f} GiB disk of this folder")
    print(f"prepared data and built-in models: {cache_folder('')}")
    print("extras")
    for name, (package, use) in EXTRAS.items():
        missing = f"missing (pip install {package})"
        print(f"  {name} {(_version(name) or 'there') if find_spec(name) else missing}: {use}")


def _free_memory() -> int:
    """Bytes of memory that a program may still take; where Linux does not say so, all there are."""
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable: +(\d+)", text)[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
