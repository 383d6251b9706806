"""A layer's arguments for the tokens of one stream, picked out of what the stock decoder made for all of them.

    states, tables, ids (B, T, ...)      entries of the queries, along each argument's token axis
    mask (B, H, T, K)                    rows of the queries, columns of the keys that the layer holds

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, H heads, Q queries, K keys.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

try:
    from .cache_dpvr import CacheRecord, is_static
    from .configuration_dpvr import LayerPlan
    from .streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from .twins_dpvr import MASK
except ImportError:
    from cache_dpvr import CacheRecord, is_static
    from configuration_dpvr import LayerPlan
    from streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from twins_dpvr import MASK

TOKEN_AXES = {  # arguments of a layer with one entry per token
    "position_ids": -1,
    "token_type_ids": -1,
    "mm_token_type_ids": -1,
    "moe_mm_token_type_ids": -1,
    "per_layer_input": -2,
    "position_embeddings": -2,
    "position_embeddings_global": -2,  # Gemma 3 in transformers 4
    "position_embeddings_local": -2,
}


class StreamArguments:
    """Picks arguments; a mixin of `TwoStreamPass`, which sorts the chunk.

    Attributes:
        plan, cache, record: of the pass.
        past, length: tokens before the chunk and in it.
        streams, all_slots: the slots of the streams, and of all tokens (B, T).
        read_slots: those of the image tokens that context layers read (B, R).
        even: whether no row has padding slots.
        causal: whether the kernel of the layer that runs is causal where it gets no mask.
        picked: what was picked already, for the layers that follow.
    """

    plan: LayerPlan
    cache: Cache | None
    record: CacheRecord | None
    past: int
    length: int
    streams: Streams
    all_slots: torch.Tensor
    read_slots: torch.Tensor
    even: bool
    causal: bool
    picked: dict[tuple, tuple[Any, Any]]

    @torch.compiler.disable
    def arguments(
        self, full: dict[str, Any], kind: str, part: slice = slice(None), *, recurrent: bool = False
    ) -> dict[str, Any]:
        """A layer's arguments for the queries of this kind of layer, from the stock decoder's for all T tokens.

        Args:
            full: the stock decoder's.
            kind: "joint", "text", "context" or "image"; "read" for the image tokens that context layers read; "first"
                for text that reads all tokens in layer 0.
            part: which of the queries, if a call does not have all.
            recurrent: for a recurrent layer, whose mask says which tokens leave its state alone.

        Raises:
            ValueError: for an unknown argument with one entry per token.
        """
        masks = {MASK: self._padding_mask(full.get(MASK))} if recurrent else {}
        return {
            name: self._argument(name, value, kind, part) for name, value in full.items() if name not in masks
        } | masks

    def _padding_mask(self, full: torch.Tensor | None) -> torch.Tensor | None:
        """The mask (B, X) of a recurrent layer for text: 0 at tokens that leave its state alone; None if none does.

        Args:
            full: that of all tokens.

        Raises:
            ValueError: if rows would be padded behind tokens that the layer has seen, which its state would decay at.
        """
        slots = self.streams.text
        if self.past and bool((slots < 0).any()):
            raise ValueError(
                "The rows of this chunk have different numbers of text tokens and go on with a cache, which recurrent "
                "layers cannot do: run the rows one by one, or the whole dialogue again without the cache."
            )
        if full is None:
            return None if self.even else (slots >= 0).to(torch.int64)
        return self.streams.pick(full[:, -self.length :], slots).masked_fill(slots < 0, 0)

    def _argument(self, name: str, value: Any, kind: str, part: slice) -> Any:
        if value is None and name != MASK:
            return value
        key = (
            name,
            id(value),
            kind,
            part.start,
            part.stop,
            part.step,
        )  # `value` is kept, so that its id is not used again
        if key not in self.picked:
            self.picked[key] = value, self._pick(name, value, kind, part)
        return self.picked[key][1]

    def _pick(self, name: str, value: Any, kind: str, part: slice) -> Any:
        if name == MASK:
            return self._mask(value, kind, part)
        at = self.query_slots(kind)[:, part]
        if name in TOKEN_AXES:
            parts = value if isinstance(value, tuple) else (value,)
            parts = tuple(self.streams.pick(tensor, at, TOKEN_AXES[name]) for tensor in parts)
            return parts if isinstance(value, tuple) else parts[0]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and self.length in value.shape:
            raise ValueError(
                f"The argument {name!r} of shape {tuple(value.shape)} seems to have an entry for each of the "
                f"{self.length} tokens, and a routing can split only {', '.join((*TOKEN_AXES, MASK))}: leave it out, "
                "or run the base without a routing."
            )
        return value

    def query_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, Q) of the queries in a layer of this kind."""
        image = {"image": self.streams.image, "read": self.read_slots}
        return {"joint": self.all_slots, **image}.get(kind, self.streams.text)

    def key_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, K) of the keys in a layer of this kind, in the order of the cache."""
        text = self.streams.text
        if kind == "first":
            return torch.arange(self.past + self.length, device=text.device).expand(len(text), -1)
        new = [self.read_slots, text] if kind == "context" else [self.query_slots(kind)]
        if self.record is not None:
            new = [self.record.slots(kind, self.past), *new]
        elif kind != "image":  # a cache without images holds one key per token
            new = [torch.arange(self.past, device=text.device).expand(len(text), -1), *new]
        return torch.cat(new, dim=1)

    def _mask(self, full: Any, kind: str, part: slice) -> Any:
        """The mask of these queries and the keys of the layer; None if the kernel needs none."""
        queries, keys = self.query_slots(kind)[:, part], self.key_slots(kind)
        static = is_static(self.cache) and kind != "image"
        if static:  # its layers have free places, which are masked
            places = self._num_places("joint" if kind == "first" else kind)
            keys = nn.functional.pad(keys, (0, max(0, places - keys.shape[1])), value=-1)
        if full is not None:
            # the mask of a sliding window may start later than the sequence
            first = 0 if static else max(0, self.past + self.length - full.shape[-1])
            return mask_of_keys(full, shifted(self.past, queries), shifted(first, keys))
        if not self.causal:
            return None if self.even and not static else (keys >= 0)[:, None, None].expand(-1, 1, queries.shape[1], -1)
        if self.even and not static and self._is_causal(kind, queries.shape[1], whole=part == slice(None)):
            return None
        return visible_keys(queries, keys)

    def _is_causal(self, kind: str, num_queries: int, whole: bool) -> bool:
        """Whether the n-th query attends to the first n keys, or a single query to all keys."""
        if num_queries == 1:  # in a context layer image tokens may follow the only text token
            return not (whole and kind in ("context", "first"))
        return self.past == 0 and kind not in ("context", "first") and whole

    def _num_places(self, kind: str) -> int:
        """The number of keys for which a layer of this kind has room in a static cache."""
        layers = enumerate(self.cache.layers[: len(self.plan.modes)])
        return next((layer.max_cache_len for index, layer in layers if self.plan.keys_in(index) == kind), 0)
