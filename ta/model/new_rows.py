"""Embedding rows of new tokens: each starts at the mean of the rows of the text that explains it.

Letters: V rows of a table, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ta.chat.tokenizer import NewToken


def set_rows(model: PreTrainedModel, new: Sequence[NewToken]) -> None:
    """Set the rows of new tokens in the input and output tables and in the output bias.

    These are the tokens that were added, and those for which the tables have no row. A table with
    spare rows is used as it is; a smaller one is enlarged and never shrunk. All other rows keep
    their bits.
    """
    rows = min(map(len, tables(model).values()))
    unset = [token for token in new if token.added or token.id >= rows]
    resize(model, max((token.id + 1 for token in unset), default=0))
    with torch.no_grad():
        for table in tables(model).values():  # (V, D), and (V,) for an output bias
            # every mean is taken before any row is written
            means = [table[list(token.pieces)].float().mean(dim=0) for token in unset]
            for token, mean in zip(unset, means, strict=True):
                table[token.id] = mean.to(table.dtype)


def resize(model: PreTrainedModel, rows: int) -> None:
    """Enlarge the token tables of `model` to `rows` rows, in place, where they have fewer.

    Existing rows keep their bits, and the global random state does not change.
    """
    weight = token_table(model)
    if rows <= len(weight):
        return
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        model.resize_token_embeddings(rows, mean_resizing=False)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """ValueError when the tokenizer can give an id that has no row in the embedding table."""
    rows = min(map(len, tables(model).values()))
    last, token = max((i, token) for token, i in tokenizer.get_vocab().items())
    if last >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {last} ({token!r}), but the embedding table of the "
            f"model has {rows} rows: it would need {last + 1}; "
            "give the tokenizer that belongs to the model, or declare the further tokens with "
            "--init-tokens 'token=text'"
        )


def token_table(model: PreTrainedModel) -> torch.Tensor:
    """The input embeddings of all tokens (V, D)."""
    return model.get_input_embeddings().weight


def table_rows(model: PreTrainedModel) -> int:
    """V of the input embeddings; where some rows train beside the others, without a whole copy."""
    layer = model.get_input_embeddings()
    return len(getattr(layer, "original_module", layer).weight)


def tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors with one row a token: "input" (V, D), "output" (V, D), "output_bias" (V,).

    "output" is absent where it is the same tensor as the input, "output_bias" where there is none.
    """
    tensors = {"input": token_table(model)}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not tensors["input"]:
        tensors["output"] = output.weight
    if getattr(output, "bias", None) is not None:
        tensors["output_bias"] = output.bias
    return tensors
