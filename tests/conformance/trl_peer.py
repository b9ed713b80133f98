"""What TRL's own data step makes of the cells, as JSON for `table.py --peer`; runs where TRL is.

    TA_REAL_TOKENIZERS=DIR PEER_PYTHON tests/conformance/trl_peer.py OUT.json [NAME ...]

SFTTrainer with assistant_only_loss, prompt and completion where the last answer alone is learned,
DPOTrainer for pairs. What TRL has no way to ask for (prompts alone, documents, a message that is not
learned) is left out.
"""

import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from datasets import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
from cells import CELLS, Cell, answer, user
from judge import record_of
from templates import TEMPLATES, real_tokenizer, why_absent

ABSENT = ("loss false", "documents")


def prepared(trainer, fast, record: dict, **more) -> dict:
    """One record through the trainer's own preparation."""
    data = IterableDataset.from_generator(lambda: iter([record]))
    args = (data, fast, trainer.args)
    return next(iter(trainer._prepare_dataset(*args, **more, dataset_name="train")))


def trained(fast, cell: Cell, record: dict, make) -> list[tuple[list[int], list[float]]]:
    """(ids, weights) of the record's sequences."""
    record = dict(record)
    if cell.kind == "pair":
        record["prompt"] = record.pop("context")
        record["chosen"], record["rejected"] = [record.pop("answer_w")], [record.pop("answer_l")]
        row = prepared(make("pair"), fast, record)
        ids = row["prompt_ids"]
        sides = [row["chosen_ids"], row["rejected_ids"]]
        return [(ids + side, [0.0] * len(ids) + [1.0] * len(side)) for side in sides]
    if cell.loss_on == "last":
        messages = record.pop("messages")
        record |= {"prompt": messages[:-1], "completion": messages[-1:]}
    kind = "last" if cell.loss_on == "last" else "chat"
    row = prepared(make(kind), fast, record, packing=False, formatting_func=None)
    return [(row["input_ids"], [float(label != -100) for label in row["labels"]])]


def outcomes(name: str) -> dict[str, dict]:
    """The outcome of every cell of one template."""
    fast, plain = real_tokenizer(name), [user("Question"), answer("Reply")]
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    trainers = {}

    def make(kind: str):
        if kind in trainers:
            return trainers[kind]
        shared = {"output_dir": "/tmp/trl_peer", "report_to": "none", "max_length": None}
        shared |= {"use_cpu": True, "bf16": False}
        record = {"prompt": plain[:1], "completion": plain[1:]}
        if kind == "chat":
            record = {"messages": plain}
        if kind == "pair":
            record = {"prompt": plain[:1], "chosen": plain[1:], "rejected": [answer("Silence")]}
        data = IterableDataset.from_generator(lambda: iter([record] * 4))
        model = LlamaForCausalLM(config)
        if kind == "pair":
            settings = DPOConfig(**shared, max_steps=1)
            trainer = DPOTrainer(
                model,
                LlamaForCausalLM(config),
                args=settings,
                train_dataset=data,
                processing_class=fast,
            )
        else:
            settings = SFTConfig(**shared, max_steps=1, assistant_only_loss=kind == "chat")
            trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=fast)
        trainers[kind] = trainer
        return trainer

    done = {}
    for title, cell in CELLS.items():
        if cell.kind == "prompt" or title in ABSENT:
            continue
        try:
            done[title] = {"sequences": trained(fast, cell, record_of(fast, name, cell), make)}
        except Exception as error:  # whatever stops TRL is its refusal
            done[title] = {"error": f"{type(error).__name__}: {error}"}
    return done


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    out, *names = sys.argv[1:]
    done = {}
    for name in names or TEMPLATES:
        if not why_absent(name):
            done[name] = outcomes(name)
            print(name, sum("error" in o for o in done[name].values()), file=sys.stderr)
            Path(out).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
