"""How fast are records prepared? Chats with masks a CPU-second: ours, the tokenizer alone, transformers' template with its assistant mask.

    python bench/tokenize.py --records 2000

Chats of about 1 kB in the built-in tokenizer's ChatML. `batch` is the tokenizer's own encode_batch over rendered texts: the floor.
"""

import argparse
import random
import time

from harness import compare, parser

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] ~ '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)


def chats(flags: argparse.Namespace) -> list:
    from ta import tasks

    generator = random.Random(0)
    words = [*tasks.THINGS, *tasks.COLOURS, *tasks.WORDS, *tasks.NAMES, "please", "explain", "carefully", "because", "therefore"]
    say = lambda n: " ".join(generator.choice(words) for _ in range(n))  # noqa: E731
    turn = lambda: [{"role": "user", "content": say(30)}, {"role": "assistant", "content": say(40)}]  # noqa: E731
    return [[m for _ in range(3) for m in turn()] for _ in range(flags.records)]


def rate(work, flags) -> dict[str, float]:
    start, wall = time.process_time(), time.perf_counter()
    work()
    return {"records_a_cpu_s": flags.records / (time.process_time() - start), "records_a_s": flags.records / (time.perf_counter() - wall)}


def ours(flags):
    from ta import builtin
    from ta.chat import encode_chats
    from ta.templates import ChatConfig
    from ta.tokenizer import template_of, vocabulary

    tokenizer, records = builtin.tiny_tokenizer(), chats(flags)
    template, vocab = template_of(tokenizer, ChatConfig()), vocabulary(tokenizer)
    encode_chats(records[:10], template, vocab, ChatConfig())
    return rate(lambda: encode_chats(records, template, vocab, ChatConfig()), flags)


def batch(flags):
    from ta import builtin

    tokenizer, records = builtin.tiny_tokenizer(), chats(flags)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in records]
    return rate(lambda: [e.ids for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)], flags)


def masks(flags):
    from ta import builtin

    tokenizer, records = builtin.tiny_tokenizer(), chats(flags)
    mask = lambda chat: tokenizer.apply_chat_template(  # noqa: E731
        chat, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    mask(records[0])
    return rate(lambda: [mask(chat) for chat in records], flags)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--records", type=int, default=2000)
    compare({"batch": batch, "ours": ours, "transformers' masks": masks}, flags.parse_args(), "batch")
