"""Embedding rows of new tokens: each starts at the mean of the rows of a text that says what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ta.chat.tokenizer import NewToken


def set_rows(model: PreTrainedModel, new: Sequence[NewToken]) -> None:
    """Set the rows of the added tokens, and of those the tables have no row for, in the input and output tables (and the output bias).

    A table with spare rows is used as it is; a smaller one is enlarged, never shrunk. All other rows keep their bits.
    """
    import torch

    rows = min(table.shape[0] for table in tables(model).values())
    unset = [token for token in new if token.added or token.id >= rows]
    needed = max((token.id + 1 for token in unset), default=0)
    if needed > rows:
        resize(model, needed)
    with torch.no_grad():
        for table in tables(model).values():  # (V, D), and (V,) for an output bias
            means = [
                table[list(token.pieces)].float().mean(dim=0).to(table.dtype) for token in unset
            ]
            for token, mean in zip(unset, means, strict=True):
                table[token.id] = mean


def resize(model: PreTrainedModel, rows: int) -> None:
    """Enlarge the token tables of `model` to `rows`; the rows that were there keep their bits and the global random state stays."""
    import torch

    weight = model.get_input_embeddings().weight
    assert rows >= weight.shape[0], (rows, weight.shape)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        model.resize_token_embeddings(rows, mean_resizing=False)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """ValueError when the tokenizer can give an id that the embedding table has no row for."""
    rows = min(table.shape[0] for table in tables(model).values())
    token, size = max(
        ((token, id + 1) for token, id in tokenizer.get_vocab().items()),
        key=lambda t: t[1],
    )
    if size > rows:
        raise ValueError(
            f"the tokenizer has ids up to {size - 1} ({token!r}), but the embedding table of the model has {rows} rows: it would need {size}; "
            "give the tokenizer that belongs to the model, or declare the further tokens with --init-tokens 'token=text'"
        )


def tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors with one row a token: input (V, D), output (V, D) where it is another tensor, output_bias (V,) where there is one."""
    found = {"input": model.get_input_embeddings().weight}
    output = model.get_output_embeddings()
    if output is not None and output.weight is not found["input"]:
        found["output"] = output.weight
    if getattr(output, "bias", None) is not None:
        found["output_bias"] = output.bias
    return found
