"""The method on a transformers cache: layers of different lengths, and a record of which token each key belongs to.

    cache.layers    0 ... L-1     the decoder's: T tokens of a prompt in a joint or context layer, X in a text layer
                    L ... L+S-1   SideBranchKeys, the side branch's: V image tokens
                    last          CacheRecord: the slots of all these keys

A slot is a token's index in the whole sequence. The record is a layer, so whatever reorders, repeats, selects, copies
or resets the rows of a cache does the same to it. A static cache is cut to size when a prompt brings an image
(`fit_static_layers`): a text layer gets room for text alone.

Axes: B batch, T tokens, X text tokens, V image tokens, L decoder layers, S side layers, N keys, H heads.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

try:
    from .configuration_dpvr import CONTEXT, JOINT, RESET, TEXT, LayerPlan
    from .versions_dpvr import LINE_4, cache_name
except ImportError:
    from configuration_dpvr import CONTEXT, JOINT, RESET, TEXT, LayerPlan
    from versions_dpvr import LINE_4, cache_name

KINDS = {JOINT: "joint", RESET: "joint", TEXT: "text", CONTEXT: "context"}  # of a decoder layer, by its keys


class ExtraLayer(DynamicLayer):
    """A layer that decoding leaves alone: it neither hinders compilation nor is cropped with the last text tokens.

    An offloaded cache fetches the layer after the one in use, and after the decoder's last its first.
    """

    is_compileable = True
    supports_early_init = False
    max_cache_len = 0  # transformers 4 compares the layers' rooms and batch sizes

    def __init__(self, layers: list):
        super().__init__()
        self.layers = layers

    def crop(self, max_length: int) -> None:
        pass

    def prefetch(self) -> None:
        super().prefetch()
        self.layers[0].prefetch()


@dataclass
class ChunkNotes:
    """What the layers of one chunk of text share while it runs.

    Attributes:
        places: "text" and "context" -> int64 (B, K), the slots of the keys that such layers hold in this chunk.
        masks: (stock mask, kind of layer, the same mask for that kind's keys).
        states: the states before each layer, where they were asked for.
    """

    places: dict[str, torch.Tensor]
    masks: list[tuple[Any, str, Any]] = field(default_factory=list)
    states: list[torch.Tensor] | None = None


class SideBranchKeys(ExtraLayer):
    """The keys of a side layer: images only, read when another image comes; a growing layer in any cache."""

    @property
    def max_batch_size(self) -> int:
        return 0 if self.keys is None else len(self.keys)


class CacheRecord(ExtraLayer):
    """Which slots the keys of a cache hold, per kind of layer; the last layer of the cache.

    Written when a chunk brings an image. Tokens that came later are plain text, one key each in joint, text and
    context layers, so decoding writes nothing here. In a static cache the tables reach to the layers' ends, as if text
    followed.

    Args:
        plan: the layer plan that filled the cache.
        batch_size: B.
        length: slots seen when this is written.
        last_image: slots up to the end of the last image token.
        plain: nothing is padded and no row has padding slots.
        tables: "text", "context" and "image" -> int64 (B, N or room), slots in the order of the keys; -1 at padding
            slots. Joint layers hold every slot in order.
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
        super().__init__([])
        self.plan, self.max_batch_size = plan, batch_size
        self.length, self.last_image, self.plain = length, last_image, plain
        self.tables, self.num_keys = tables or {}, num_keys or {}
        self.step: ChunkNotes | None = None  # of the text chunk that runs on this cache

    @staticmethod
    def find(cache: Cache | None) -> "CacheRecord | None":
        """The record on `cache`, or None where no image was seen."""
        record = cache.layers[-1] if cache is not None and cache.layers else None
        return record if isinstance(record, CacheRecord) and record.plan is not None else None

    def check(self, cache: Cache, past: int) -> None:
        """Raise ValueError for a cache that was cropped into its last image, or layer by layer."""
        if past < self.last_image:
            raise ValueError(
                f"Expected at least the {self.last_image} cached tokens that end with the last image; got {past}. "
                "Remedy: crop no further back than that, or prefill again."
            )
        for index, mode in enumerate(self.plan.modes if self.tables else ()):
            expected, got = self.num_keys[KINDS[mode]] + past - self.length, cache.get_seq_length(index)
            if got != expected:
                raise ValueError(
                    f"Expected {expected} keys in layer {index} of a cache of {past} tokens; got {got}. Remedy: "
                    "prefill again, and crop the cache as a whole."
                )

    def slots(self, kind: str, past: int) -> torch.Tensor:
        """The slots (B, N) of the keys that text, context or side layers hold, `past` tokens into the sequence."""
        table, held = self.tables[kind], self.num_keys[kind]
        if kind == "image":
            return table
        held += past - self.length  # fewer than noted after a crop: what lies last in a layer is text
        if held <= table.shape[1]:
            return table[:, :held]
        later = torch.arange(self.length, past, device=table.device).expand(len(table), -1)
        return torch.cat([table, later], dim=1)

    def put_on(self, cache: Cache) -> None:
        """Make this the record of `cache`, in the place of an older one."""
        if isinstance(cache.layers[-1], CacheRecord):
            cache.layers.pop()
        self.layers = cache.layers
        cache.layers.append(self)

    # -- what a cache does to its layers ------------------------------------------------------------------------------

    def reset(self) -> None:
        self.plan, self.tables = None, {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.tables = {kind: table[indices.to(table.device)] for kind, table in self.tables.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.tables = {kind: table.repeat_interleave(repeats, dim=0) for kind, table in self.tables.items()}


class StaticKeys(StaticLayer):
    """A static layer that counts its own keys on the device, as transformers 5's does, on both lines."""

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len=max_cache_len)
        self.cumulative_length = torch.tensor(0)

    @classmethod
    def like(cls, old: StaticLayer, room: int, num_keys: int) -> "StaticKeys":
        """A layer with room for `room` keys that holds the first `num_keys` of another."""
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
    """A growing layer that holds fewer keys than there are tokens, or more; transformers 4 crops it to tokens."""

    surplus = 0  # keys - tokens

    def crop(self, max_length: int) -> None:
        held = self.get_seq_length() if max_length < 0 else self.surplus if max_length > 0 else 0
        super().crop(max(0, max_length + held))


def continue_cache(cache: Cache | None, plan: LayerPlan) -> CacheRecord | None:
    """Make `cache` ready for a chunk under `plan`, and return its record, or None where it has seen no image.

    Raises:
        ValueError: if another plan filled the cache, or its layers do not hold what is noted.
    """
    if cache is None or not cache.layers:
        return None
    record, static = CacheRecord.find(cache), is_static(cache)
    if record is None:
        if isinstance(cache.layers[-1], CacheRecord) or isinstance(cache.layers[0], StaticKeys):
            restore_empty(cache, len(plan.modes))  # it was reset, or its prefill was broken off
        return None
    past = None if static else cache.get_seq_length()  # a static cache would have to ask the device
    if past == 0:
        restore_empty(cache, len(plan.modes))
        return None
    if record.plan != plan:
        raise ValueError(
            f"Expected a cache filled under the layer plan in use, {plan}; got one filled under {record.plan}. "
            "Remedy: prefill again after changing the routing or its layers."
        )
    if not static:
        record.check(cache, past)
    return record


def restore_empty(cache: Cache, depth: int) -> None:
    """Take off an empty cache what was put on it for an earlier prompt."""
    room = cache.layers[0].max_cache_len if is_static(cache) else 0
    cache.layers[depth:] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StaticKeys):
            cache.layers[index] = StaticLayer(max_cache_len=room)
        elif isinstance(layer, ShorterLayer):
            layer.surplus = 0


def is_static(cache: Cache | None) -> bool:
    """Whether the cache's layers have a fixed room, so that they may be compiled."""
    return cache is not None and cache.is_compileable


def fit_static_layers(
    cache: Cache, plan: LayerPlan, record: CacheRecord | None, past: int, new_keys: dict[str, int], length: int
) -> None:
    """Give every layer of a static cache the room it can need, once it is known how many tokens are images.

    Args:
        past, length: T before this chunk, and of it.
        new_keys: kind of layer -> keys that this chunk adds to it.

    Raises:
        ValueError: if the chunk does not fit in.
    """
    room = cache.layers[0].max_cache_len
    if past + length > room:
        raise ValueError(
            f"Expected room for {past + length} tokens in the static cache; got max_cache_len={room}. Remedy: a "
            "larger max_cache_len."
        )
    for index, mode in enumerate(plan.modes):
        kind, layer = KINDS[mode], cache.layers[index]
        held = past if record is None else record.num_keys[kind] + past - record.length
        needed = held + new_keys[kind] + room - past - length
        if not isinstance(layer, StaticKeys) or layer.max_cache_len != needed:
            cache.layers[index] = StaticKeys.like(layer, needed, held)


def let_line_4_crop(cache: Cache, plan: LayerPlan, num_keys: dict[str, int], length: int) -> None:
    """Tell the growing layers of a cache how many keys more than tokens they hold; only transformers 4 has to know."""
    for index, mode in enumerate(plan.modes if LINE_4 else ()):
        layer = cache.layers[index]
        if type(layer) is DynamicLayer:
            cache.layers[index] = ShorterLayer()
            vars(cache.layers[index]).update(vars(layer))
        if isinstance(cache.layers[index], ShorterLayer):
            cache.layers[index].surplus = num_keys[KINDS[mode]] - length


class DecodeStep(nn.Module):
    """The next token's step as a module for `torch.export.export(..., strict=True)`, with the cache as its state.

    Without strict=True export does not see what is written to the cache, and gives wrong logits.

    Args:
        model: a DPVR model under a routing.
        cache: a static cache after the prefill of a prompt with an image; it is written to.
    """

    def __init__(self, model: nn.Module, cache: Cache):
        super().__init__()
        self.model, self.cache, self.cache_name = model, cache, cache_name(type(model).forward)
        record = CacheRecord.find(cache)
        static = [layer for layer in cache.layers if isinstance(layer, StaticKeys)] if record is not None else []
        if not static:
            raise ValueError(
                f"Expected a static cache that a routing filled with a prompt and its image; got {cache}. Remedy: run "
                "the prompt with past_key_values=StaticCache(config=model.config, max_cache_len=...)."
            )
        for index, layer in enumerate(static):
            self.register_buffer(f"keys_{index}", layer.keys, persistent=False)
            self.register_buffer(f"values_{index}", layer.values, persistent=False)
            self.register_buffer(f"length_{index}", layer.cumulative_length, persistent=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, vocabulary) after one token of each row, int64 (B, 1), at its rotary position, (B, 1)."""
        cache = {self.cache_name: self.cache}
        return self.model(input_ids=input_ids, position_ids=position_ids, **cache).logits
