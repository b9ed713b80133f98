"""Rollouts: drawn by (seed, step, record, answer) alone, written whole before the update, read on a resume; the loss does not depend on how a step is cut."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judged import recipe
from small import tiny

import ta
from ta.builtin.model_folders import tiny_folder
from ta.builtin.tasks import practice, write_jsonl
from ta.data.batch import lay_out
from ta.data.records import check_candidates
from ta.data.sources import read_records
from ta.generation.settings import GenerateConfig
from ta.rl.batches import (
    groups_of,
    lay_out_answers,
    rewards_of,
    rollout_batches,
    sampled,
    token_values,
)
from ta.rl.engines import weights_hash
from ta.rl.rollouts import MismatchWatch, Rollouts
from ta.rl.settings import PolicyConfig, RolloutConfig


def rows(prompts=(5, 3, 8), answers=((4, 2, 3), (1, 6, 2), (5, 5, 1)), seed=0):
    """Made records: token ids and log-probabilities of answers of the given lengths, and rewards."""
    rng = np.random.default_rng(seed)
    out = []
    for prompt, sizes in zip(prompts, answers, strict=True):
        group = [
            {
                "id": str(k),
                "content": "x",
                "finish": "stop",
                "tokens": rng.integers(1, 64, n).tolist(),
                "logprobs": (-rng.random(n)).tolist(),
                "parts": {"exact": 0.0},
            }
            for k, n in enumerate(sizes)
        ]
        rewards = {answer["id"]: float(rng.integers(0, 5)) for answer in group}
        ids = rng.integers(1, 64, prompt).tolist()
        out.append({"prompt_tokens": ids, "answers": group, "rewards": rewards})
    return out


def test_units_by_hand():
    made = sampled(rows())
    assert groups_of(made, 100, True) == ([[0, 1, 2], [3, 4, 5], [6, 7, 8]], [14, 12, 19])
    # prompts of 5, 3, 8: at most 11 tokens with their answers
    cut = [[0, 1], [2], [3, 4], [5], [6], [7], [8]], [11, 8, 10, 5, 13, 13, 9]
    assert groups_of(made, 11, True) == cut
    chosen = [made[i] for i in (0, 2, 7)]
    assert groups_of(chosen, 100, False) == ([[0], [1], [2]], [9, 8, 13])


def test_a_prompt_stands_once_and_its_answers_have_the_values_of_their_own_rows():
    """Token log-probabilities and gradients equal those of answers laid out alone, in float64."""
    model, made = tiny(dtype=torch.float64), rows()
    together = lay_out_answers(sampled(made), True)
    assert together.tokens.numel() == 16 + 29 and together.prefixes == (0, 5, 5, 0, 3, 3, 0, 8, 8)
    alone = [lay_out_answers([answer], True) for answer in sampled(made)]
    got = model.logprobs(together)
    wanted = torch.cat([model.logprobs(batch) for batch in alone])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    slopes = torch.linspace(-1, 1, len(got), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((x * slopes).sum(), list(model.parameters()), allow_unused=True)
        for x in (got, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    padded = lay_out_answers(sampled(made)[:2], False)
    assert padded.tokens.shape == (2, 9) and not padded.prefixes


def test_tokens_of_the_file_are_those_that_train():
    """In the order of the file, with the prompt in front of each answer; nothing is decoded or encoded."""
    made = rows()
    batch = lay_out_answers(sampled(made), True)
    answers = [answer for row in made for answer in row["answers"]]
    assert batch.targets.tolist() == [token for answer in answers for token in answer["tokens"]]
    values = token_values(sampled(made), "logprobs")
    flat = [x for answer in answers for x in answer["logprobs"]]
    torch.testing.assert_close(values, torch.tensor(flat))


@pytest.mark.parametrize("divide", ["tokens", "answers", "constant"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_does_not_depend_on_the_cut(divide, packed):
    """Summed over micro-batches of 100, 14 and 13 tokens, and equal to the formula written out."""
    model, made, policy = tiny(dtype=torch.float64), rows(), PolicyConfig(divide=divide)
    model.set_mode("packed" if packed else "padded")
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0], [2.0, 0.0, -1.0]])
    found = []
    for budget in (100, 14, 13):
        batches = rollout_batches(made, advantages, policy, 10, budget, packed, {})
        count = sum(len(batch.sequences.learned) for batch in batches)
        sums = [
            (model.logprobs(b.sequences) * b.advantage * b.sequences.weights).sum() for b in batches
        ]
        found.append((sum(sums) / count).item())
        assert count == 20, "a group that teaches nothing is not computed"
    total = 0.0
    for i, row in enumerate(made):
        for k, answer in enumerate(row["answers"]):
            logps = model.logprobs(lay_out_answers(sampled([row])[k : k + 1], packed))
            share = {
                "tokens": 1 / 29,
                "answers": 1 / (9 * len(answer["tokens"])),
                "constant": 1 / 90,
            }
            total += (logps.sum() * advantages[i, k]).item() * share[divide]
    assert found == pytest.approx([total] * 3, rel=1e-6)


def test_a_step_without_a_lesson_has_a_loss_of_zero():
    batches = rollout_batches(rows(), torch.zeros(3, 3), PolicyConfig().filled(), 9, 100, True, {})
    assert sum(len(batch.advantage) for batch in batches) == 4 and not batches[0].advantage.any()


def test_rewards_of_uneven_groups():
    made = rows()
    made[1]["answers"].pop(0)
    table = rewards_of(made)
    assert table[1, 2].isnan() and table.isnan().sum() == 1
    assert table[1, 0] == made[1]["rewards"]["1"]


def test_the_hash_of_weights_sees_one_changed_bit():
    model = tiny()
    before = weights_hash(model)
    assert weights_hash(tiny()) == before != weights_hash(tiny(seed=1))
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] *= 1 + 1e-7
    assert weights_hash(model) != before


@pytest.mark.parametrize("shape", [(12,), (6, 6), (4, 3, 3), (40, 3)])
def test_the_hash_of_weights_sees_where_a_weight_stands(shape, monkeypatch):
    """Also in rows that hold the same numbers, and however few rows are multiplied at once."""
    start = torch.eye(math.prod(shape))[5].reshape(shape)
    start[0] += 2.0
    moved = [start.roll(1, dim) for dim in range(start.dim())]
    moved += [start.flip(0), start.flip(-1), start.flatten().roll(7).reshape(shape)]
    moved += [start.T] if shape == (6, 6) else []
    hashes = [weights_hash(torch.nn.ParameterDict({"w": w})) for w in [start, *moved]]
    assert len(set(hashes)) == len({tuple(w.flatten().tolist()) for w in [start, *moved]}) > 3
    assert weights_hash(torch.nn.ParameterDict({"w": start.bfloat16()})) not in hashes
    monkeypatch.setattr("ta.rl.engines.WEIGHTS_AT_ONCE", 7)
    assert weights_hash(torch.nn.ParameterDict({"w": start})) == hashes[0]


REWARD = """
def spread(messages, answer, record):
    return len(answer) % 5 + 0.1 * answer.count("a")
