"""An adapter knows its base: another one is refused and named, an adapter of another library loads where it fits."""

import json

import pytest
from adapted import LORA, NEW, base, same
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from ta.model.adapters import (
    AdapterConfig,
    add_adapter,
    load_adapter,
    probe_logits,
    read_facts,
    save_adapter,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(add_adapter(base("llama", NEW), LORA, NEW), folder)
    return folder


def test_an_adapter_of_another_base_names_both(saved):
    cases = {
        "weights differ": base(seed=1),
        "architectures differ": base("qwen3"),
        "vocabularies differ": base(vocab_size=19),
    }
    for reason, model in cases.items():
        with pytest.raises(ValueError, match=reason) as error:
            load_adapter(model, saved)
        assert str(saved) in str(error.value) and type(model).__name__ in str(error.value)
    with pytest.raises(ValueError, match="vocabularies differ"):
        load_adapter(base(vocab_size=30), saved)
    with pytest.raises(ValueError, match="of a language model, and a reward model or classifier"):
        load_adapter(base(head=AutoModelForSequenceClassification), saved)
    assert read_facts(saved).base["vocabulary"] == 22


def foreign(saved, folder, **change):
    """The adapter as another library saves it: without what it says of its base; settings and weights changed as asked."""
    folder.mkdir()
    config = json.loads((saved / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change.get("config", {})))
    save_file(
        change.get("weights") or load_file(saved / "adapter_model.safetensors"),
        folder / "adapter_model.safetensors",
    )
    return folder


def test_adapters_of_other_libraries_load_when_they_fit(saved, tmp_path):
    weights = load_file(saved / "adapter_model.safetensors")
    loaded = load_adapter(base("llama", NEW), foreign(saved, tmp_path / "a"))
    assert same(probe_logits(loaded), probe_logits(load_adapter(base(), saved)))
    with pytest.raises(ValueError, match="token ids up to 21, but the model has 20 rows"):
        load_adapter(base(), tmp_path / "a")
    first = sorted(weights)[0]
    less, more = (
        {n: t for n, t in weights.items() if n != first},
        weights | {"x": weights[first].clone()},
    )
    for i, changed in enumerate((weights | {first: weights[first][:, :1].clone()}, less, more)):
        with pytest.raises(ValueError, match="does not fit the model"):
            load_adapter(base("llama", NEW), foreign(saved, tmp_path / f"b{i}", weights=changed))
    with pytest.raises(ValueError, match="known are LORA"):
        load_adapter(
            base("llama", NEW), foreign(saved, tmp_path / "c", config={"peft_type": "IA3"})
        )


def test_prompt_learning_of_a_wider_base_does_not_fit(tmp_path):
    save_adapter(
        add_adapter(base(hidden_size=32), AdapterConfig(adapter="prompt", virtual_tokens=3)),
        tmp_path,
    )
    (tmp_path / "base.json").unlink()
    with pytest.raises(ValueError, match=r"\(3, 32\) in the adapter and \(3, 16\) by the model"):
        load_adapter(base(), tmp_path)


def test_a_text_start_of_another_library_looks_up_no_tokenizer(tmp_path):
    save_adapter(add_adapter(base(), AdapterConfig(adapter="prompt", virtual_tokens=3)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "hello",
        "tokenizer_name_or_path": "nobody/nothing",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(base(), tmp_path, trainable=True)


def test_folders_that_are_no_adapter(saved, tmp_path):
    with pytest.raises(ValueError, match="no adapter folder at"):
        load_adapter(base(), tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"holds no adapter_config.json and no adapter_model.safetensors"
    ):
        load_adapter(base(), tmp_path)
    foreign(saved, tmp_path / "a")
    for text in ('{"peft_type": "LO', "[" * 200_000, "[1]", b"\xff"):
        (tmp_path / "a" / "adapter_config.json").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
        with pytest.raises(
            ValueError, match=r"adapter_config.json (is not valid JSON|holds a list)"
        ):
            load_adapter(base(), tmp_path / "a")


def test_torn_weights_are_named(saved, tmp_path):
    foreign(saved, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    for size in (0, 5, 100, path.stat().st_size - 1):
        path.write_bytes((saved / path.name).read_bytes()[:size])
        with pytest.raises(
            ValueError,
            match=r"adapter_model.safetensors does not load as a complete safetensors file",
        ):
            load_adapter(base("llama", NEW), tmp_path / "a")
