"""What a function of the user depends on: any change of it changes the key, and nothing else does."""

import functools
import importlib
import os
import re
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from ta.data.dependencies import dependencies
from ta.data.records import check_chat, check_prompt

HELPERS = """
import functools
FACTOR = 1
class Cleaner:
    mark = "-"
    def __init__(self, times): self.times = times
    @functools.cached_property
    def twice(self): return self.times - 2
    @staticmethod
    def lower(text): return text.lower()
    def clean(self, text): return self.lower(text).strip(self.mark) * self.times
@functools.lru_cache
def most(n): return n + 1
def shorten(text): return text[:most(FACTOR)]
"""
PAGE = """
import re
import users_helpers
import users_package.inner
from users_helpers import Cleaner
SPACE = re.compile(" +")
NAMES = {"b", "a", "c"}
cleaner = Cleaner(2)
def outer(limit=3):
    def check(record):
        import users_late
        from users_package import inner
        text = users_late.inner.late(users_package.inner.deep(record))
        return cleaner.clean(users_helpers.shorten(SPACE.sub(" ", text))), limit, NAMES
    return check
check = outer()
unrelated = 1
"""
LATE = "import users_package.inner as inner"
INNER = """
def deep(text): return text + "deep"
def late(text): return text + "late"
"""
MODULES = {
    "users_helpers": HELPERS,
    "users_package.__init__": "",
    "users_package.inner": INNER,
    "users_late": LATE,
    "users_page": PAGE,
}
KEY = "import users_page, ta.data.dependencies as d; print(d.dependencies(users_page.check))"


@pytest.fixture
def key(tmp_path, monkeypatch):
    """key(a change of one module) -> the key of the page's check, imported anew."""
    monkeypatch.syspath_prepend(tmp_path)

    def made(before="", after=""):
        assert before in "".join(MODULES.values())
        (tmp_path / "users_package").mkdir(exist_ok=True)
        for name, source in MODULES.items():
            path = tmp_path / f"{name.replace('.', '/')}.py"
            path.write_text(source.replace(before, after) if before else source)
            sys.modules.pop(name.removesuffix(".__init__"), None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        return dependencies(importlib.import_module("users_page").check)

    yield made
    for name in MODULES:
        sys.modules.pop(name.removesuffix(".__init__"), None)


CHANGES = [
    ("limit=3", "limit=4"),
    ('" +"', '"  +"'),
    ('{"b", "a", "c"}', '{"b", "a"}'),
    ("Cleaner(2)", "Cleaner(3)"),
    ("FACTOR = 1", "FACTOR = 10"),
    ('mark = "-"', 'mark = "+"'),
    ("* self.times", "+ str(self.times)"),
    ("text[:most(FACTOR)]", "text[FACTOR:]"),
    ("n + 1", "n + 2"),
    ('"deep"', '"deeper"'),
    ('"late"', '"later"'),
    ("self.times - 2", "self.times - 3"),
    ("text.lower()", "text.upper()"),
]


@pytest.mark.parametrize("before, after", CHANGES)
def test_a_change_of_what_a_function_reads_changes_its_key(key, before, after):
    assert key() != key(before, after)


def test_other_changes_do_not(key):
    assert (
        key()
        == key("unrelated = 1", "unrelated = 2")
        == key("\nclass Cleaner", "\n# a line\nclass Cleaner")
    )


def test_the_key_is_the_same_in_every_process(key, tmp_path):
    mine = key()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", KEY], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == mine, done.stderr


def test_enclosed_and_given_values_count_and_what_is_installed_is_a_name():
    enclosed = [lambda x, factor=factor: x * factor for factor in (1, 2)]
    given = [functools.partial(str.replace, new) for new in ("a", "b")]
    bound = [re.compile(pattern).sub for pattern in ("a", "b")]
    for one, other in (enclosed, given, bound, (check_chat, check_prompt), (str.strip, str.split)):
        assert dependencies(one) == dependencies(one) != dependencies(other)


def test_what_holds_itself_ends_and_what_cannot_be_compared_is_an_error():
    def again(n):
        return again(n - 1) if n else rounds

    rounds = [again]
    assert dependencies(again) == dependencies(again)
    lock = threading.Lock()
    with pytest.raises(ValueError, match=r"depend on a lock.*plain values"):
        dependencies(lambda record: lock)
