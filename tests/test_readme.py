"""What the README shows is run."""

import os
import re
import subprocess
import sys

from conftest import ROOT


def test_the_library_section_runs():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- library -->\n```python\n(.*?)```", text, flags=re.S)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
