"""What the README shows is run."""

import re

import warm
from conftest import ROOT, together


def test_the_library_section_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- library -->\n```python\n(.*?)```", text, flags=re.S)
    warm.preload()
    codes = together(lambda rank: exec(code, {}), 1, tmp_path / "said")
    assert codes == [0], (tmp_path / "said").read_text()


def test_what_the_table_of_places_names_stands_there():
    """Each `NAME`, or `CLASS.NAME`, that is said to be in a file is defined in that file."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("| to find |")[2].partition("\n\n")[0]
    places = re.findall(
        r"((?:`[\w.]+`(?:, | and )?)+)(?: \([^)]*\))? in ((?:ta|recipes)/[\w/]+\.py)", table
    )
    assert len(places) > 25
    for names, path in places:
        source = (ROOT / path).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"^ *(?:(?:def|class) )?{part}\b", source, re.M), (name, path)