"""


@pytest.fixture(scope="module")
def grpo(forked, tmp_path_factory):
    """A run of grpo.py on the random tiny model with a reward that differs between answers."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "mine.py").write_text(REWARD)
    write_jsonl(folder / "train.jsonl", practice("train", 48))
    write_jsonl(folder / "held_out.jsonl", practice("held_out", 2))

    def start(name, *more, steps=3, told=False, **how):
        flags = ("--model-path", tiny_folder(), "--rewards", f"{folder}/mine.py:spread")
        flags += ("--data", folder / "train.jsonl", "--val-data", folder / "held_out.jsonl")
        flags += ("--steps", steps, "--batch-size", 4, "--num-answers", 4, "--max-new-tokens", 6)
        flags += ("--save-every", 1, "--lr", 1e-3, "--keep", 0)
        said = forked("grpo", *flags, "--out", folder / name, *more, **how)
        return said if told else folder / name

    return start


@pytest.fixture(scope="module")
def whole(grpo):
    """Three steps without a kill."""
    return grpo("whole")


def story(folder):
    """The weights of the last checkpoint, and of each step its rewards, loss and gradient norm."""
    steps = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    names = ("step", "loss", "reward", "grad_norm", "entropy", "clipped", "mismatch")
    steps = [tuple(row[name] for name in names) for row in steps if "loss" in row]
    last = max((folder / "checkpoints").glob("step-*"))
    return (last / "shard-0.safetensors").read_bytes(), steps


