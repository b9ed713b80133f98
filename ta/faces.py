"""What a package gives under its own name: all that its imports for editors list, loaded on first
use, so that `import ta` brings nothing heavy.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def face(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """(`__getattr__`, `__all__`) of a package whose `file` lists its names under TYPE_CHECKING.

    Each stands there as `from MODULE import NAME as NAME`; from the package itself a module is
    given whole.
    """
    nodes = ast.parse(Path(file).read_text(encoding="utf-8")).body
    imports = [part for node in nodes if isinstance(node, ast.If) for part in node.body]
    homes = {alias.name: part.module for part in imports for alias in part.names}

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        whole = home == package
        value = import_module(f"{home}.{name}") if whole else getattr(import_module(home), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, sorted(homes)
