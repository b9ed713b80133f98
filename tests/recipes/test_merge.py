"""recipes/merge.py: the folder it writes, and what it refuses."""

import pytest
import torch
from adapted import LORA, NEW, base, train_a_step
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from recipes import merge
from ta.chat.tokenizer import add_tokens
from ta.command_line import cli
from ta.model.adapters import (
    add_adapter,
    logits_agree,
    probe_logits,
    save_adapter,
)
from ta.model.new_rows import set_rows


def run_merge(*flags):
    with pytest.raises(SystemExit) as stop:
        cli(merge.main, merge.Config, [str(flag) for flag in flags])
    return stop.value.code


@pytest.mark.parametrize("head", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_the_merge_recipe_writes_a_folder_that_plain_transformers_loads(head, tmp_path, capsys):
    settings = {} if head is AutoModelForCausalLM else {"num_labels": 3}
    base(head=head, dtype=torch.bfloat16, **settings).save_pretrained(tmp_path / "base")
    given = head.from_pretrained(tmp_path / "base", dtype=torch.float32, **settings)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    new = add_tokens(tokenizer, ("<a>=w1", "<b>=w2"))
    set_rows(given, new)
    assert tuple(token.id for token in new) == NEW
    wrapped = add_adapter(given, LORA, NEW)
    train_a_step(wrapped)
    after = probe_logits(wrapped)
    save_adapter(wrapped, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    if not settings:
        GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path / "adapter")
    flags = ("--model-path", tmp_path / "base", "--adapter-path", tmp_path / "adapter", "--out")
    assert run_merge(*flags, tmp_path / "out") == 0
    merged = head.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16 and merged.config.vocab_size == 22
    assert logits_agree(probe_logits(merged), after, 0.05)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_added_vocab() == {
        "w0": 0,
        "<a>": 20,
        "<b>": 21,
    }
    if not settings:
        assert merged.generation_config.eos_token_id == [7, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]

    capsys.readouterr()
    for bad, message in (
        ((*flags, tmp_path / "out"), "is not empty"),
        ((*flags, tmp_path, "--overwrite"), "which is read from"),
        ((*flags, tmp_path / "base" / "config.json"), "is a file"),
        (("--model-path", "nowhere", *flags[2:], tmp_path / "x"), "no model folder at nowhere"),
        (
            (*flags[:2], "--adapter-path", tmp_path / "base", "--out", tmp_path / "x"),
            "holds no adapter_config.json",
        ),
    ):
        assert run_merge(*bad) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
    assert run_merge(*flags, tmp_path / "out", "--overwrite") == 0
    said = capsys.readouterr().err
    assert "logits agree" in said and "Loading weights" not in said, "no bars of other libraries"

    # the adapter's folder alone: its base is where it was
    alone = ("--model-path", tmp_path / "adapter", "--out", tmp_path / "alone")
    assert run_merge(*alone, "--dtype", "float32") == 2
    assert "--dtype and --model-args are of no use" in capsys.readouterr().err
    assert run_merge("--model-path", tmp_path / "base", *alone[2:]) == 2
    assert "give the adapter in --adapter-path" in capsys.readouterr().err
    assert run_merge(*alone) == 0
    again = head.from_pretrained(tmp_path / "alone").state_dict()
    assert again.keys() == merged.state_dict().keys()
    assert all(torch.equal(again[name], x) for name, x in merged.state_dict().items())
