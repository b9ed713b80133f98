"""What plain transformers and peft read in an export: run by any Python that has them, it prints JSON.

python tests/export_reader.py '{"folder": ..., "kind": "causal", "base": null, "texts": [...], "ids": [[...]]}'
"""

import json
import sys

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq_cls": "AutoModelForSequenceClassification",
}


def read(folder, kind, base, texts, ids):
    """Versions, token ids of texts, end tokens, stop strings, dtype, and logits (or scores) of the last token of each of `ids`."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, CLASSES[kind]).from_pretrained(base or folder, dtype="auto")
    dtype = str(model.dtype)
    ends, strings = None, None
    if kind == "causal":
        generation = transformers.GenerationConfig.from_pretrained(folder)
        ends, strings = generation.eos_token_id, generation.stop_strings
    if base:
        from peft import PeftModel

        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = PeftModel.from_pretrained(model, folder)
    model = model.float().eval()
    rows = []
    with torch.no_grad():
        for row in ids:
            given = torch.tensor([row])
            # a mask: virtual tokens of prompt learning are laid before it
            logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits
            rows.append((logits[0, -1] if kind == "causal" else logits[0]).tolist())
    return {
        "version": transformers.__version__,
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in texts],
        "chat": tokenizer.chat_template,
        "ends": ends,
        "strings": strings,
        "dtype": dtype,
        "logits": rows,
    }


if __name__ == "__main__":
    print(json.dumps(read(**json.loads(sys.argv[1]))))
