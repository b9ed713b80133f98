"""Rows whose columns are divided among processes: losses, log-probabilities and gradients are those of one process."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import together
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ta import parallel
from ta.builtin.model_folders import tiny_folder
from ta.builtin.tasks import chats, write_jsonl
from ta.data.batch import lay_out, part_of, to_device
from ta.model.adapters import AdapterConfig, add_adapter
from ta.model.attention import register
from ta.model.language_model import base_model, wrap

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "full": (LlamaConfig, LlamaForCausalLM, {}),
    "lora": (LlamaConfig, LlamaForCausalLM, {}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
}
GENERATOR = np.random.default_rng(0)
IDS = [GENERATOR.integers(1, 64, n) for n in (131, 17, 90, 8, 66, 3)]
WEIGHTS = [GENERATOR.random(len(x)).astype(np.float32) for x in IDS]


def results_of(kind, parts):
    """Loss, log-probabilities of own targets and whole gradients, of this process's part."""
    settings, architecture, more = KINDS[kind]
    torch.manual_seed(0)
    config = settings(**SHAPE, **HEADS, **more)
    model = architecture._from_config(config, attn_implementation=register()).double()
    if kind == "lora":
        model = add_adapter(model, AdapterConfig("lora"), [], None, 0).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    root, note = wrap(model)
    assert not note and root.packed
    if parallel.world() > 1:
        device = parallel.init()
        if parallel.rank():
            root.to("meta")
            base_model(root.inner).tie_weights()
        parallel.shard(root, device, half=False)
    root.train()
    # a group of processes has every so many-th document
    group, index = divmod(parallel.rank(), parts)
    groups = parallel.world() // parts
    batch = part_of(lay_out(IDS[group::groups], WEIGHTS[group::groups]), index, parts)
    with torch.no_grad():
        out = {"logprobs": root.logprobs(batch)}
    loss = root.loss(batch)
    loss.backward()
    out["loss"] = loss.detach()
    for name, parameter in root.named_parameters():
        if (grad := parameter.grad) is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            out[f"gradient of {name}"] = grad * parallel.world()
    return out


@pytest.mark.parametrize(
    ("kind", "processes", "parts"),
    [("full", 2, 2), ("full", 4, 4), ("full", 4, 2), ("lora", 2, 2), ("window", 2, 2)],
)
def test_a_divided_row_gives_what_a_whole_one_gives(kind, processes, parts, tmp_path):
    whole = results_of(kind, 1)

    def main(rank):
        signal.alarm(100)  # a process that waits in vain for the others ends
        torch.save(results_of(kind, parts), tmp_path / f"{rank}.pt")
        parallel.close()

    codes = together(main, processes, tmp_path / "said")
    assert codes == [0] * processes, (tmp_path / "said").read_text()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(processes)]
    loss = sum(one["loss"] for one in found)
    torch.testing.assert_close(loss, whole["loss"], rtol=1e-6, atol=0)
    if processes == parts:
        logprobs = torch.cat([one["logprobs"] for one in found])
        torch.testing.assert_close(logprobs, whole["logprobs"], rtol=1e-6, atol=1e-9)
    gradients = [name for name in whole if name.startswith("gradient")]
    assert len(gradients) > 5
    for name in gradients:
        assert whole[name].abs().sum() > 0, name
        for one in found:
            torch.testing.assert_close(one[name], whole[name], rtol=1e-6, atol=1e-8, msg=name)


def test_every_target_is_in_one_part():
    batch = lay_out(IDS, WEIGHTS)
    parts = [part_of(batch, index, 4) for index in range(4)]
    assert {part.tokens.shape for part in parts} == {(1, 128)}
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.weights for part in parts]), batch.weights)
    tokens = torch.cat([part.tokens[0] for part in parts])
    places = torch.cat([part.learned + 128 * i for i, part in enumerate(parts)])
    assert torch.equal(places, batch.learned)
    assert torch.equal(tokens[places], batch.tokens[0][batch.learned])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("tokens", [1, 128, 129, 300, 513])
def test_the_kernel_of_a_gpu_gets_the_whole_row(tokens, parts, monkeypatch):
    """Columns behind its last document it would leave as they were in memory, and their gradients too."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *_, **more: x)
    batch = part_of(lay_out([np.ones(tokens)], [np.ones(tokens)]), 0, parts)
    cuts = to_device(batch, "cuda").cuts
    assert cuts.columns == cuts.queries[-1] == cuts.keys[-1] == batch.tokens.shape[1] * parts


def test_what_cannot_be_divided_is_refused(door, tmp_path):
    code, said = door("sft", "--context-parallel", 2, "--out", tmp_path / "run")
    assert code == 2 and "torchrun --nproc-per-node 2" in said
    assert len(said.strip().splitlines()) <= 4, said


@pytest.mark.slow
def test_a_run_on_divided_rows_logs_the_same_losses(forked, tmp_path):
    source, model = tiny_folder(), tmp_path / "model"
    shutil.copytree(source, model)
    config = LlamaConfig.from_pretrained(model, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(model)
    write_jsonl(tmp_path / "train.jsonl", chats("train", 32))
    write_jsonl(tmp_path / "held_out.jsonl", chats("held_out", 16))
    flags = ("--steps", 4, "--sample-records", 2, "--eval-every", 4, "--log-every", 1)
    flags += ("--data", tmp_path / "train.jsonl", "--val-data", tmp_path / "held_out.jsonl")
    flags += ("--batch-size", 8, "--model-path", model)
    forked("sft", "--out", tmp_path / "one", *flags)
    forked("sft", "--out", tmp_path / "two", *flags, "--context-parallel", 2, processes=2)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) > 4
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert first.get(name, 0) == pytest.approx(second.get(name, 0), rel=1e-5), name
        for name in ("tokens", "learned_tokens", "step"):
            assert first.get(name) == second.get(name), name
