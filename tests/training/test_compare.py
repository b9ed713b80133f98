"""Several runs on one page: the curves that they share, the last figures, the settings that differ."""

import json

import pytest

from ta.training.report import comparison


def run(folder, lr, losses, held_out=True):
    folder.mkdir()
    config = {"config": {"optim": {"lr": lr, "clip": 1.0}, "beta": 0.1}}
    (folder / "config.json").write_text(json.dumps(config))
    key = "val_loss" if held_out else "loss"
    lines = [json.dumps({"step": step, key: loss}) for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    same = {"step": 2, "id": "a", "prompt": "p", "answer": f"{losses[-1]}", "reference": "1.5"}
    samples = [same, same | {"id": "b", "prompt": str(lr)}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples))
    return folder


def test_the_page_names_what_differs_and_ends(tmp_path, door):
    a = run(tmp_path / "<a>", 1e-3, [3, 2, 1.5])
    b = run(tmp_path / "b", 2e-3, [3, 2.5, 1.25])
    text = comparison([a, b])
    assert "<td>lr</td><td>0.001</td><td>0.002</td>" in text.replace(" class=n", "")
    assert (
        "clip" not in text
        and "<td>loss, held out</td><td>1.5</td><td>1.25</td><td>-0.25</td>" in text
    )
    # a record of the same name whose question differs is no common one
    assert text.count("<article>") == 1 and "run 1 right, run 2 wrong: 1" in text
    assert "run 1: &lt;a&gt;" in text and "<a>" not in text and "<script" not in text
    assert text.count('class="line run-1"') == text.count('class="line run-2"') == 1
    out = tmp_path / "c.html"
    assert door("compare", "--runs", a, b, "--out", out) == (
        0,
        f"done: {out}, open it in a browser\n",
    )
    assert out.read_text() == text
    code, said = door("compare", "--runs", a, b, "--out", out)
    assert code == 2 and "--overwrite" in said


def test_training_figures_stand_in_where_a_run_has_no_held_out_ones(tmp_path):
    a = run(tmp_path / "a", 1, [3, 2], held_out=False)
    b = run(tmp_path / "b", 1, [3, 1], held_out=False)
    assert "loss, training" in comparison([a, b])


@pytest.mark.parametrize("count", [0, 1, 5])
def test_other_numbers_of_runs_are_refused(count, tmp_path):
    with pytest.raises(ValueError, match="2 to 4"):
        comparison([tmp_path] * count)


@pytest.mark.parametrize("settings", [None, "[1]", '{"config": ', '{"model_type": "llama"}'])
def test_a_folder_that_is_no_run_is_refused(settings, tmp_path):
    if settings:
        (tmp_path / "config.json").write_text(settings)
        (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="give a run folder"):
        comparison([tmp_path, tmp_path])
