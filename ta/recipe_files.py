"""Where the recipes lie: beside the package in a checkout, inside it where it is installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent
INSTALLED = PACKAGE / "recipes"
RECIPES = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """The names of the recipes, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("[a-z]*.py"))
