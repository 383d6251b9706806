"""The method: past the split image tokens take a short side branch, text goes on alone, and both meet again late.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.2, Algorithm
1.

    inputs_embeds (B, T, D)
        |
    layers 0 ... s-1            joint: image and text together, the frozen shared stack
        |--------------------.
    text (B, X, D)       image (B, V, D)
        |                    |
    layers s ... L-2     side branch          text runs alone; the side branch is the only trainable part
        |                    |
    layer L-1 <--- keys -----'                context: text attends to the side branch's image states
        |
    norm, lm_head

Nothing of the base model is written again. Its own forward runs on twins (twins_dpvr.py) whose decoder layers are
`RoutedLayer`s; each picks its stream's tokens out of what the stock decoder made for all T:

    outer model's own forward      tower, projector, merging               on a twin whose decoder is
        decoder's own forward      cache, masks, rotary tables             a twin whose layers are routed
            RoutedLayer            states, tables, ids: its tokens; mask: the rows of its queries, the columns of its
                                   keys; then the stock layer runs

A context layer writes the image's keys before the text's own: attention does not care in which order keys lie as long
as the mask knows where each belongs (streams_dpvr.py). Who calls this is forward_dpvr.py.

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, D width, H heads, L layers.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

try:
    from .cache_dpvr import KINDS, CacheRecord, SideBranchKeys, fit_static_layers, is_static, let_line_4_crop
    from .configuration_dpvr import CONTEXT, JOINT, RESET, LayerPlan
    from .streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from .twins_dpvr import MASK, RoutedLayer, WriteFirst, on
except ImportError:
    from cache_dpvr import KINDS, CacheRecord, SideBranchKeys, fit_static_layers, is_static, let_line_4_crop
    from configuration_dpvr import CONTEXT, JOINT, RESET, LayerPlan
    from streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from twins_dpvr import MASK, RoutedLayer, WriteFirst, on

TOKEN_AXES = {"position_ids": -1, "token_type_ids": -1, "mm_token_type_ids": -1, "position_embeddings": -2}
KEYS_OF = ("text", "image", "context")  # kinds of layers whose keys are not simply all tokens' in order
eagerly = torch.compiler.disable(recursive=False)  # sorting tokens is not compiled; the stock layers may be


class TwoStreamPass:
    """One chunk with image tokens on its way through a decoder under a layer plan (paper Algorithm 1).

    A layer's kind says which tokens query and which keys it holds: "joint" T of T, "text" X of X, "image" V of V (the
    side branch), "context" X of V + X.

    Args:
        side_branch: the trainable layers; their `layer_idx` follow the decoder's.
        plan: where the image leaves the stack, and the mode of every layer.
        image_mask: bool (B, T), True at image tokens.
        record: of the cache that is continued, if it has seen images.
        padded: bool (), whether the attention mask leaves tokens out; None without one.
        tail: if the states of these last tokens alone are wanted, all of them text, only they query in the last layer.
        keep_states: whether to keep the states (B, T, D) before each layer, in `states`.
    """

    def __init__(
        self,
        side_branch: nn.ModuleList,
        plan: LayerPlan,
        image_mask: torch.Tensor,
        *,
        record: CacheRecord | None = None,
        padded: torch.Tensor | None = None,
        tail: int | None = None,
        keep_states: bool = False,
    ) -> None:
        self.side_branch, self.plan, self.image_mask, self.record = side_branch, plan, image_mask, record
        self.padded, self.tail = padded, tail
        self.states: list[torch.Tensor] | None = [] if keep_states else None
        self.streams: Streams | None = None
        self.picked: dict[tuple, tuple[Any, Any]] = {}

    # -- before the first layer ---------------------------------------------------------------------------------------

    @torch.compiler.disable
    def start(self, cache: Cache | None) -> None:
        """Sort the chunk into streams, and give the cache room for them."""
        self.cache, self.past = cache, 0 if cache is None else int(cache.get_seq_length())
        self.sort(self.image_mask)

    def sort(self, second: torch.Tensor) -> None:
        """Sort the chunk into text and a second stream, marked in bool (B, T): the image, or what a baseline drops."""
        batch_size, self.length = second.shape
        counts, at_end = second.sum(1), (second.flip(1).cumsum(1) == 0).sum(1).min()
        padded = torch.zeros_like(at_end) if self.padded is None else self.padded.to(at_end)
        fewest, most, text_at_end, padded = torch.stack([counts.min(), counts.max(), at_end, padded]).tolist()
        self.last_image = self.past + self.length - text_at_end
        self.streams = Streams.sort(second, self.past, num_text=self.length - fewest, num_image=most)
        self.picked.clear()
        self.even = fewest == most and (self.record is None or self.record.plain)  # no padding slots
        self.plain = self.even and not padded
        self.all_slots = torch.arange(self.past, self.past + self.length, device=second.device).expand(batch_size, -1)
        if self.cache is not None:
            self._make_room(self.cache)

    def _make_room(self, cache: Cache) -> None:
        """Give the cache its decoder layers, and those of a static one their sizes."""
        while len(cache.layers) < len(self.plan.modes):
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        if is_static(cache):
            num_text, num_image = self.streams.text.shape[1], self.streams.image.shape[1]
            new_keys = {"joint": self.length, "text": num_text, "context": num_image + num_text}
            fit_static_layers(cache, self.plan, self.record, self.past, new_keys, self.length)

    # -- a layer ------------------------------------------------------------------------------------------------------

    @eagerly
    def __call__(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """One layer of the plan; between deep layers goes what the layer has computed, not always all T tokens."""
        index, split = layer.index, self.plan.split_layer
        if index == 0:
            self.start(cache)
        if index < split:
            self._keep(hidden)
            return self.shared_layer(layer, hidden, arguments, cache)
        if index == split:
            self._keep(hidden)
            self.leave(layer, hidden, arguments)
        else:
            self._receive(hidden, self.plan.modes[index - 1])
            self._keep(None)
        out = self._deep_layer(layer, arguments, cache)
        if index < len(self.plan.modes) - 1:
            return out
        states, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        self._receive(states, self.plan.modes[-1])
        self._write_record()
        states = self.streams.merge(self.text, self.image)
        return states if rest is None else (states, *rest)

    def shared_layer(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A layer below the split, with all tokens (B, T, D)."""
        return layer.call(hidden, arguments, cache)

    @eagerly
    def leave(self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        """The streams part with states (B, T, D) before the first deep layer; Algorithm 1, phase 2."""
        self.text, self.image = (self.streams.pick(hidden, at) for at in (self.streams.text, self.streams.image))
        if self.plan.reads_side_branch:
            self.image = self._run_side_branch(self.image, self.arguments(arguments, "image"), layer.cache_name)

    @eagerly
    def _deep_layer(
        self, layer: RoutedLayer, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        mode, tail = self.plan.modes[layer.index], self.tail if layer.index == len(self.plan.modes) - 1 else None
        if mode in (JOINT, RESET):
            return self.joint(layer, self.streams.merge(self.text, self.image), arguments, cache)
        image = self.image if mode == CONTEXT else None
        if tail is None or tail >= self.text.shape[1]:
            return self.read(layer, self.text, arguments, cache, image=image)
        out = self.read(layer, self.text, arguments, cache, image=image, tail=tail)
        if isinstance(out, tuple):
            return (torch.cat([self.text[:, :-tail], out[0]], dim=1), *out[1:])
        return torch.cat([self.text[:, :-tail], out], dim=1)

    def joint(
        self, layer: RoutedLayer, states: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A layer with all tokens (B, T, D), on the stock decoder's own arguments."""
        return layer.call(states, arguments, cache)

    @eagerly
    def read(
        self,
        layer: RoutedLayer,
        text: torch.Tensor,
        arguments: dict[str, Any],
        cache: Cache | None,
        *,
        image: torch.Tensor | None = None,
        tail: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A layer with text (B, X, D) alone, or reading keys made of image states (B, V, D).

        With `tail` only the last `tail` tokens query and come back.
        """
        kind, others = "text", []
        if image is not None:
            kind = "context"
            others.append((image, self.arguments(arguments, "image")))
        if tail is not None:
            others.append((text[:, :-tail], self.arguments(arguments, kind, slice(None, -tail))))
            text = text[:, -tail:]
        writer = WriteFirst(cache, layer, others) if others else cache
        if text.shape[1] == 0:  # a chunk of nothing but image tokens has no text to run
            if others:
                writer.write(image.device, layer.stock.self_attn.layer_idx)
            return text
        part = slice(None) if tail is None else slice(-tail, None)
        return layer.call(text, self.arguments(arguments, kind, part), writer)

    def _receive(self, states: torch.Tensor, mode: str) -> None:
        """Sort what the layer before gave into the streams."""
        if mode in (JOINT, RESET):
            self.text = self.streams.pick(states, self.streams.text)
            if mode == JOINT:
                self.image = self.streams.pick(states, self.streams.image)
        else:
            self.text = states

    def _keep(self, states: torch.Tensor | None) -> None:
        if self.states is not None:
            self.states.append(self.streams.merge(self.text, self.image) if states is None else states)

    def _run_side_branch(self, image: torch.Tensor, arguments: dict[str, Any], cache_name: str) -> torch.Tensor:
        """Algorithm 1, phase 2: the image tokens of a row among themselves, at their own positions, (B, V, D)."""
        if self.cache is not None:
            layers, depth = self.cache.layers, len(self.plan.modes)
            if self.record is None:
                layers[depth:] = [SideBranchKeys(layers) for _ in self.side_branch]
            elif len(layers) - depth - 1 != len(self.side_branch):
                raise ValueError(
                    f"Expected a cache filled with a side branch of {len(self.side_branch)} layers; got one of "
                    f"{len(layers) - depth - 1}. Remedy: prefill again after changing the side branch."
                )
        like = next(self.side_branch.parameters())  # PEFT trains in float32 on a base of half precision
        device = image.device if like.device.type == "meta" else like.device  # offloaded layers fetch their inputs
        branch, arguments = (
            image.to(device, like.dtype),
            {name: on(value, device) for name, value in arguments.items()},
        )
        for layer in self.side_branch:
            branch = layer(branch, **arguments, **{cache_name: self.cache})
            branch = branch[0] if isinstance(branch, tuple) else branch
        return branch.to(image.device, image.dtype)

    # -- a layer's arguments, for one stream --------------------------------------------------------------------------

    @torch.compiler.disable
    def arguments(self, full: dict[str, Any], kind: str, part: slice = slice(None)) -> dict[str, Any]:
        """The arguments that the stock decoder made for all T tokens, for those that query in a layer of this kind.

        Args:
            part: of these, the ones that query in this call.

        Raises:
            ValueError: for an argument over all tokens that is not known.
        """
        return {name: self._argument(name, value, kind, part) for name, value in full.items()}

    def _argument(self, name: str, value: Any, kind: str, part: slice) -> Any:
        if value is None and name != MASK:
            return value
        key = (name, id(value), kind, part.start, part.stop)  # `value` is kept, so that its id stays its own
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
                f"Expected arguments of a decoder layer that are known to go by tokens, {(*TOKEN_AXES, MASK)}; got "
                f"{name!r} of shape {tuple(value.shape)} for {self.length} tokens. Remedy: leave it out, or use the "
                "model without a routing."
            )
        return value

    def query_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, Q) of the tokens that query in a layer of this kind."""
        return {"joint": self.all_slots, "image": self.streams.image}.get(kind, self.streams.text)

    def key_slots(self, kind: str) -> torch.Tensor:
        """Slots (B, K) of the keys a text, context or side layer sees, in the order in which they lie in its cache."""
        image, text = self.streams.image, self.streams.text
        new = [image, text] if kind == "context" else [self.query_slots(kind)]
        if self.record is not None:
            new = [self.record.slots(kind, self.past), *new]
        elif kind != "image":  # a cache that has seen no image holds one key per token
            new = [torch.arange(self.past, device=text.device).expand(len(text), -1), *new]
        return torch.cat(new, dim=1)

    def _mask(self, full: Any, kind: str, part: slice) -> Any:
        """The mask of these queries and the keys of the layer; None stands for what the sdpa kernel does by itself."""
        queries, keys = self.query_slots(kind)[:, part], self.key_slots(kind)
        static = is_static(self.cache) and kind != "image"
        if static:  # some places are empty yet
            keys = nn.functional.pad(keys, (0, max(0, self._num_places(kind) - keys.shape[1])), value=-1)
        if full is not None:
            # a sliding window's mask may start later than the sequence
            first = 0 if static else max(0, self.past + self.length - full.shape[-1])
            return mask_of_keys(full, shifted(self.past, queries), shifted(first, keys))
        if self.even and not static and self._is_causal(kind, queries.shape[1], whole=part == slice(None)):
            return None
        return visible_keys(queries, keys)

    def _is_causal(self, kind: str, num_queries: int, whole: bool) -> bool:
        """Whether the n-th query sees the first n keys and nothing else, or the one query all."""
        if num_queries == 1:  # but if it is all the text there is, images may follow it
            return not (whole and kind == "context")
        return self.past == 0 and kind != "context" and whole

    def _num_places(self, kind: str) -> int:
        """Keys that a layer of this kind has room for, in a static cache."""
        rooms = zip(self.plan.modes, self.cache.layers, strict=False)
        return next((layer.max_cache_len for mode, layer in rooms if KINDS[mode] == kind), 0)

    # -- after the last layer -----------------------------------------------------------------------------------------

    def _write_record(self) -> None:
        """Note on the cache where the keys of this chunk lie."""
        if self.cache is None:
            return
        tables, end = {kind: self.key_slots(kind) for kind in KEYS_OF}, self.past + self.length
        num_keys = {"joint": end, **{kind: table.shape[1] for kind, table in tables.items()}}
        if is_static(self.cache):  # as if text followed, to the layers' ends
            for kind in ("text", "context"):
                missing = max(0, self._num_places(kind) - num_keys[kind])
                later = torch.arange(end, end + missing, device=tables[kind].device)
                tables[kind] = torch.cat([tables[kind], later.expand(len(tables[kind]), -1)], dim=1)
        notes = {"length": end, "last_image": self.last_image, "plain": self.plain}
        CacheRecord(self.plan, len(self.image_mask), **notes, tables=tables, num_keys=num_keys).put_on(self.cache)
        let_line_4_crop(self.cache, self.plan, num_keys, end)
