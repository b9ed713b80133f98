"""How long until recipes/chat.py says its first token, beside a bare transformers script?

    python bench/first_token.py

Seconds from the start of the process, on the built-in model.
"""

import argparse
import os
import subprocess
import sys
import time

try:
    from harness import ROOT, compare, parser, read
except ImportError:
    from bench.harness import ROOT, compare, parser, read

BARE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": sys.stdin.readline()}]
given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
ids = tokenizer.apply_chat_template(chat, **given)
print("answer", model.generate(ids, max_new_tokens=1), flush=True)
sys.stdin.read()
"""


def to_first_byte(*command: str) -> dict[str, float]:
    """Wall and CPU seconds of a process until it has read a line and answered a byte."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(1), "no answer came"
        wall = time.perf_counter() - start
        with open(f"/proc/{process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        process.kill()
    return {
        "seconds": wall,
        "cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    }


def bare(flags: argparse.Namespace) -> dict[str, float]:
    from ta.builtin.model_folders import tiny_folder

    return to_first_byte("-c", BARE, str(tiny_folder()))


def ours(flags: argparse.Namespace) -> dict[str, float]:
    return to_first_byte(str(ROOT / "recipes" / "chat.py"), "--max-new-tokens", "4")


if __name__ == "__main__":
    compare({"bare transformers": bare, "ours": ours}, read(parser(__doc__)), "bare transformers")
