"""What plain transformers and peft, or vLLM, read in an export: run by any Python that has them, it prints JSON.

python tests/export_reader.py '{"folder": ..., "kind": "causal", "base": null, "texts": [...], "ids": [[...]]}'
python tests/export_reader.py vllm '{...}'
"""

import json
import os
import subprocess
import sys

OTHER, VLLM = os.environ.get("TA_READER_PYTHON"), os.environ.get("TA_VLLM_PYTHON")
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq_cls": "AutoModelForSequenceClassification",
    "llava": "LlavaForConditionalGeneration",
}


def asked(python, refused="", **what):
    """What a Python reads; this one (None) reads in process, and that of vLLM by its engine. {} where it refuses in the words given."""
    if python is None:
        return read(**what)
    command = [python, __file__, *["vllm"] * (python == VLLM), json.dumps(what)]
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if refused:
        assert done.returncode and refused in done.stderr, done.stderr[-3000:]
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def read(folder, kind, base, texts, ids):
    """Versions, token ids of texts, end tokens, stop strings, dtype, and logits (or scores) of the last token of each of `ids`."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, CLASSES[kind]).from_pretrained(base or folder, dtype="auto")
    dtype = str(model.dtype)
    ends, strings = None, None
    if kind != "seq_cls":
        generation = transformers.GenerationConfig.from_pretrained(folder)
        ends, strings = generation.eos_token_id, generation.stop_strings
    if base:
        from peft import PeftModel

        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = PeftModel.from_pretrained(model, folder)
    model = model.float().eval()
    rows, more = [], {}
    if kind == "llava":
        edge, drawn = model.config.vision_config.image_size, torch.Generator().manual_seed(0)
        more = {"pixel_values": torch.randn(1, 3, edge, edge, generator=drawn)}
    with torch.no_grad():
        for row in ids:
            given = torch.tensor([row])
            # a mask: virtual tokens of prompt learning are laid before it
            logits = model(input_ids=given, attention_mask=torch.ones_like(given), **more).logits
            rows.append((logits[0] if kind == "seq_cls" else logits[0, -1]).tolist())
    return {
        "version": transformers.__version__,
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "chat": tokenizer.chat_template,
        "ends": ends,
        "strings": strings,
        "dtype": dtype,
        "logits": rows,
    }


def read_vllm(folder, kind, base, texts, ids):
    """The same of vLLM's engine; in the place of logits log-probabilities, which differ from them by a constant."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm
    from vllm.lora.request import LoRARequest

    more = {"enable_lora": True, "max_lora_rank": 16} if base else {}
    more |= {"runner": "pooling"} if kind == "seq_cls" else {"max_logprobs": -1}
    engine = vllm.LLM(
        model=base or folder,
        tokenizer=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        **more,
    )
    tokenizer, asked = engine.get_tokenizer(), [{"prompt_token_ids": row} for row in ids]
    ends, strings = None, None
    if kind == "seq_cls":
        plain = vllm.PoolingParams(use_activation=False)
        done = engine.encode(asked, plain, pooling_task="classify", use_tqdm=False)
        rows = [output.outputs.data.tolist() for output in done]
    else:
        settings = engine.model_config.try_get_generation_config()
        ends, strings = settings.get("eos_token_id"), settings.get("stop_strings")
        one = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
        lora = LoRARequest("adapter", 1, folder) if base else None
        done = engine.generate(asked, one, lora_request=lora, use_tqdm=False)
        found = [output.outputs[0].logprobs[0] for output in done]
        rows = [[row[i].logprob for i in range(len(row))] for row in found]
    return {
        "version": f"vLLM {vllm.__version__}",
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "chat": tokenizer.chat_template,
        "ends": ends,
        "strings": strings,
        # the weights of the folder, which are computed in float32 here
        "dtype": "torch.float32",
        "logits": rows,
    }


if __name__ == "__main__":
    read = read_vllm if sys.argv[1] == "vllm" else read
    print(json.dumps(read(**json.loads(sys.argv[-1]))))
