"""The transformers cache under a layer plan: layers of different lengths, and a record of which token each key is of.

    cache.layers    0 ... L-1     the decoder's: T keys of a prompt in a joint or context layer, X in a text layer
                    L ... L+S-1   SideBranchKeys, the side branch's: V keys, of the image tokens
                    last          CacheRecord: the slots of all these keys

A slot is a token's index in the whole sequence. The record is a layer of the cache, so that it is reordered, repeated,
selected, copied and reset with the cache. When a prompt with an image comes, a static cache gets layers of the sizes
that the plan needs (`fit_static_layers`): a text layer has room for text tokens alone.

Axes: B batch, T tokens, X text tokens, V image tokens, L decoder layers, S side layers, N keys, H heads.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

try:
    from .configuration_dpvr import LayerPlan
    from .versions_dpvr import LINE_4, cache_name
except ImportError:
    from configuration_dpvr import LayerPlan
    from versions_dpvr import LINE_4, cache_name


class ExtraLayer(DynamicLayer):
    """A layer beyond the decoder's, which decoding does not change: it can be compiled, and is not cropped.

    An offloaded cache prefetches the layer after the one in use: past the decoder's last layer that is the first. This
    layer knows the first alone: with the list of all layers it would be in a cycle, and their keys would stay in
    memory until Python looks for such garbage.
    """

    is_compileable = True
    supports_early_init = False
    max_cache_len = 0  # transformers 4 compares this and the batch size over all layers

    def __init__(self, first: CacheLayerMixin | None = None):
        super().__init__()
        self.first = first

    def crop(self, max_length: int) -> None:
        pass

    def prefetch(self) -> None:
        super().prefetch()
        self.first.prefetch()


@dataclass
class ChunkNotes:
    """What the layers of one chunk of text share while it runs.

    Attributes:
        places: "text" and "context" -> int64 (B, K), the slots of the keys in layers of this kind.
        end: the number of tokens up to the end of the chunk; 0 with a static cache, whose masks have all its places.
        masks: (stock mask, kind of layer, the mask for the keys of this kind), so that each is made once.
        states: the hidden states before each layer, if they are wanted.
    """

    places: dict[str, torch.Tensor]
    end: int
    masks: list[tuple[Any, str, Any]] = field(default_factory=list)
    states: list[torch.Tensor] | None = None


class SideBranchKeys(ExtraLayer):
    """Keys and values of a side layer: of image tokens alone, and used only when another image comes.

    It grows, in a static cache too.
    """

    @property
    def max_batch_size(self) -> int:
        return 0 if self.keys is None else len(self.keys)


class CacheRecord(ExtraLayer):
    """The slots of the keys in a cache, per kind of layer; the last layer of the cache.

    It is written after each chunk with an image. The tokens of later chunks are text and add one key each to joint,
    text and context layers, so decoding does not update it. For a static cache the tables go on to the end of the
    layers, as text tokens will fill them.

    Args:
        plan: the layer plan that filled the cache.
        batch_size: B.
        length: T of the sequence so far.
        last_image: number of slots up to the last image token.
        plain: whether no token is padding and no row has padding slots.
        tables: "text", "context" and "image" -> int64 (B, N, or the size of a static layer), the slots in the order of
            the keys; -1 at padding slots. Joint layers hold all slots in order.
        num_keys: kind of layer -> N.
    """

    def __init__(
        self,
        plan: LayerPlan,
        batch_size: int,
        *,
        length: int = 0,
        last_image: int = 0,
        plain: bool = True,
        tables: dict[str, torch.Tensor] | None = None,
        num_keys: dict[str, int] | None = None,
    ):
        super().__init__()
        self.plan, self.max_batch_size = plan, batch_size
        self.length, self.last_image, self.plain = length, last_image, plain
        self.tables, self.num_keys = tables or {}, num_keys or {}
        self.step: ChunkNotes | None = None  # of the text chunk that runs on this cache

    @staticmethod
    def find(cache: Cache | None) -> "CacheRecord | None":
        """The record on `cache`, or None if it has seen no image."""
        record = cache.layers[-1] if cache is not None and cache.layers else None
        return record if isinstance(record, CacheRecord) and record.plan is not None else None

    def check(self, cache: Cache, past: int) -> None:
        """Raise ValueError for a cache that was cropped into its last image, or whose layers were cropped one by one.

        Args:
            past: the tokens that the cache holds now.
        """
        if past < self.last_image:
            raise ValueError(
                f"The cache was cropped to {past} tokens, into its last image, which ends at {self.last_image}: crop "
                "the text after it at most, or start with a new cache."
            )
        for index in range(len(self.plan.modes) if self.tables else 0):
            if not isinstance(cache.layers[index], CacheLayerMixin):  # a recurrent layer's, which holds no keys
                continue
            expected, got = self.num_keys[self.plan.keys_in(index)] + past - self.length, cache.get_seq_length(index)
            if got != expected:
                raise ValueError(
                    f"Layer {index} of a cache of {past} tokens holds {got} keys in place of {expected}: start with a "
                    "new cache, and crop the whole cache, not single layers."
                )

    def slots(self, kind: str, past: int) -> torch.Tensor:
        """The slots (B, N) of the keys in layers of a kind ("text", "context" or "image") after `past` tokens."""
        table, held = self.tables[kind], self.num_keys[kind]
        if kind == "image":
            return table
        held += past - self.length  # after a crop fewer than recorded: the last keys of a layer are text
        if held <= table.shape[1]:
            return table[:, :held]
        later = torch.arange(self.length, past, device=table.device).expand(len(table), -1)
        return torch.cat([table, later], dim=1)

    def put_on(self, cache: Cache) -> None:
        """Make this the record of `cache`, in place of an older one."""
        if isinstance(cache.layers[-1], CacheRecord):
            cache.layers.pop()
        if LINE_4 and any(layer.is_sliding for layer in cache.layers):
            self.is_initialized = True  # its Gemma 3 takes a cache for an empty one until all layers are
        cache.layers.append(self)
        for layer in cache.layers:
            if isinstance(layer, ExtraLayer):
                layer.first = cache.layers[0]

    # -- what a cache does to all its layers --------------------------------------------------------------------------

    def reset(self) -> None:
        self.plan, self.tables = None, {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.tables = {kind: table[indices.to(table.device)] for kind, table in self.tables.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tables = {kind: table.repeat_interleave(repeats, dim=0) for kind, table in self.tables.items()}


class StaticKeys(StaticLayer):
    """A static layer that counts its keys in a tensor, as that of transformers 5 does, for version 4 too."""

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len=max_cache_len)
        self.cumulative_length = torch.tensor(0)

    @classmethod
    def like(cls, old: StaticLayer, room: int, num_keys: int) -> "StaticKeys":
        """A layer with room for `room` keys, and in it the first `num_keys` of the layer `old`."""
        new = cls(room)
        if num_keys:
            new.update(old.keys[:, :, :num_keys], old.values[:, :, :num_keys])
        return new

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__):
        if not LINE_4:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.cumulative_length = self.cumulative_length.to(key_states.device)
        place = self.cumulative_length + torch.arange(key_states.shape[-2], device=key_states.device)
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, {"cache_position": place})

    def get_seq_length(self) -> torch.Tensor:
        return self.cumulative_length

    def reset(self) -> None:
        if self.is_initialized:
            self.keys.zero_()
            self.values.zero_()
        self.cumulative_length.zero_()


class ShorterLayer(DynamicLayer):
    """A growing layer with another number of keys than tokens; transformers 4 crops to a number of tokens."""

    surplus = 0  # keys - tokens, often negative

    def crop(self, max_length: int) -> None:
        held = self.get_seq_length() if max_length < 0 else self.surplus if max_length > 0 else 0
        super().crop(max(0, max_length + held))


def continue_cache(cache: Cache | None, plan: LayerPlan) -> CacheRecord | None:
    """Make `cache` ready for a chunk under `plan`, and return its record, or None if it has seen no image.

    Raises:
        ValueError: if another plan filled the cache, or if its layers do not hold the recorded keys.
    """
    if cache is None or not cache.layers:
        return None
    record, static = CacheRecord.find(cache), is_static(cache)
    if record is None:
        if isinstance(cache.layers[-1], CacheRecord) or isinstance(cache.layers[0], StaticKeys):
            restore_empty(cache, len(plan.modes))  # it was reset, or its prefill failed half-way
        return None
    past = None if static else cache.get_seq_length()  # a static cache's length is on the device: no synchronisation
    if past == 0:
        restore_empty(cache, len(plan.modes))
        return None
    if record.plan != plan:
        raise ValueError(
            f"This cache was filled under the layer plan {record.plan}, and the model now runs {plan}: start with a "
            "new cache after changing the routing."
        )
    if not static:
        record.check(cache, past)
    return record


def restore_empty(cache: Cache, depth: int) -> None:
    """Give an empty cache the layers that it had before an earlier prompt."""
    room = cache.layers[0].max_cache_len if is_static(cache) else 0
    cache.layers[depth:] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StaticKeys):
            cache.layers[index] = StaticLayer(max_cache_len=room)
        elif isinstance(layer, ShorterLayer):
            layer.surplus = 0


def is_static(cache: Cache | None) -> bool:
    """Whether the layers of the cache have a fixed size, so that a step on it can be compiled."""
    return cache is not None and cache.is_compileable


def fit_static_layers(
    cache: Cache, plan: LayerPlan, record: CacheRecord | None, past: int, new_keys: dict[str, int], length: int
) -> None:
    """Resize the layers of a static cache to what they can need, once the numbers of image and text tokens are known.

    Args:
        past, length: tokens before this chunk and in it.
        new_keys: kind of layer -> number of keys that this chunk adds.

    Raises:
        ValueError: if the chunk is too long for the cache.
    """
    room = cache.layers[0].max_cache_len
    if past + length > room:
        raise ValueError(
            f"The static cache has max_cache_len={room}, but the sequence has {past + length} tokens already: make a "
            "cache with a larger max_cache_len."
        )
    for index in range(len(plan.modes)):
        kind, layer = plan.keys_in(index), cache.layers[index]
        held = past if record is None else record.num_keys[kind] + past - record.length
        needed = held + new_keys[kind] + room - past - length
        if not isinstance(layer, StaticKeys) or layer.max_cache_len != needed:
            cache.layers[index] = StaticKeys.like(layer, needed, held)


def let_line_4_crop(cache: Cache, plan: LayerPlan, num_keys: dict[str, int], length: int) -> None:
    """Let transformers 4 crop a growing cache: its layers have to know how many more keys than tokens they hold."""
    for index in range(len(plan.modes) if LINE_4 else 0):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer:
            cache.layers[index] = ShorterLayer()
            vars(cache.layers[index]).update(vars(layer))
        if isinstance(cache.layers[index], ShorterLayer):
            cache.layers[index].surplus = num_keys[plan.keys_in(index)] - length


def let_windows_grow(cache: Cache, plan: LayerPlan, past: int) -> None:
    """Let the text and context layers with a sliding window keep all their keys, in a growing cache.

    A window is one of tokens, and these layers hold other numbers of keys; the masks hide what lies outside of it.

    Args:
        past: the number of tokens in the cache. Where a layer holds fewer, zeros stand for those left of the window.
    """
    for index in range(len(plan.modes)):
        layer = cache.layers[index]
        if not isinstance(layer, DynamicSlidingWindowLayer) or plan.keys_in(index) == "joint":
            continue
        cache.layers[index] = grown = DynamicLayer()
        if layer.is_initialized and past:
            left = past - layer.keys.shape[-2]
            grown.update(*(nn.functional.pad(held, (0, 0, left, 0)) for held in (layer.keys, layer.values)))


class DecodeStep(nn.Module):
    """Decoding of one token as a module for `torch.export.export(..., strict=True)`; the cache is its state.

    Without strict=True the export misses the writes to the cache, and its logits are wrong.

    Args:
        model: a DPVR model under a routing.
        cache: a static cache that holds a prompt with an image; each call adds a token to it.

    Raises:
        ValueError: for any other cache.
    """

    def __init__(self, model: nn.Module, cache: Cache):
        super().__init__()
        self.model, self.cache, self.cache_name = model, cache, cache_name(type(model).forward)
        record = CacheRecord.find(cache)
        static = [layer for layer in cache.layers if isinstance(layer, StaticKeys)] if record is not None else []
        if not static:
            raise ValueError(
                f"This {type(cache).__name__} is not a static cache that holds a prompt with an image: run the prompt "
                "with past_key_values=StaticCache(config=model.config, max_cache_len=...) first."
            )
        for index, layer in enumerate(static):
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)
            self.register_buffer(f"length_{index}", layer.cumulative_length, persistent=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, vocabulary) after one token per row, int64 (B, 1), at `position_ids`, int64 (B, 1)."""
        cache = {self.cache_name: self.cache}
        return self.model(input_ids=input_ids, position_ids=position_ids, **cache).logits
