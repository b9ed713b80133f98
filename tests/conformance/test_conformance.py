"""No cell of the conformance table is wrong: real templates against chats as people have them."""

import json

import pytest
from table import verdicts
from templates import TEMPLATES, why_absent

pytestmark = pytest.mark.conformance


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_cell_of_a_real_template_is_wrong(name, tmp_path):
    if why := why_absent(name):
        pytest.skip(why)
    row = verdicts(name, tmp_path)
    wrong = {title: v.why for title, v in row.items() if v.status in ("needless", "wrong")}
    assert not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)
