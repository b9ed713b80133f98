"""The card of an exported model, and a recipe called from Python."""

import dataclasses
import shlex

import judged
import pytest
import yaml

from ta.flags import translate_flags


def config_of(recipe, folder, **loop):
    config = recipe.Config()
    return dataclasses.replace(
        config,
        loop=dataclasses.replace(config.loop, out=str(folder), **loop),
        batches=dataclasses.replace(config.batches, steps=2, batch_size=4),
        samples=dataclasses.replace(config.samples, sample_records=0),
    )


def test_a_recipe_called_from_python_gives_folder_and_figures_and_writes_a_card(
    few_records, tmp_path
):
    sft = judged.recipe("sft")
    config = config_of(sft, tmp_path / "run")
    folder, figures = sft.main(config)
    assert folder == tmp_path / "run" / "final" and set(figures) == {"loss"}
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head == {"library_name": "transformers", "base_model": "builtin"}
    assert f"{figures['loss']:.4g} |" in text and "| steps | 2 |" in text and "loop" not in text
    command = shlex.split(text.split("```sh\n")[1].split("\n")[0])
    assert command[:2] == ["ta", "sft"]
    assert translate_flags(command[2:], sft.Config) == command[2:] and "--steps=2" in command
    rows = [line for line in text.splitlines() if "64 of 64" in line]
    assert len(rows) == 1


def test_no_card_and_ranges_hold_without_a_command_line(few_records, tmp_path):
    sft = judged.recipe("sft")
    folder, _ = sft.main(config_of(sft, tmp_path / "run", model_card=False))
    assert not (folder / "README.md").exists()
    with pytest.raises(ValueError, match="--log-every 0"):
        sft.main(config_of(sft, tmp_path / "other", log_every=0))
