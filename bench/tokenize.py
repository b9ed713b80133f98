"""How fast are records prepared, and how fast opened again?

    python bench/tokenize.py --peer-python PYTHON_WITH_TRL
    python bench/tokenize.py --agents --peer-python ...     # reasoning, tools, calls, results
    python bench/tokenize.py --again 1000000     # opening so many records again, to a first batch

Chats with masks a CPU-second, of about 1 kB in the built-in tokenizer's ChatML. `ours` is what a
recipe does: read JSONL, check, encode, write the memory-mapped set; TRL's side reads the same file
and prepares it with assistant_only_loss. `batch` is the tokenizer's own encode_batch over rendered
texts, `contents` its encode_batch_fast over the messages' contents alone: the floor. With --again
(short chats) the first start is made in one process and the second is timed in others: the file is
known by its stamp, the set by its hash.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

try:
    from harness import compare, parser, read
except ImportError:
    from bench.harness import compare, parser, read

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] ~ '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)

AGENT = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% for tool in tools %}{{ tool | tojson ~ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['reasoning_content'] %}"
    "{{ '<think>\n' ~ message['reasoning_content'] ~ '\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ '\n<tool_call>\n' ~ call['function'] | tojson ~ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def records_of(flags: argparse.Namespace) -> list[dict]:
    """Chats, or with --agents chats with tools, where an answer is reasoned, called and told."""
    if not flags.agents:
        return [{"messages": chat} for chat in chats(flags)]
    properties = {"thing": {"type": "string"}, "place": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["thing"]}
    about = {"name": "look_up", "description": "Finds a thing in a place.", "parameters": schema}
    tools = [{"type": "function", "function": about}]
    return [{"messages": agent(chat), "tools": tools} for chat in chats(flags, 4, (12, 12))]


def agent(chat: list[dict]) -> list[dict]:
    """The chat's texts as a question, two calls with reasoning and results, and an answer."""
    (asked, first, told, second, more, reason, _, last) = (message["content"] for message in chat)

    def called(thought: str, number: int) -> dict:
        thing, place, *_ = thought.split()
        call = {"name": "look_up", "arguments": {"thing": thing, "place": place}}
        calls = [{"type": "function", "id": f"call{number}", "function": call}]
        return {
            "role": "assistant",
            "content": None,
            "reasoning_content": thought,
            "tool_calls": calls,
        }

    return [
        {"role": "user", "content": asked},
        called(first, 1),
        {"role": "tool", "content": told},
        called(second, 2),
        {"role": "tool", "content": more},
        {"role": "assistant", "content": last, "reasoning_content": reason},
    ]


def writer(flags: argparse.Namespace):
    """The built-in tokenizer with the template of the records."""
    from ta.builtin import models

    tokenizer = models.tiny_tokenizer()
    if flags.agents:
        tokenizer.chat_template = AGENT
    return tokenizer


def chats(flags: argparse.Namespace, turns: int = 3, spoken: tuple[int, int] = (30, 40)) -> list:
    """Chats of so many turns of so many words asked and answered."""
    from ta.builtin import tasks

    generator = random.Random(0)
    words = [
        *tasks.THINGS,
        *tasks.COLOURS,
        *tasks.WORDS,
        *tasks.NAMES,
        "please",
        "explain",
        "carefully",
        "because",
        "therefore",
    ]
    say = lambda n: " ".join(generator.choice(words) for _ in range(n))
    turn = lambda: [
        {"role": role, "content": say(n)}
        for role, n in zip(("user", "assistant"), spoken, strict=True)
    ]
    return [[message for _ in range(turns) for message in turn()] for _ in range(flags.records)]


def rate(work, flags) -> dict[str, float]:
    start, wall = time.process_time(), time.perf_counter()
    work()
    return {
        "records_a_cpu_s": flags.records / (time.process_time() - start),
        "records_a_s": flags.records / (time.perf_counter() - wall),
    }


def opened(flags):
    """A function that prepares the file of chats, or opens what was prepared."""
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import chat_tokenizer
    from ta.data.prepare import DataConfig, prepare_chats

    tokenizer = chat_tokenizer(writer(flags), ChatConfig())
    config = DataConfig(cache_dir=f"{flags.folder}/cache")
    return lambda: prepare_chats(
        [f"{flags.folder}/chats.jsonl"],
        tokenizer,
        ChatConfig(),
        config,
    )