def rollouts(folder):
    paths = sorted((folder / "rollouts").glob("*.jsonl"))
    assert [path.name for path in paths] == [f"{i:06}.jsonl" for i in range(len(paths))]
    return [[json.loads(line) for line in open(path)] for path in paths]


def die_at(place, count):
    """Kill this process at the `count`-th call of a function."""

    def before(rank):
        module, name = place
        real, calls = getattr(module, name), [0]

        def counted(*args, **more):
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        setattr(module, name, counted)

    return before


SEVERAL = ("--updates", 2, "--kl-coef", 0.1, "--kl", "loss", "--resample", 1, "--overlong", 0.5)
# rollouts that are there after a kill at each place of the storm
MADE = {(): (0, 0, 2, 2), SEVERAL: (0, 0, 1, 1), ("--ahead", 1): (0, 1, 3, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("more", MADE, ids=["plain", "several", "ahead"])
def test_killed_anywhere_and_resumed_it_is_the_same_run(grpo, whole, more):
    """One run, killed in the rollout, in the reward, between file and update, and in a checkpoint.

    Also with two updates a rollout, so that a checkpoint stands between them, and with rollouts
    made a step ahead.
    """
    import ta.rl.rollouts as module
    import ta.training.loop as loop
    from ta.rl.rewards import RewardPool
    from ta.training import checkpoint

    undisturbed = grpo("-".join(map(str, more)), *more) if more else whole
    assert len(story(undisturbed)[1]) == 3
    name, made, resume = "killed" + "-".join(map(str, more)), [], ()
    # held-out prompts are answered and judged first
    for place, count in (
        ((module, "generate"), 2),
        ((RewardPool, "score"), 2 + ("--ahead" in more)),
        ((loop, "update"), 2),
        ((checkpoint, "digest"), 1),
    ):
        folder = grpo(name, *more, *resume, code=-signal.SIGKILL, before=die_at(place, count))
        made.append(len(rollouts(folder)))
        resume = ("--resume",)
    assert tuple(made) == MADE[more]
    grpo(name, *more, "--resume")
    assert story(folder) == story(undisturbed)
    assert rollouts(folder) == rollouts(undisturbed)


@pytest.mark.slow
def test_rollouts_made_a_step_ahead_are_of_older_weights(grpo, whole):
    """Their first two rounds are of the first weights; the mismatch is what one step has changed."""
    ahead = grpo("--ahead-1", "--ahead", 1, "--overwrite")
    first, second, third = ([row["weights"] for row in made] for made in rollouts(ahead))
    assert first[0] == second[0] != third[0]
    assert rollouts(ahead)[0] == rollouts(whole)[0] and rollouts(ahead)[1] != rollouts(whole)[1]
    mismatches = [row[-1] for row in story(ahead)[1]]
    assert mismatches[0] < 1e-5 < 1e-3 < min(mismatches[1:])
    assert max(row[-1] for row in story(whole)[1]) < 1e-5


@pytest.mark.slow
def test_rollouts_of_other_weights_are_made_anew_and_lost_ones_are_refused(grpo, whole):
    copied = shutil.copytree(whole, whole.with_name("copied"))
    path = copied / "rollouts/000002.jsonl"
    shutil.rmtree(copied / "checkpoints/step-00000003")
    path.write_text(path.read_text().replace('"weights": ', '"weights": 1'))
    said = grpo("copied", "--resume", told=True)
    assert f"{path} was made by other weights" in said
    assert story(copied) == story(whole) and rollouts(copied) == rollouts(whole)
    ahead = grpo("gone", "--ahead", 1, steps=2)
    shutil.rmtree(ahead / "checkpoints/step-00000002")
    (ahead / "rollouts/000001.jsonl").unlink()
    said = grpo("gone", "--ahead", 1, "--resume", steps=2, code=2, told=True)
    assert "000001.jsonl is gone, and the weights that made it too" in said


@pytest.mark.slow
def test_two_processes_give_the_same_rollouts_and_losses(grpo, whole):
    two = grpo("two", processes=2)
    for number, (a, b) in enumerate(zip(rollouts(whole), rollouts(two), strict=True)):
        for row, other in zip(a, b, strict=True):
            assert row["prompt_tokens"] == other["prompt_tokens"]
            assert number or row["weights"] == other["weights"], "of shards as of the whole"
            for answer, same in zip(row["answers"], other["answers"], strict=True):
                assert answer["tokens"] == same["tokens"] and answer["parts"] == same["parts"]
                # rounding is all that differs at first, and what Adam makes of it later
                near = pytest.approx(same["logprobs"], abs=1e-3 if number else 1e-5)
                assert answer["logprobs"] == near
    np.testing.assert_allclose(story(whole)[1], story(two)[1], rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(story(whole)[1][0], story(two)[1][0], rtol=1e-4, atol=1e-5)
    held_out = [json.loads(open(folder / "metrics.jsonl").readline()) for folder in (whole, two)]
    assert held_out[0] == held_out[1] and "val_reward" in held_out[0]


@pytest.mark.slow
def test_micro_batches_change_no_figure_and_a_file_is_a_list_of_candidates(grpo, whole):
    small = grpo("small", "--max-tokens-per-micro", 64, "--slots", 3)
    np.testing.assert_allclose(story(whole)[1][0], story(small)[1][0], rtol=1e-4, atol=1e-5)
    records = list(read_records([str(whole / "rollouts/000000.jsonl")], check_candidates))
    assert len(records) == 4
    for record in records:
        assert len(record.data["answers"]) == len(record.data["rewards"]) == 4
        assert record.data["messages"][-1]["role"] == "user" and record.data["reference"]
    seen = [answer["tokens"] for record in records for answer in record.data["answers"]]
    assert len({tuple(tokens) for tokens in seen}) > 4, "answers are drawn, not repeated"


@pytest.mark.slow
def test_each_step_logs_its_parts_and_its_best_and_worst_answer(whole):
    steps = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    for row in (row for row in steps if "loss" in row):
        seconds = row["rollout_seconds"] + row["reward_seconds"] + row["update_seconds"]
        assert 0 < row["update_seconds"] < seconds < row["seconds"]
        made = row["length"] * 16 / row["rollout_seconds"]
        assert row["rollout_tokens_per_second"] == pytest.approx(made)
        trained = row["tokens"] / row["update_seconds"]
        assert row["update_tokens_per_second"] == pytest.approx(trained, rel=1e-2)
    shown = [json.loads(line) for line in open(whole / "samples.jsonl")]
    held_out = [row for row in shown if "row" in row]
    mean = sum(row["reward"] for row in held_out[:2]) / 2
    assert len(held_out) == 4 and mean == steps[0]["val_reward"], "answered once"
    for number, made in enumerate(rollouts(whole)):
        best, worst = [row for row in shown if row["step"] == number + 1 and "row" not in row]
        rewards = [x for row in made for x in row["rewards"].values()]
        assert (best["reward"], worst["reward"]) == (max(rewards), min(rewards))
        assert (best["id"], worst["id"]) == ("best rollout", "worst rollout")


@pytest.mark.slow
def test_weights_changed_behind_the_samplers_back_are_seen_and_stop_the_run(grpo):
    """The sampler answers with other weights than train: in the third step the run ends with likely causes."""

    def before(rank):
        import ta.rl.rollouts as module

        real = module.generate

        def other(model, *args, **more):
            kept = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
                answers = real(model, *args, **more)
                for p, old in zip(model.parameters(), kept, strict=True):
                    p.copy_(old)
            return answers

        module.generate = other

    said = grpo("changed", steps=6, code=2, before=before, told=True)
    assert "between sampler and trainer, in three steps more than --max-mismatch 0.1" in said


def test_a_mismatch_must_be_large_three_times_in_a_row():
    watch = MismatchWatch(0.1)
    large, small = torch.tensor([0.4, -0.4, 0.0]), torch.tensor([0.05, -0.05])
    for gaps in (large, large, small, large, large):
        watch.add(gaps)
        watch.check()
    watch.check()
    watch.add(torch.zeros(0))
    watch.add(large)
    with pytest.raises(ValueError, match=r"differ by 0.267 nats on average"):
        watch.check()


@pytest.mark.parametrize(
    ("tokens", "mismatch", "said"),
    [(3, 0.4, "differ by 0.267 nats"), (0, None, "all answers of three steps in a row")],
)
def test_steps_before_a_resume_count(tmp_path, tokens, mismatch, said):
    """A run that is stopped every two steps does not go on for ever."""
    logged = {"learned_tokens": tokens, **({"mismatch": mismatch} if mismatch else {})}
    steps = [{"step": 0, "val_loss": 1.0}, {"step": 1, **logged}, {"step": 2, **logged}]
    write_jsonl(tmp_path / "metrics.jsonl", [*steps, {"step": 2, "val_loss": 1.0}])
    watch = MismatchWatch(0.1, tmp_path)
    watch.check()
    watch.add(torch.tensor([0.4, -0.4, 0.0])[:tokens])
    with pytest.raises(ValueError, match=said):
        watch.check()
    write_jsonl(
        tmp_path / "metrics.jsonl",
        [*steps, {"step": 3, **logged, "learned_tokens": 9, "mismatch": 0}],
    )
    watch = MismatchWatch(0.1, tmp_path)
    watch.check()
    watch.add(torch.tensor([0.4, -0.4, 0.0])[:tokens])
    watch.check()


@pytest.mark.slow
def test_prompts_are_drawn_again_until_enough_groups_differ(grpo, whole, tmp_path):
    """A reward that is flat on two of three prompts: with --resample the file holds groups that differ, and says how many were drawn.

    Of long answers the penalty is a part of the reward.
    """
    (tmp_path / "mine.py").write_text(
        "def spread(messages, answer, record):\n"
        "    return sum(map(ord, answer)) % 97 if record['id'].startswith('add') else 0.5\n"
    )
    flags = ("--resample", 8, "--overlong", 0.5, "--rewards", f"{tmp_path}/mine.py:spread")
    drawn = grpo("drawn", *flags, steps=1)
    (second,) = rollouts(drawn)
    assert len(second) == 4 and second[0]["drawn"] > 4 == rollouts(whole)[0][0]["drawn"]
    assert {row["id"].partition("-")[0] for row in second} == {"add"}
    steps = [json.loads(line) for line in open(drawn / "metrics.jsonl")]
    assert steps[1]["flat_groups"] == pytest.approx(1 - 4 / second[0]["drawn"])
    assert len({tuple(row["prompt_tokens"]) for row in second}) == 4
    for row in second:
        for answer in row["answers"]:
            # of 6 tokens the last 3 count
            penalty = -max(0, len(answer["tokens"]) - 3) / 3
            assert answer["parts"]["overlong"] == pytest.approx(penalty)
            assert row["rewards"][answer["id"]] == pytest.approx(sum(answer["parts"].values()))


def test_truncated_answers_may_be_left_out():
    """They then have no part in the loss and in its divisor; in their group they have."""
    made, policy = rows(), PolicyConfig(divide="answers", drop_truncated=True)
    made[0]["answers"][1]["finish"] = made[2]["answers"][0]["finish"] = "length"
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0.5, 0, 0.5], [2.0, 0.0, -1.0]])
    (batch,) = rollout_batches(made, advantages, policy, 9, 100, True, {})
    left = [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    sizes = [len(made[i]["answers"][k]["tokens"]) for i, k in left]
    assert torch.bincount(batch.sequences.owners).tolist() == sizes
    first = [values[0].item() for values in batch.advantage.split(sizes)]
    assert first == [advantages[i, k].item() for i, k in left]
    shares = batch.sequences.weights / len(batch.sequences.weights)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


def test_a_step_whose_answers_are_all_cut_has_figures_and_the_third_in_a_row_ends_the_run():
    page, made, watch = recipe("grpo"), rows(), MismatchWatch(9)
    policy = PolicyConfig(drop_truncated=True, kl_coef=0.1, kl="loss").filled()
    for row in made:
        for answer in row["answers"]:
            answer["finish"] = "length"
    advantages = torch.tensor([[1.0, -2.0, 0.5]] * 3)
    for packed in (True, False):
        limits = 9, 100, packed
        (batch,) = rollout_batches(made, advantages, policy, *limits, {"truncated": [(1.0, 1.0)]})
        loss, count, figures = page.step(policy, watch, tiny(), batch)
        assert loss.item() == count == 0 and figures["truncated"] == [(1.0, 1.0)]
        watch.check()
    page.step(policy, watch, tiny(), batch)
    with pytest.raises(ValueError, match="all answers of three steps in a row reached --max-new-"):
        watch.check()


@pytest.mark.slow
def test_a_run_whose_answers_are_all_cut_skips_updates_and_then_says_what_to_give(grpo):
    cut = ("--drop-truncated", "--max-new-tokens", 1)
    said = grpo("all-cut", *cut, steps=2, told=True)
    assert "step 2 has no token to learn: no update" in said
    said = grpo("cut", *cut, steps=6, code=2, told=True)
    assert said.count("has no token to learn: no update") == 3
    assert "error: all answers of three steps in a row" in said and "give more --max-new-" in said


def test_beams_over_vllm_are_refused_at_a_temperature():
    """It searches those of the plain model, and the policy is the model at its temperature."""
    model, tokenizer = tiny(), SimpleNamespace(fast=None, stop_ids=[])
    model.temperature, engine = 0.5, SimpleNamespace(put_weights=list)
    some = Rollouts(Path(), model, [], None, tokenizer, RolloutConfig(), engine=engine)
    with pytest.raises(ValueError, match=r"--temperature 0.5: vLLM searches beams"):
        some.respond(model, [], GenerateConfig(beams=2))


def test_prompts_have_a_name_and_a_reference(tmp_path):
    chats = [record | {"id": f"r{n}"} for n, record in enumerate(practice("train", 2))]
    del chats[1]["id"]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    config = ta.ModelConfig(str(tiny_folder()))
    tokenizer = ta.load_chat_tokenizer(config, ta.TokenizerConfig(), ta.ChatConfig())
    files, asked = (str(tmp_path / "chats.jsonl"),), (tokenizer, ta.ChatConfig(), ta.DataConfig())
    prompts, data = ta.rl.prepare_prompts(files, *asked)
    assert [record["id"] for record, _ in prompts] == ["r0", 1]
    for (record, ids), chat in zip(prompts, chats, strict=True):
        assert record["reference"] == chat["messages"][-1]["content"] and "tools" not in record
        assert record["messages"] == chat["messages"][:-1] and tokenizer.fast.decode(ids)
    assert data.offsets.tolist() == [0, len(prompts[0][1]), sum(len(ids) for _, ids in prompts)]


PRESETS = ("grpo", "dapo", "dr-grpo", "rloo", "gspo", "cispo")


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_is_its_formula(preset, updates):
    """The loss of the recipe's step against the formula token by token in float64, with a KL in the loss and weights of a mismatch."""
    page, model, made = recipe("grpo"), tiny(dtype=torch.float64), rows()
    policy = PolicyConfig(preset, kl_coef=0.3, kl="loss", mismatch_bound=1.1).filled()
    rng = np.random.default_rng(1)
    for row in made:
        for answer in row["answers"]:
            ids = np.array(row["prompt_tokens"] + answer["tokens"])
            learned = (np.arange(len(ids)) >= len(row["prompt_tokens"])).astype(np.float32)
            logps = model.logprobs(lay_out([ids], [learned])).detach().numpy()
            noises = {"logprobs": 0.2, "reference_logprobs": 1}
            if updates == 2:
                noises["trainer_logprobs"] = 0.3
            for name, noise in noises.items():
                answer[name] = (logps + noise * rng.normal(size=len(logps))).tolist()
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0], [2.0, 0.0, -1.0]], dtype=torch.float64)
    (batch,) = rollout_batches(made, advantages, policy, 10, 100, True, {"reward": [(2.0, 1.0)]})
    loss, count, figures = page.step(policy, MismatchWatch(9), model, batch)
    tokens = sum(len(answer["tokens"]) for row in made for answer in row["answers"])
    assert count == tokens and figures["kl"] > 0 and figures["reward"] == [(2.0, 1.0)]
    total = 0.0
    for i, row in enumerate(made):
        for k, answer in enumerate(row["answers"]):
            n, advantage = len(answer["tokens"]), advantages[i, k].item()
            now = model.logprobs(lay_out_answers(sampled([row])[k : k + 1], True)).tolist()
            old = answer["trainer_logprobs"] if updates == 2 else now
            gaps = [a - b for a, b in zip(now, old, strict=True)]
            if policy.level == "sequence":
                gaps = [sum(gaps) / n] * n
            divisor = {"tokens": tokens, "answers": 9 * n, "constant": 9 * 10}[policy.divide]
            for t in range(n):
                ratio = math.exp(gaps[t])
                bounded = min(max(ratio, 1 - policy.clip_low), 1 + policy.clip_high)
                value = -min(ratio * advantage, bounded * advantage)
                if policy.clip_ratio == "weight":
                    value = -bounded * advantage * now[t]
                value *= min(1.1, math.exp(old[t] - answer["logprobs"][t]))
                value += 0.3 * ratio * (now[t] - answer["reference_logprobs"][t]) ** 2 / 2
                total += value / divisor
    assert loss.item() / count == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--updates", 9), "--updates 9 share the --batch-size 8 prompts"),
        (("--ref-path", "x"), "--reference and its flags have no effect without --kl-coef"),
        (("--kl-coef", 0.1, "--reference", "cached"), "answers are not known before training"),
        (("--num-answers", 1), "--num-answers 1: answers are compared"),
        (("--temperature", 0), "--temperature 0.0: give a number from 1e-06 to 2147483647"),
        (("--rewards", "exakt"), "there is no reward exakt"),
        (("--max-new-tokens", 5000), "has 47): give fewer new or virtual tokens"),
    ],
)
def test_what_cannot_be_is_refused(door, tmp_path, flags, message):
    write_jsonl(tmp_path / "chats.jsonl", practice("train", 8))
    more = ("--model-path", tiny_folder(), "--data", tmp_path / "chats.jsonl", "--batch-size", 8)
    more += ("--out", tmp_path / "run")
    code, said = door("grpo", *more, *flags)
    assert code == 2 and message in said and not (tmp_path / "run").exists()
