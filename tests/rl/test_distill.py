"""recipes/distill.py: its loss is the divergence of whole distributions, it is learned on and off policy, and what cannot be is refused."""

import json
import signal

import pytest
import torch
from judged import recipe
from small import prepared, tiny

from ta.builtin.model_folders import tiny_folder
from ta.builtin.tasks import chats, write_jsonl
from ta.data.loader import collate_chats
from ta.rl.settings import RolloutConfig


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_is_its_formula(kind, temperature):
    """Against all logits of the plain models in float64."""
    page = recipe("distill")
    student, teacher = tiny(dtype=torch.float64), tiny(seed=1, dtype=torch.float64, n_embd=16)
    student.temperature = teacher.temperature = temperature
    batch = collate_chats(prepared(6), range(6), True)
    config = page.Config(divergence=kind, rollouts=RolloutConfig(temperature=temperature))
    loss, count, _ = page.step(config, teacher, student, batch)
    total = 0.0
    for model in (student, teacher):
        model.inner.set_attn_implementation("sdpa")
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    for end, length in zip(ends, batch.lengths, strict=True):
        ids = batch.tokens[:, end - length : end]
        log_q, log_p = (
            (model.inner(ids).logits[0] / temperature).log_softmax(-1)
            for model in (student, teacher)
        )
        q, p = log_q.exp(), log_p.exp()
        log_m = ((p + q) / 2).log()
        values = {
            "forward": (p * (log_p - log_q)).sum(-1),
            "reverse": (q * (log_q - log_p)).sum(-1),
            "js": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        }[kind]
        here = batch.learned[(batch.learned >= end - length) & (batch.learned < end)]
        total += values[here - (end - length)].sum().item()
    assert count == len(batch.learned)
    assert loss.item() == pytest.approx(total, rel=1e-6)


@pytest.fixture
def files(tmp_path):
    """Chats, and a teacher of the student's vocabulary."""
    from transformers import LlamaForCausalLM

    from ta.builtin.models import tiny_config, tiny_tokenizer

    write_jsonl(tmp_path / "train.jsonl", chats("train", 64))
    write_jsonl(tmp_path / "held_out.jsonl", chats("held_out", 16))
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config())
    with torch.no_grad():
        # a random model is almost uniform: this one is not
        model.lm_head.weight.mul_(6)
    for name in ("teacher", "other"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        # the other one says the same of other tokens
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
    return tmp_path


def flags(files, name="run"):
    given = ("--model-path", tiny_folder(), "--teacher-path", files / "teacher")
    given += ("--data", files / "train.jsonl", "--val-data", files / "held_out.jsonl")
    given += ("--batch-size", 4, "--sample-records", 0, "--lr", 1e-3, "--out", files / name)
    return given if name == "off" else (*given, "--max-new-tokens", 6)


def held_out(folder):
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    return [row["val_loss"] for row in rows if "val_loss" in row]


@pytest.mark.slow
def test_the_student_comes_nearer_on_and_off_policy(forked, files):
    """Held-out divergence, on the answers of the data both times: -15 % (on policy), -60 % (off)."""
    forked("distill", *flags(files, "on"), "--steps", 20)
    forked("distill", *flags(files, "off"), "--steps", 20, "--no-on-policy")
    first, last = held_out(files / "on")
    assert last < 0.97 * first
    before, after = held_out(files / "off")
    assert before == pytest.approx(first) and after < 0.9 * before
    assert not (files / "off/rollouts").exists()
    # what another teacher taught is no nearer to this one (+19 %)
    other = ("--steps", 20, "--no-on-policy", "--teacher-path", files / "other")
    forked("distill", *flags(files, "off"), *other, "--out", files / "control")
    measured = ("--steps", 1, "--no-on-policy", "--model-path", files / "control/final")
    forked("distill", *flags(files, "off"), *measured, "--out", files / "measured")
    assert held_out(files / "measured")[0] > 0.99 * first
    made = [json.loads(line) for line in open(files / "on/rollouts/000003.jsonl")]
    assert len(made) == 4 and "rewards" not in made[0] and len(made[0]["answers"]) == 1


@pytest.mark.slow
def test_in_bfloat16_it_measures_what_float32_does(forked, files):
    """The teacher's weights are then held in bfloat16."""
    for dtype in ("float32", "bfloat16"):
        forked("distill", *flags(files, dtype), "--steps", 2, "--dtype", dtype)
    whole, half = (held_out(files / dtype)[0] for dtype in ("float32", "bfloat16"))
    assert half == pytest.approx(whole, rel=0.02)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same_run(forked, files):
    from test_rollouts import die_at

    import ta.rl.rollouts as module

    more = ("--steps", 3, "--save-every", 1, "--divergence", "js", "--js-beta", 0.3)
    forked("distill", *flags(files, "whole"), *more)
    died = die_at((module, "generate"), 3)
    forked("distill", *flags(files, "killed"), *more, code=-signal.SIGKILL, before=died)
    forked("distill", *flags(files, "killed"), *more, "--resume")
    shard = "checkpoints/step-00000003/shard-0.safetensors"
    assert (files / "whole" / shard).read_bytes() == (files / "killed" / shard).read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--js-beta", 0.3), "--js-beta has no effect without --divergence js"),
        (("--no-on-policy", "--updates", 2), "no effect with --no-on-policy"),
        (("--teacher-path", "nowhere"), "nowhere"),
    ],
)
def test_what_has_no_effect_is_refused(door, files, more, message):
    code, said = door("distill", *flags(files), *more)
    assert code == 2 and message in said and not (files / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(door, files):
    from ta.builtin.models import tiny_tokenizer

    tiny_tokenizer(catalogue=True).save_pretrained(files / "teacher")
    code, said = door("distill", *flags(files))
    assert code == 2 and "--teacher-path" in said and "has another vocabulary" in said
