"""`import ta`: every name is there, known to editors, and none costs the import of torch before it is used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ta


def for_editors(face=ta):
    """{name: module} of the imports under TYPE_CHECKING, each written `from m import n as n`."""
    tree = ast.parse(Path(face.__file__).read_text())
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"
    )
    imports = [(node.module, alias) for node in block.body for alias in node.names]
    assert all(alias.asname == alias.name for _, alias in imports)
    found = {alias.name: module for module, alias in imports}
    assert len(found) == len(imports), "each once"
    return found


def test_editors_and_programs_see_the_same_names():
    assert ta.__all__ == sorted(for_editors())
    assert set(ta.__all__) <= set(dir(ta))


@pytest.mark.parametrize("wing", ["media", "rag", "rl"])
def test_the_faces_of_the_wings_hold_what_they_say(wing):
    face = getattr(ta, wing)
    listed = for_editors(face)
    assert face.__all__ == sorted(listed)
    for name, home in listed.items():
        assert getattr(face, name) is getattr(import_module(home), name)
    assert not hasattr(face, "trainer")


@pytest.mark.parametrize("name", ta.__all__)
def test_every_name_is_what_its_home_says(name):
    home = for_editors()[name]
    if home == "ta":
        assert getattr(ta, name) is import_module(f"ta.{name}")
    else:
        assert getattr(ta, name) is getattr(import_module(home), name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        ta.trainer  # noqa: B018
    assert not hasattr(ta, "trainer")


SETTINGS = "ModelConfig LoopConfig BatchConfig AdapterConfig ComputeConfig ReferenceConfig cli"


@pytest.mark.parametrize("names", ["", SETTINGS], ids=["import", "settings"])
def test_settings_bring_no_torch(names):
    """A wrong flag is answered at once."""
    program = f"import sys, ta; [getattr(ta, n) for n in {names!r}.split()]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = done.stdout.split()
    assert "ta" in loaded, done.stderr
    assert not {"torch", "transformers", "peft", "tokenizers"} & set(loaded)
