"""Weights by vLLM's own transfer: between stand-ins of both sides; with vLLM installed by its NCCL engines on both sides, over another communicator."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import over_store
import pytest
import torch
from test_rollouts import die_at
from test_server import REAL, StandIn, flags, real, serve, tokenizer_of
from test_vllm_rollouts import write_model

import ta
from ta.builtin.models import tiny_tokenizer
from ta.builtin.tasks import practice, write_jsonl
from ta.generation.generate import generate
from ta.generation.settings import GenerateConfig
from ta.generation.vllm_server import open_server
from ta.rl.engines import merged_weights, start_engine


class Trainer:
    """As vLLM's engine of the trainer: it waits for the workers while another thread tells the server of them."""

    def __init__(self, about, client, source):
        self.client, self.source = client, source
        self.wait(client.init_weight_transfer_engine, vars(about))

    def wait(self, tell, body):
        with ThreadPoolExecutor(1) as thread:
            if thread.submit(tell, body).exception():
                time.sleep(100)

    def send_weights(self):
        self.client.start_weight_update()
        weights = {name: tensor.tolist() for name, tensor in self.source.named_parameters()}
        self.wait(self.client.update_weights, weights)
        self.client.finish_weight_update()


class Server(StandIn):
    """As a server that was started with a weight transfer."""

    told, fails = {}, None

    def take(self, body):
        self.told.update(body or {})

    init_weight_transfer_engine = start_weight_update = update_weights = take
    finish_weight_update = take

    def reply(self, value, code=200):
        if self.path == self.fails:
            value, code = {"error": {"message": "NCCL of another kind"}}, 500
        super().reply(value, code)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The URL of a stand-in."""
    write_model(tmp_path / "model", True)
    write_jsonl(tmp_path / "train.jsonl", practice("train", 4))
    write_jsonl(tmp_path / "held_out.jsonl", practice("held_out", 2))
    now = {"tokenizer": tiny_tokenizer(), "asked": [], "told": {}, "transfer": {"backend": "nccl"}}
    for name, value in now.items():
        monkeypatch.setattr(Server, name, value)
    yield from serve(Server)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in of vLLM in the trainer, and of its CUDA device."""
    top = "vllm.distributed.weight_transfer"
    for name in ("vllm", "vllm.distributed", top, f"{top}.nccl_engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules[top].ModuleSource = lambda module: module
    sys.modules[top].WeightTransferTrainerFactory = SimpleNamespace(trainer_init=Trainer)
    sys.modules[f"{top}.nccl_engine"].NCCLTrainerInitInfo = lambda address, port, **more: (
        SimpleNamespace(master_address=address, master_port=port, **more)
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


def test_weights_go_without_a_file(tmp_path, server, vllm):
    """To two workers, which follow the trainer in the group; nothing of the old weights stays cached."""
    engine = open_server(server, "--engine", tokenizer_of(tmp_path), tmp_path / "weights")
    about = Server.told["init_info"]
    assert about["master_address"] == "127.0.0.1" and about["world_size"] == 3
    assert about["rank"] == 0 and about["master_port"] > 1023
    head, asked = torch.tensor([[1.0, 2.0]]), len(Server.asked)
    for number in range(2):
        engine.put_weights(iter([("table", head + number), ("lm_head.weight", head + number)]))
        sent = [[1.0 + number, 2.0 + number]]
        assert Server.told["update_info"] == {"table": sent, "lm_head.weight": sent}
    names = ("start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache")
    assert Server.asked[asked:] == [f"/{name}" for name in names] * 2
    assert not (tmp_path / "weights").exists()


def test_a_transfer_that_cannot_be_is_refused(door, tmp_path, server, vllm, monkeypatch):
    def refused(message):
        given = ("--engine", server, *flags(tmp_path, "grpo")[:-6])
        code, said = door("grpo", *given, "--rewards", "exact", "--out", tmp_path / "run")
        assert code == 2 and message in said, said
        assert len(said.strip().splitlines()) == 1

    begun = time.monotonic()
    for path in ("/init_weight_transfer_engine", "/update_weights"):
        monkeypatch.setattr(Server, "fails", path)
        refused(f'no weights go: {server}{path} answers 500: {{"error": {{"message": "NCCL of ano')
    assert time.monotonic() - begun < 50, "it does not wait for the workers"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    refused("--weight-transfer-config of nccl, which needs a CUDA device here too: leave it out")
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused("--weight-transfer-config, which needs vLLM here too: leave it out, or pip install")
    monkeypatch.setattr(Server, "transfer", {"backend": "ipc"})
    refused("--weight-transfer-config of 'ipc': give nccl, or leave it out")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def vllm_server(request, tmp_path):
    """The URL of vLLM's server of the model of a folder, with its NCCL engine."""
    if not REAL:
        pytest.skip("vLLM is not installed")
    write_model(tmp_path / "model", request.param)
    plugin = tmp_path / "over_store-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: over-store\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nover_store = over_store:register\n"
    )
    paths = [tmp_path, Path(over_store.__file__).parent, os.environ.get("PYTHONPATH", "")]
    transfer = ("--weight-transfer-config", json.dumps({"backend": "nccl"}))
    yield from real(tmp_path, *transfer, PYTHONPATH=os.pathsep.join(map(str, paths)))


@pytest.mark.slow
def test_after_a_transfer_greedy_answers_are_the_trainers(
    tmp_path, vllm_server, forked, monkeypatch
):
    """Of all weights and of a LoRA that is merged on the way, to prompts that come again; then in a run that is killed and goes on."""
    monkeypatch.setattr(torch.accelerator, "current_device_index", None)
    monkeypatch.setattr(torch.accelerator, "synchronize", None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    over_store.register()
    config, compute = ta.ModelConfig(str(tmp_path / "model"), dtype="float32"), ta.ComputeConfig()
    tokenizer = tokenizer_of(tmp_path)
    plain, lora = (
        ta.load_model(config, ta.AdapterConfig(kind), compute, tokenizer)
        for kind in ("none", "lora")
    )
    asked = (ta.VllmConfig(), config, plain, tokenizer, tmp_path / "weights")
    engine = start_engine(vllm_server, *asked)
    # as long as a block of the cache and more
    prompts, greedy = [[5, 6, 7, 8] * 40, [9, 10, 11] * 50] * 2, GenerateConfig(max_new_tokens=12)
    seen = []
    for model in (plain, plain, lora, lora):
        with torch.no_grad():
            for weights in (p for p in model.parameters() if p.requires_grad):
                weights.add_(0.1 * torch.randn_like(weights))
        engine.put_weights(merged_weights(model))
        wanted = generate(model, tokenizer.fast, prompts, greedy, [2])
        got = engine.generate(tokenizer.fast, prompts, greedy, [2], range(len(prompts)))
        for (a,), (b,) in zip(got, wanted, strict=True):
            assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        seen.append(tuple(got[0][0].ids))
    assert len(set(seen)) == 4, "each update changes the answers"
    assert not (tmp_path / "weights").exists()

    write_jsonl(tmp_path / "train.jsonl", practice("train", 12))
    write_jsonl(tmp_path / "held_out.jsonl", practice("held_out", 2))
    (tmp_path / "mine.py").write_text(
        "def f(messages, answer, record):\n    return len(answer) % 5\n"
    )
    given = (*flags(tmp_path, "grpo"), "--lr", 1e-2, "--engine", vllm_server)
    given += ("--out", tmp_path / "run")
    died = die_at((torch.optim.AdamW, "step"), 3)
    forked("grpo", *given, code=-signal.SIGKILL, before=died)
    for processes, more in ((1, "--resume"), (2, "--overwrite")):
        forked("grpo", *given, more, processes=processes)
        steps = [json.loads(line) for line in open(tmp_path / "run/metrics.jsonl")]
        gaps = [step["mismatch"] for step in steps if "mismatch" in step]
        assert len(gaps) == 3 and max(gaps) < 1e-5
