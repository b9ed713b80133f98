"""One preallocated key-value buffer in which every row ends at the same column, behind
transformers' cache interface.

Letters: B rows, T columns, H heads, D head width.
"""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ta.model.attention import native_attention


class CacheWindow:
    """Which rows and columns of the buffer the forward pass under way reads and writes.

    All layers share it.

    A step reads the last `past` columns and writes the next one. One of fixed shapes reads the
    first `past` + 1 columns whatever they hold, and writes the column whose number stands in the
    tensor `column` (1,); elsewhere `column` is None.
    """

    def __init__(self, slots: int, capacity: int, end: int):
        self.slots, self.capacity, self.end = slots, capacity, end
        self.rows, self.past = slice(0, 0), 0
        self.column: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, (slots, H, capacity, D) each.

    Every layer keeps all columns, sliding windows are left to the mask.
    """

    is_sliding = False

    def __init__(self, window: CacheWindow):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.buffers = [self._buffer(x) for x in (key_states, value_states)]
        self.is_initialized = True

    def _buffer(self, like: Tensor) -> Tensor:
        # zeros, because a masked column still takes part in a product with probability 0
        slots, capacity = self.window.slots, self.window.capacity
        return like.new_zeros(slots, like.shape[1], capacity, like.shape[3])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Put the new columns in their slots and give all keys and values that may be looked at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.buffers
        return self._updated(keys, key_states), self._updated(values, value_states)

    def _updated(self, buffer: Tensor, states: Tensor) -> Tensor:
        w = self.window
        if w.column is not None:
            rows = buffer[w.rows]
            rows.index_copy_(2, w.column, states)
            return rows[:, :, : w.past + 1]
        if not w.past:
            buffer[w.rows, :, w.end - states.shape[2] : w.end] = states
            return states
        buffer[w.rows, :, w.end : w.end + 1] = states
        return buffer[w.rows, :, w.end - w.past : w.end + 1]

    @property
    def is_compileable(self) -> bool:
        """Whether transformers must make a mask without a look at its values."""
        return self.window.column is not None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.past + query_length, 0

    def get_seq_length(self) -> int | Tensor:
        return self.window.past if self.window.column is None else self.window.column[0]

    def get_max_length(self) -> int:
        return -1

    def copy(self, source, target, width: int) -> None:
        """Rows `source` (a number or an index tensor) also become rows `target`, in the last
        `width` columns.
        """
        columns = slice(self.window.end - width, self.window.end)
        for x in self.buffers:
            x[target, :, columns] = x[source, :, columns]

    def rebase(self, width: int, live: int, old_end: int) -> None:
        """Move the last `width` columns of the live rows to the window's new end, in a new buffer
        where its capacity is new.
        """
        new, old = slice(self.window.end - width, self.window.end), slice(old_end - width, old_end)
        for i, before in enumerate(self.buffers):
            moved = before[:live, :, old]
            if before.shape[2] == self.window.capacity:
                before[:live, :, new] = moved.clone()  # the two may overlap
            else:
                self.buffers[i] = self._buffer(before)
                self.buffers[i][:live, :, new] = moved


def plain_cache(model) -> bool:
    """Whether the model's past is keys and values of every layer and nothing else, so that the slot
    engine can hold it.
    """
    config = model.config.get_text_config(decoder=True)
    taken = inspect.signature(model.forward).parameters
    foreign = (
        getattr(model, "_is_stateful", False)
        or model.config.is_encoder_decoder
        or not model._supports_default_dynamic_cache()
        or "chunked_attention" in (getattr(config, "layer_types", None) or ())
        or getattr(config, "num_kv_shared_layers", 0)
        or "past_key_values" not in taken
        # such a model (CpmAnt) also puts embeddings of its own in front
        or "inputs_embeds" not in taken
    )
    if foreign:
        return False
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, TypeError, AttributeError):
        return False  # a cache that only the model's own file knows
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def grouped_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling=None,
    **kwargs,
):
    """transformers' sdpa attention, which copies keys and values once for every query head of a
    group; here a single query's group shares them.
    """
    groups = query.shape[1] // key.shape[1]
    if (
        query.shape[2] > 1
        or groups == 1
        or kwargs.get("position_bias") is not None
        or (attention_mask is not None and attention_mask.shape[1] > 1)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    # (B, key heads, groups, D): the group takes the place of the columns
    rows = query.unflatten(1, (key.shape[1], groups)).squeeze(3)
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return out.flatten(1, 2)[:, None], None  # (B, 1, H, D)


def attention_for(model, slots: bool) -> str:
    """Name of an attention function that knows masks and caches and computes what a model does."""
    name = native_attention(model)
    if not slots or name != "sdpa":
        return name
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    return GROUPED


GROUPED = "ta-grouped"
