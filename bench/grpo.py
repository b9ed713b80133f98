"""What does a step of GRPO cost: answers, rewards and update, against TRL's GRPOTrainer?

    python bench/grpo.py --peer-python PYTHON_WITH_TRL
    python bench/grpo.py --only "ours, alone" --rounds 2

A Llama of 15 million weights, chats of about 235 tokens with 8 answers of at most 16 tokens each,
the loss and the bounds of DAPO, steps with AdamW, float32, temperature 1. The reward counts a
letter, so that groups differ though nothing is learned. CPU seconds a step, without the first;
`answer` and `update` are its two parts. `alone` lays the prompt down once for each answer.
"""

import tempfile
import time
from pathlib import Path

try:
    from harness import compare, parser, read
except ImportError:
    from bench.harness import compare, parser, read

REWARD = "def letters(messages, answer, record):\n    return float(answer.count('a'))\n"


def write_model(folder: Path, flags) -> None:
    """A seeded Llama with its tokenizer, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ta.builtin.models import tiny_tokenizer

    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=flags.width, intermediate_size=8 * flags.width // 3,
        num_hidden_layers=flags.layers, num_attention_heads=8, num_key_value_heads=8,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def chats(flags) -> list[list[dict]]:
    """Prompts of about --prompt tokens: words of the built-in tasks."""
    import random

    from ta.builtin.tasks import PLACES, WORDS

    draw = random.Random(0)
    texts = [
        " ".join(draw.choices(WORDS + PLACES, k=int(flags.prompt * draw.uniform(0.75, 1.25))))
        for _ in range(flags.prompts * flags.steps)
    ]
    return [[{"role": "user", "content": text}] for text in texts]


def train_ours(flags, shared: bool = True) -> dict[str, float]:
    import json

    # at the head of the file it would take bench/tokenize.py for Python's own
    from unittest.mock import patch

    import ta
    from recipes import grpo
    from ta.files import read_json_lines
    from ta.rl import batches as layout
    from ta.training import loop

    together = layout.sampled

    def apart(rows):
        return [answer._replace(prompt=list(answer.prompt)) for answer in together(rows)]

    starts, ends, updated = [], [], []

    def timed(function, before: list, after: list):
        def run(*arguments):
            before.append(time.process_time())
            made = function(*arguments)
            after.append(time.process_time())
            return made

        return run

    with (
        patch.object(ta.rl.Rollouts, "at", timed(ta.rl.Rollouts.at, starts, ends)),
        patch.object(loop, "update", timed(loop.update, [], updated)),
        patch.object(layout, "sampled", together if shared else apart),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        write_model(folder / "model", flags)
        (folder / "reward.py").write_text(REWARD)
        records = [json.dumps({"messages": chat}) + "\n" for chat in chats(flags)]
        (folder / "prompts.jsonl").write_text("".join(records))
        sizes = {"batch_size": flags.prompts, "max_tokens_per_micro": flags.micro}
        config = grpo.Config(
            model=ta.ModelConfig(model_path=str(folder / "model")),
            data=ta.DataConfig(data=(str(folder / "prompts.jsonl"),)),
            batches=ta.BatchConfig(steps=flags.steps, **sizes),
            optim=ta.OptimConfig(lr=3e-4, schedule="constant", warmup=0),
            loop=ta.LoopConfig(out=str(folder / "run"), log_every=1),
            rollouts=ta.rl.RolloutConfig(max_new_tokens=16),
            reward=ta.rl.RewardConfig((f"{folder}/reward.py:letters",), reward_processes=1),
            policy=ta.rl.PolicyConfig("dapo", resample=0, overlong=0.0),
        )
        grpo.main(config)
        rewards = read_json_lines(folder / "run/metrics.jsonl")
    n = flags.steps - 1
    answer = sum(b - a for a, b in zip(starts[1:], ends[1:], strict=True)) / n
    update = sum(b - a for a, b in zip(ends[1:], updated[1:], strict=True)) / n
    figures = {"cpu_s_a_step": answer + update, "answer": answer, "update": update}
    return figures | {"reward": rewards[0]["reward"]}


def train_trl(flags) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks, spent, rewards = [], [0.0], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", flags)

        def letters(prompts, completions, **more):
            return [float(answer[0]["content"].count("a")) for answer in completions]

        config = GRPOConfig(
            output_dir=str(folder / "run"), max_steps=flags.steps, num_generations=8,
            per_device_train_batch_size=flags.trl_micro,
            gradient_accumulation_steps=flags.prompts * 8 // flags.trl_micro,
            max_completion_length=16, learning_rate=3e-4, lr_scheduler_type="constant",
            adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, beta=0.0, loss_type="dapo",
            epsilon=0.2, epsilon_high=0.28, scale_rewards="group", temperature=1.0, use_cpu=True,
            bf16=False, gradient_checkpointing=False, logging_steps=1, report_to=[],
            save_strategy="no", seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32"),
            reward_funcs=letters,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats(flags)]),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
        inner = trainer._generate_single_turn

        def timed(*arguments, **more):
            start = time.process_time()
            made = inner(*arguments, **more)
            spent[0] += time.process_time() - start
            return made

        trainer._generate_single_turn = timed

        class Marks(TrainerCallback):
            def on_step_begin(self, arguments, state, control, **more):
                marks.append((time.process_time(), spent[0]))

            def on_log(self, arguments, state, control, logs=None, **more):
                rewards.extend([logs["reward"]] if "reward" in logs else [])

            def on_train_end(self, arguments, state, control, **more):
                marks.append((time.process_time(), spent[0]))

        trainer.add_callback(Marks())
        trainer.train()
    n = flags.steps - 1
    whole, answer = ((marks[-1][i] - marks[1][i]) / n for i in (0, 1))
    figures = {"cpu_s_a_step": whole, "answer": answer, "update": whole - answer}
    return figures | {"reward": rewards[0]}


CONTENDERS = {
    "ours": train_ours,
    "ours, alone": lambda flags: train_ours(flags, shared=False),
    "TRL": train_trl,
}

if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--prompt", type=int, default=228, help="words, about tokens, of a prompt")
    flags.add_argument("--prompts", type=int, default=8, help="prompts a step, of 8 answers each")
    flags.add_argument("--steps", type=int, default=4)
    flags.add_argument("--width", type=int, default=384)
    flags.add_argument("--layers", type=int, default=8)
    flags.add_argument("--micro", type=int, default=8192, help="tokens of our micro-batches")
    flags.add_argument("--trl-micro", type=int, default=32, help="answers of TRL's micro-batches")
    given = read(flags, prompt=12, prompts=2, steps=2, width=32, layers=2, trl_micro=16)
    compare(CONTENDERS, given, "ours", ["TRL"])
