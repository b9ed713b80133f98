"""Rows of new tokens beside a frozen table: generation finds them in the table itself."""

import pytest
import torch
from adapted import LORA, NEW, base
from peft.tuners.trainable_tokens import TrainableTokensLayer

from ta.builtin.models import tiny_tokenizer
from ta.generation.generate import generate
from ta.generation.settings import GenerateConfig
from ta.model.adapters import add_adapter
from ta.model.language_model import wrap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi"])  # phi's head has a bias
def test_generation_copies_no_table_and_leaves_all_as_it_was(name, dtype, monkeypatch):
    model = add_adapter(base(name, NEW, dtype=dtype), LORA, NEW).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ids = want = [5, NEW[0], 7, NEW[1]]
    with torch.no_grad():
        for _ in range(6):
            want = [*want, model(input_ids=torch.tensor([want])).logits[0, -1].argmax().item()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapper, _ = wrap(model)
    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", None)
    config = GenerateConfig(max_new_tokens=6)
    (((answer),),) = generate(wrapper, tiny_tokenizer(), [ids], config, [], fixed_shapes=True)
    assert ids + answer.ids == want
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
