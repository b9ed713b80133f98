"""Rollouts and a teacher by a vLLM server: a stand-in answers as vLLM 0.32 was seen to answer; with vLLM installed the server is a real one."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file
from test_rollouts import die_at, rollouts, story
from test_vllm_rollouts import write_model

import ta
from ta.builtin.models import tiny_tokenizer
from ta.builtin.tasks import practice, write_jsonl
from ta.data.batch import lay_out, sequences_of
from ta.generation.generate import generate
from ta.generation.settings import GenerateConfig
from ta.generation.vllm_server import open_server
from ta.rl.batches import lay_out_answers, sampled

REAL = importlib.util.find_spec("vllm") is not None


class StandIn(BaseHTTPRequestHandler):
    """The parts of vLLM's server that are used, around a model of transformers."""

    model = tokenizer = None
    lock, asked, closed = threading.Lock(), [], ()
    # as a server tells of --weight-transfer-config
    transfer = None

    def log_message(self, *_):
        pass

    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        told = {"/v1/models": {"data": [{"id": "served", "max_model_len": 200}]}}
        config = {"weight_transfer_config": self.transfer}
        told["/server_info?config_format=json"] = {"vllm_config": config}
        told["/get_world_size"] = {"world_size": 2}
        self.reply(told[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append(self.path)
            if self.path in self.closed:
                return self.reply({"detail": "Not Found"}, 404)
            return self.reply(getattr(self, self.path.strip("/").replace("/", "_"))(body))

    def tokenize(self, body):
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids}

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        weights = load_file(body["kwargs"]["weights_path"] + "/model.safetensors")
        assert "lm_head.weight" in weights, "a tied head is given too"
        self.model.load_state_dict(weights)
        return {"results": [None]}

    def reset_prefix_cache(self, body):
        return {"success": True}

    def v1_completions(self, body):
        if "prompt_logprobs" in body:
            ids = torch.tensor([body["prompt"]])
            with torch.no_grad():
                logps = self.model(ids).logits[0].log_softmax(-1)
            steps = zip(body["prompt"][1:], logps, strict=False)
            told = [None, *({str(i): {"logprob": row[i].item()}} for i, row in steps)]
            return {"choices": [{"prompt_logprobs": told}]}
        config = GenerateConfig(body["max_tokens"], body["temperature"], seed=body["seed"] or 0)
        given = (self.model, self.tokenizer, [body["prompt"]], config, body["stop_token_ids"])
        ((answer,),) = generate(*given)
        logprobs = {"token_logprobs": answer.logprobs}
        return {"choices": [{"token_ids": answer.ids, "logprobs": logprobs}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    write_model(folder / "model", True)
    write_jsonl(folder / "train.jsonl", practice("train", 24))
    write_jsonl(folder / "held_out.jsonl", practice("held_out", 2))
    (folder / "mine.py").write_text(
        "def f(messages, answer, record):\n    return len(answer) % 5\n"
    )
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The URL of a server of the model."""
    if REAL:
        yield from real(folder)
        return
    from transformers import LlamaForCausalLM

    StandIn.model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    StandIn.tokenizer = tiny_tokenizer()
    yield from serve(StandIn)


def serve(stand_in):
    """The URL of a server that answers as `stand_in` does."""
    ThreadingHTTPServer.request_queue_size = 128
    made = ThreadingHTTPServer(("127.0.0.1", 0), stand_in)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()


def real(folder, *flags, **environment):
    """The URL of vLLM's server of the model in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [folder / "model", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", port, "--max-model-len", 200, "--logprobs-mode", "processed_logprobs"]
    command += flags
    about = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "said", "w") as said:
        env = {**os.environ, **about, **environment}
        process = subprocess.Popen(
            list(map(str, command)), stdout=said, stderr=said, env=env, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                with socket.create_connection(("127.0.0.1", port), 1):
                    break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def tokenizer_of(folder):
    config = ta.ModelConfig(str(folder / "model"))
    return ta.load_chat_tokenizer(config, ta.TokenizerConfig(), ta.ChatConfig())


def test_sequences_of_a_batch():
    row = {"prompt_tokens": [1, 2], "answers": [{"tokens": [n], "logprobs": [0.0]} for n in (5, 6)]}
    packed = lay_out_answers(sampled([row]), True)
    padded = lay_out_answers(sampled([row]), False)
    assert packed.prefixes == (0, 2)
    assert sequences_of(packed) == sequences_of(padded) == [[1, 2, 5], [1, 2, 6]]


@pytest.mark.slow
def test_new_weights_and_answers_of_the_server_are_the_models(folder, server):
    """Greedy answers after each update, to prompts that come again, and the log-probabilities of given tokens."""
    tokenizer = tokenizer_of(folder)
    model = ta.load_for_inference(ta.ModelConfig(str(folder / "model"), dtype="float32"))
    engine = open_server(server, "--engine", tokenizer, folder / "weights")
    wrapped, _ = ta.wrap(model)
    # as long as a block of the cache and more
    greedy, prompts = GenerateConfig(max_new_tokens=12), [[5, 6, 7, 8] * 40, [9, 10, 11] * 50] * 2
    for _ in range(3):
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(0.1 * torch.randn_like(weights))
        engine.put_weights(model.named_parameters(remove_duplicate=False))
        wanted = generate(model, tokenizer.fast, prompts, greedy, [2])
        got = engine.generate(tokenizer.fast, prompts, greedy, [2], range(len(prompts)))
        for (a,), (b,) in zip(got, wanted, strict=True):
            assert a.ids == b.ids and a.text == b.text and a.finish == b.finish
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    row = {"prompt_tokens": [5, 6, 7]}
    row["answers"] = [
        {"tokens": ids, "logprobs": [0.0] * len(ids)} for ids in ([8, 9], [10, 11, 12])
    ]
    for batch in (lay_out_answers(sampled([row]), True), lay_out([], [])):
        with torch.no_grad():
            torch.testing.assert_close(
                engine.logprobs(batch), wrapped.logprobs(batch), rtol=0, atol=1e-4
            )


def flags(folder, recipe):
    given = ("--model-path", folder / "model", "--data", folder / "train.jsonl", "--steps", 3)
    given += ("--val-data", folder / "held_out.jsonl", "--batch-size", 4, "--save-every", 1)
    given += ("--max-new-tokens", 6, "--keep", 0, "--eval-every", 0)
    if recipe == "grpo":
        given += ("--rewards", f"{folder}/mine.py:f", "--num-answers", 4, "--lr", 1e-3)
    return given


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_on_a_server_learns_on_answers_of_its_weights_and_resumes(
    forked, folder, server, ahead
):
    given = ("--engine", server, "--ahead", ahead, *flags(folder, "grpo"))
    whole, killed = folder / f"whole-{ahead}", folder / f"killed-{ahead}"
    forked("grpo", *given, "--out", whole)
    died = die_at((torch.optim.AdamW, "step"), 2)
    forked("grpo", *given, "--out", killed, code=-signal.SIGKILL, before=died)
    assert len(rollouts(killed)) == 2 + ahead, "the next round is whole before an update"
    forked("grpo", *given, "--out", killed, "--resume")
    if not REAL:  # its answers do not depend on what else it is asked
        assert story(killed) == story(whole) and rollouts(killed) == rollouts(whole)
    first, *later = [row[-1] for row in story(whole)[1]]
    assert first < 1e-5 and (min(later) > 1e-4 if ahead else max(later) < 1e-5)
    steps = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    assert all(row["rollout_seconds"] > 0 for row in steps if "loss" in row)


@pytest.mark.slow
def test_two_processes_hand_over_their_shards(forked, folder, server):
    """Each asks the server for answers to its share of the prompts, of weights that one has put there."""
    given = ("--engine", server, "--ahead", 1, *flags(folder, "grpo"))
    runs = [folder / f"processes-{n}" for n in (1, 2)]
    for n, run in enumerate(runs, 1):
        forked("grpo", *given, "--out", run, processes=n)
    for number, (a, b) in enumerate(zip(*map(rollouts, runs), strict=True)):
        for row, other in zip(a, b, strict=True):
            assert row["prompt_tokens"] == other["prompt_tokens"]
            if number == 0 and not REAL:
                assert row["answers"] == other["answers"]
    gaps = [row[-1] for row in story(runs[1])[1]]
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-4
    said = forked(
        "grpo", *given, "--adapter", "lora", "--out", folder / "lora", processes=2, code=2
    )
    assert "an adapter is merged on one process alone: run it without torchrun" in said


@pytest.mark.slow
def test_a_student_learns_from_a_server(forked, folder, server):
    """Its log-probabilities stand in the file of rollouts, so that a resumed run needs no others."""
    from transformers import LlamaForCausalLM

    teacher = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(3)
    tokenizer = tokenizer_of(folder)
    engine = open_server(server, "--teacher-url", tokenizer, folder / "weights")
    engine.put_weights(teacher.named_parameters(remove_duplicate=False))
    given = ("--teacher-url", server, "--divergence", "reverse", *flags(folder, "distill"))
    forked("distill", *given, "--lr", 3e-3, "--steps", 12, "--out", folder / "student")
    steps = [json.loads(line) for line in open(folder / "student/metrics.jsonl")]
    kl = [row["kl"] for row in steps if "kl" in row]
    made = rollouts(folder / "student")
    for row in made[5]:
        (answer,) = row["answers"]
        ids = torch.tensor([row["prompt_tokens"] + answer["tokens"]])
        with torch.no_grad():
            logps = teacher(ids).logits[0].log_softmax(-1)
        n = len(answer["tokens"])
        wanted = logps[-n - 1 : -1].gather(1, ids[0, -n:, None]).flatten().tolist()
        assert answer["reference_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert kl[-1] < 0.9 * kl[0]


def test_what_cannot_be_asked_of_a_server_is_refused(door, folder, server):
    tokenizer, out = tokenizer_of(folder), ("--out", folder / "refused")
    for recipe, more, message in (
        ("grpo", ("--engine", "http://127.0.0.1:9"), "no vLLM server answers there"),
        ("grpo", ("--engine", "vlm"), "--engine vlm: give hf, vllm, or the URL"),
        ("grpo", ("--engine", server, "--kv-cache-gb", 1), "--kv-cache-gb is a setting of vLLM"),
        ("grpo", ("--engine", server, "--keep-best", "acuracy"), "the evaluations give accuracy"),
        ("distill", ("--teacher-url", server), "give --divergence reverse"),
        (
            "distill",
            ("--teacher-url", server, "--divergence", "reverse", "--no-on-policy"),
            "leave",
        ),
    ):
        code, said = door(recipe, *flags(folder, recipe), *out, *more)
        assert code == 2 and message in said
        assert not (folder / "refused").exists()
    if REAL:
        return
    try:
        StandIn.closed = ("/collective_rpc",)
        engine = open_server(server, "--engine", tokenizer, folder / "weights")
        with pytest.raises(ValueError, match="404; start it with VLLM_SERVER_DEV_MODE=1"):
            engine.put_weights([("lm_head.weight", torch.zeros(1))])
        StandIn.tokenizer = tiny_tokenizer(catalogue=True)
        with pytest.raises(ValueError, match="its tokenizer gives other ids"):
            open_server(server, "--engine", tokenizer)
    finally:
        StandIn.closed, StandIn.tokenizer = (), tiny_tokenizer()
