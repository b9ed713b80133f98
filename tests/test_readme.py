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
