"""Settings of adapters: what cannot work is refused before anything is loaded, or as soon as the model is known."""

import pytest
from adapted import KINDS, LORA, NEW, base

from ta.model.adapters import AdapterConfig, add_adapter, check_adapter, save_adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_adapter(add_adapter(base("llama", NEW), LORA, NEW), folder)
    return folder


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(saved):
    cases = [
        ({"adapter": "prompt", "lora_rank": 4}, "--lora-rank has no effect with --adapter prompt"),
        ({"use_dora": True}, "--use-dora has no effect with --adapter none"),
        (
            {"adapter": "prefix", "prompt_init_text": "x"},
            "--prompt-init-text has no effect with --adapter prefix: it belongs to prompt",
        ),
        ({"adapter": "lora", "virtual_tokens": 3}, "--virtual-tokens has no effect"),
        ({"adapter": "lora", "adapter_path": "x"}, "leave --adapter out to go on"),
        ({"adapter": "lora", "lora_rank": 0}, "--lora-rank 0: give a number from 1 to 65536"),
        ({"adapter": "lora", "lora_dropout": 1.0}, "--lora-dropout 1.0"),
        ({"adapter": "lora", "lora_targets": ()}, "--lora-targets is empty"),
        ({"adapter": "lora", "lora_targets": ("all-linear", "q_proj")}, "stands alone"),
        ({"adapter_path": "/nowhere"}, "no adapter folder"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            path = settings.pop("adapter_path", None)
            check_adapter(AdapterConfig(**settings), path)
    for kind in KINDS:
        config = AdapterConfig(adapter=kind)
        check_adapter(config, checkpointing=kind != "prefix")
    with pytest.raises(ValueError, match="activation checkpointing"):
        check_adapter(AdapterConfig(adapter="prefix"), checkpointing=True)
    check_adapter(AdapterConfig(), str(saved), checkpointing=True)


def test_what_does_not_fit_the_model_is_refused():
    for settings, message, name in (
        (
            {"lora_targets": ("q_proj", "nothing")},
            "--lora-targets nothing: the model has no module.*q_proj",
            "llama",
        ),
        ({"lora_modules_to_save": ("nothing",)}, "--lora-modules-to-save nothing", "llama"),
        (
            {"lora_targets": ("q_proj", "lm_head")},
            "lm_head cannot be merged, its table is tied",
            "llama-tied",
        ),
        ({"lora_modules_to_save": ("wte",)}, "peft would untie transformer.wte", "gpt2"),
        (
            {"lora_targets": ("embed_tokens",)},
            "embed_tokens cannot be merged, the rows of new tokens",
            "llama",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(base(name, NEW), AdapterConfig(adapter="lora", **settings), NEW)
    with pytest.raises(ValueError, match="token ids up to 21, but the model has 20 rows"):
        add_adapter(base(), LORA, NEW)
    model = base()
    assert add_adapter(model, AdapterConfig()) is model