def ours(flags) -> dict[str, float]:
    import shutil

    prepare = opened(flags)
    shutil.rmtree(f"{flags.folder}/cache", ignore_errors=True)
    return rate(prepare, flags)


def again(flags) -> dict[str, float]:
    from ta.data.loader import train_batches
    from ta.data.micro import BatchConfig

    prepare = opened(flags)
    start, wall = time.process_time(), time.perf_counter()
    prepared = prepare()
    opening, middle = time.perf_counter() - wall, time.process_time()
    assert prepared.info["cached"]
    train_batches(prepared, BatchConfig(batch_size=64)).at(0)
    figures = {"open_ms": 1000 * opening, "open_cpu_ms": 1000 * (middle - start)}
    return figures | {
        "first_batch_ms": 1000 * (time.perf_counter() - wall),
        "first_batch_cpu_ms": 1000 * (time.process_time() - start),
    }


def encode_only(flags):
    from ta.builtin import models
    from ta.chat.encode import encode_chats
    from ta.chat.template import ChatConfig
    from ta.chat.tokenizer import chat_tokenizer

    tokenizer, records = chat_tokenizer(models.tiny_tokenizer(), ChatConfig()), chats(flags)
    encode_chats(records[:10], tokenizer, ChatConfig())
    return rate(lambda: encode_chats(records, tokenizer, ChatConfig()), flags)


def batch(flags):

    tokenizer = writer(flags)
    texts = [
        tokenizer.apply_chat_template(r["messages"], tools=r.get("tools"), tokenize=False)
        for r in records_of(flags)
    ]
    return rate(
        lambda: [
            e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        ],
        flags,
    )


def contents(flags):
    from ta.builtin import models

    backend = models.tiny_tokenizer().backend_tokenizer
    texts = [message["content"] for chat in chats(flags) for message in chat]
    return rate(
        lambda: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)], flags
    )


def masks(flags):
    from ta.builtin import models

    tokenizer, records = models.tiny_tokenizer(), chats(flags)
    mask = lambda chat: tokenizer.apply_chat_template(
        chat, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    mask(records[0])
    return rate(lambda: [mask(chat) for chat in records], flags)


def trl(flags) -> dict[str, float]:
    """What SFTTrainer does with the data before it trains; its model has no layer."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from ta.builtin import models

    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = AGENT if flags.agents else MARKED
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=0,
            num_attention_heads=1,
        )
    )
    with tempfile.TemporaryDirectory() as out:
        given = SFTConfig(
            out,
            max_length=None,
            assistant_only_loss=True,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )

        def work():
            rows = load_dataset(
                "json", data_files=f"{flags.folder}/chats.jsonl", split="train", cache_dir=out
            )
            SFTTrainer(model, given, train_dataset=rows, processing_class=tokenizer)

        return rate(work, flags)


def main(given: argparse.Namespace) -> None:
    contenders = {
        "ours": ours,
        "ours, encode only": encode_only,
        "batch": batch,
        "contents": contents,
        "transformers' masks": masks,
        "TRL": trl,
    }
    if given.agents:
        contenders = {name: contenders[name] for name in ("ours", "batch", "TRL")}
    contenders = {"again": again} if given.again else contenders
    if given.one:
        compare(contenders, given, "")
        return
    with tempfile.TemporaryDirectory() as given.folder:
        sys.argv += ["--folder", given.folder]
        short = [{"messages": chat} for chat in chats(given, 1, (3, 3))] if given.again else None
        lines = [json.dumps(record) + "\n" for record in short or records_of(given)]
        with open(f"{given.folder}/chats.jsonl", "w") as file:
            for start in range(0, given.again or len(lines), len(lines)):
                file.writelines(lines[: (given.again or len(lines)) - start])
        if given.again:
            os.utime(file.name, (0, 0))
            # a file written just now may change again within a tick of its clock: it is hashed anew
            time.sleep(3)
            opened(given)()
            size = Path(file.name).stat().st_size / 1e6
            print(f"prepared {given.again:,} records of {size:,.0f} MB")
        compare(contenders, given, next(iter(contenders)), ["TRL"])


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--records", type=int, default=2000)
    flags.add_argument(
        "--again", type=int, default=0, help="records of the second start; 0 compares preparing"
    )
    flags.add_argument("--agents", action="store_true", help="chats with reasoning and calls")
    flags.add_argument("--folder", help=argparse.SUPPRESS)
    main(read(flags, records=50))
