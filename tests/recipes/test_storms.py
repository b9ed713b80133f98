"""Killed, doubled and without room: every command that writes ends with the bytes of an undisturbed run."""

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
COMMANDS = ("generate", "score", "preprocess_images", "build_index", "merge", "sft")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_storm_of_kills_leaves_no_trace(name):
    import storms

    lines = []
    table = storms.storm([name], 5, lines.append)
    assert all(good == trials == 5 for good, trials in table[name].values()), lines
