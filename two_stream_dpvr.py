"""The method: past the split image tokens run through a short side branch and text alone through the decoder layers.

The text attends to the side branch's output in the last layer, or in the layers that the plan says.

Late-Layer Fusion is Enough: Dual-Path Vision Token Routing, https://arxiv.org/abs/2606.09131, section 3.2, Algorithm
1.

    inputs_embeds (B, T, D)
        |
    layers 0 ... s-1            joint: image and text together, the frozen shared stack
        |--------------------.
    text (B, X, D)       image (B, V, D)
        |                    |
    layers s ... L-2     side branch          text runs alone; only the side branch is trained
        |                    |
    layer L-1 <--- keys -----'                context: text attends to the side branch's image states
        |
    norm, lm_head

The base model's own forward runs all this, on twins: copies with the same weights whose decoder layers are
`RoutedLayer`s (twins_dpvr.py). The stock decoder makes states, masks and rotary embeddings for all T tokens; a routed
layer selects those of its stream and calls the stock layer with them:

    outer model's own forward      tower, projector, merging               on a twin whose decoder is
        decoder's own forward      cache, masks, rotary embeddings         a twin whose layers are routed
            RoutedLayer            selects tokens; in the mask, rows for its queries and columns for its keys
                stock layer

A context layer writes the image's keys before those of the text. The order of keys does not matter to attention, as
long as the columns of the mask have the same order (streams_dpvr.py). forward_dpvr.py calls all this.

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, D width, H heads, L layers.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

try:
    from .cache_dpvr import (
        CacheRecord,
        SideBranchKeys,
        fit_static_layers,
        is_static,
        let_line_4_crop,
        let_windows_grow,
    )
    from .configuration_dpvr import CONTEXT, JOINT, RESET, LayerPlan
    from .decoders_dpvr import RECURRENT
    from .latent_dpvr import token_scores
    from .stream_arguments_dpvr import StreamArguments
    from .streams_dpvr import Runs, Streams
    from .twins_dpvr import MASK, RoutedLayer, WriteFirst, WriteMerged, on
except ImportError:
    from cache_dpvr import (
        CacheRecord,
        SideBranchKeys,
        fit_static_layers,
        is_static,
        let_line_4_crop,
        let_windows_grow,
    )
    from configuration_dpvr import CONTEXT, JOINT, RESET, LayerPlan
    from decoders_dpvr import RECURRENT
    from latent_dpvr import token_scores
    from stream_arguments_dpvr import StreamArguments
    from streams_dpvr import Runs, Streams
    from twins_dpvr import MASK, RoutedLayer, WriteFirst, WriteMerged, on

TABLES_OF = ("text", "image", "context")  # kinds of layers whose keys are recorded; a joint layer has all, in order
eagerly = torch.compiler.disable(recursive=False)  # sorting tokens is not compiled, the stock layers may be


class TwoStreamPass(StreamArguments):
    """Runs the decoder layers for one chunk with image tokens, under a layer plan (paper Algorithm 1).

    The kind of a layer says how many queries and keys it has in the chunk: "joint" T and T, "text" X and X, "image" (a
    side layer) V and V, "context" X and V + X.

    Args:
        side_branch: the trainable layers; their `layer_idx` follow the decoder's.
        plan: the layer at which image tokens leave the decoder, and the mode of every layer.
        image_mask: bool (B, T), True at image tokens.
        record: that of the cache, if it has seen images before.
        padded: bool (), whether the attention mask masks tokens; None without a mask.
        tail: the number of last tokens, all of them text, whose states alone are wanted: the last layer has only these
            as queries. None: all states are wanted.
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
        self.causal = True  # whether the kernel of the layer that runs is causal where it gets no mask

    # -- before the first layer ---------------------------------------------------------------------------------------

    @torch.compiler.disable
    def start(self, cache: Cache | None) -> None:
        """Sort the chunk into streams, and prepare the cache for them."""
        self.cache, self.past = cache, 0 if cache is None else int(cache.get_seq_length())
        self.sort(self.image_mask)

    def sort(self, second: torch.Tensor) -> None:
        """Sort the chunk into two streams.

        Args:
            second: bool (B, T), True at the tokens of the second stream: the image tokens, or those among them that a
                pruning baseline drops.
        """
        batch_size, self.length = second.shape
        counts, at_end = second.sum(1), (second.flip(1).cumsum(1) == 0).sum(1).min()
        padded = torch.zeros_like(at_end) if self.padded is None else self.padded.to(at_end)
        fewest, most, text_at_end, padded = torch.stack([counts.min(), counts.max(), at_end, padded]).tolist()
        self.last_image = self.past + self.length - text_at_end
        self.streams = Streams.sort(second, self.past, num_text=self.length - fewest, num_image=most)
        self._choose_read(most)
        self.picked.clear()
        self.even = fewest == most and (self.record is None or self.record.plain)  # no padding slots
        self.plain = self.even and not padded
        self.all_slots = torch.arange(self.past, self.past + self.length, device=second.device).expand(batch_size, -1)
        if self.cache is not None:
            self._make_room(self.cache)

    def _choose_read(self, most: int) -> None:
        """Choose the image tokens that context layers read: `read_slots` (B, R); `read_index`, their places among all.

        With a latent of stride k every k-th image token of a row, from its first on, or those with the highest score:
        then only their number is known before the states are. Else all, and no index.
        """
        slots, stride = self.streams.image, self.plan.latent_stride or 1
        self.read_slots, self.read_index = slots, None
        if stride == 1:
            return
        if self.plan.latent_score:
            count = int(Runs(slots).count(stride).max())
            self.read_slots = slots.new_full((len(slots), count), -1)
            return
        held = slots >= 0
        before = 0 if self.record is None else (self.record.tables["image"] >= 0).sum(1, keepdim=True)
        self._read(held & ((held.cumsum(1) - 1 + before) % stride == 0), most)

    def _read(self, kept: torch.Tensor, most: int) -> None:
        """Let context layers read the image tokens `kept`, bool (B, V)."""
        count = int(kept.sum(1).max())
        self.read_index = kept.int().argsort(dim=1, stable=True)[:, most - count :]
        self.read_slots = self.streams.image.masked_fill(~kept, -1).gather(1, self.read_index)

    def _read_best(self, states: torch.Tensor) -> None:
        """Let context layers read the image tokens whose states (B, V, D) have the highest score."""
        runs = Runs(self.streams.image.to(states.device))
        kept = runs.best(self.scores(states, runs), self.plan.latent_stride)
        self._read(kept.to(self.streams.image.device), states.shape[1])

    def scores(self, states: torch.Tensor, runs: Runs) -> torch.Tensor:
        """The scores (B, V) of the image states (B, V, D) that a latent is made of."""
        return token_scores(self.plan.latent_score, states, runs)

    def _make_room(self, cache: Cache) -> None:
        """Add the layers of the decoder to the cache, and resize those of a static one."""
        while len(cache.layers) < len(self.plan.modes):
            cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
        let_windows_grow(cache, self.plan, self.past)
        if is_static(cache):
            num_text = self.streams.text.shape[1]
            new_keys = {"joint": self.length, "text": num_text, "context": self.read_slots.shape[1] + num_text}
            fit_static_layers(cache, self.plan, self.record, self.past, new_keys, self.length)

    # -- a layer ------------------------------------------------------------------------------------------------------

    @eagerly
    def __call__(
        self, layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run one layer. Past the split a layer returns the states it has computed, which may be of text alone."""
        index, split = layer.index, self.plan.split_layer
        if layer.kind != RECURRENT:
            self.causal = getattr(layer.stock.self_attn, "is_causal", True)  # the kernel's default
        if index == 0:
            self.start(cache)
        if index < split:
            self._keep(hidden)
            return self.shared_layer(layer, hidden, arguments, cache)
        if index == split:
            self._keep(hidden)
            self.leave(hidden)
        else:
            self._receive(hidden, self.plan.modes[index - 1])
            self._keep(None)
        if self.plan.reads_side_branch and not self.branch_has_run and layer.kind != RECURRENT:
            self._run_side_branch(self.arguments(arguments, "image"), layer.cache_name)
            self.branch_has_run = True
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
    def leave(self, hidden: torch.Tensor) -> None:
        """Split the states (B, T, D) into streams, at the split."""
        self.text, self.image = (self.streams.pick(hidden, at) for at in (self.streams.text, self.streams.image))
        self.branch_has_run = False

    @eagerly
    def _deep_layer(
        self, layer: RoutedLayer, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        mode, tail = self.plan.modes[layer.index], self.tail if layer.index == len(self.plan.modes) - 1 else None
        if mode in (JOINT, RESET):
            return self.joint(layer, self.streams.merge(self.text, self.image), arguments, cache)
        image = None if mode != CONTEXT else self.latent if self.plan.latent_stride else self.image
        if layer.kind == RECURRENT:
            return layer.call(self.text, self.arguments(arguments, "text", recurrent=True), cache)
        if tail is None or tail >= self.text.shape[1]:
            return self.read(layer, self.text, arguments, cache, image=image)
        out = self.read(layer, self.text, arguments, cache, image=image, tail=tail)
        if isinstance(out, tuple):
            return (torch.cat([self.text[:, :-tail], out[0]], dim=1), *out[1:])
        return torch.cat([self.text[:, :-tail], out], dim=1)

    def joint(
        self, layer: RoutedLayer, states: torch.Tensor, arguments: dict[str, Any], cache: Cache | None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A layer past the split with all tokens (B, T, D)."""
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
        """A layer with text (B, X, D) as queries, and with keys of image states (B, V, D) too if these are given.

        With `tail` only the last `tail` text tokens are queries, and their states are returned.
        """
        kind, others = "text", []
        if image is not None and layer.index == 0:
            projections = self.side_branch.latent.projections(0)
            merged = WriteMerged(cache, layer, image, self.arguments(arguments, "image"), projections, self.streams)
            if text.shape[1] == 0:
                merged.write(image.device)
                return text
            return layer.call(text, self.arguments(arguments, "first"), merged)
        if image is not None:
            kind = "context"
            projections = self.side_branch.latent.projections(layer.index) if self.plan.latent_stride else None
            if self.read_index is not None:
                image = image.gather(1, self.read_index[..., None].expand(-1, -1, image.shape[-1]))
            if image.shape[1] > 0:  # with a stride, a chunk may have no image token that is read
                without_mask = {name: value for name, value in arguments.items() if name != MASK}
                others.append((image, self.arguments(without_mask, "read"), projections))
        if tail is not None:
            others.append((text[:, :-tail], self.arguments(arguments, kind, slice(None, -tail)), None))
            text = text[:, -tail:]
        writer = WriteFirst(cache, layer, others) if others else cache
        if text.shape[1] == 0:  # a chunk of nothing but image tokens has no text to run
            if others:
                writer.write(image.device, layer.stock.self_attn.layer_idx)
            return text
        part = slice(None) if tail is None else slice(-tail, None)
        return layer.call(text, self.arguments(arguments, kind, part), writer)

    def _receive(self, states: torch.Tensor, mode: str) -> None:
        """Take the states that a layer of this mode has returned into the streams."""
        if mode in (JOINT, RESET):
            self.text = self.streams.pick(states, self.streams.text)
            if mode == JOINT:
                self.image = self.streams.pick(states, self.streams.image)
        else:
            self.text = states

    def _keep(self, states: torch.Tensor | None) -> None:
        if self.states is not None:
            self.states.append(self.streams.merge(self.text, self.image) if states is None else states)

    def _run_side_branch(self, arguments: dict[str, Any], cache_name: str) -> None:
        """The side branch on image states, at their own positions (Algorithm 1, phase 2), and the latent."""
        latent = self.side_branch.latent if self.plan.latent_stride else None
        side_layers = self.side_branch if latent is None else latent.layers
        if len(side_layers) > 0:
            self.image = self._run_side_layers(side_layers, self.image, arguments, cache_name)
        if latent is not None:
            self.latent = latent(self.image)
            if self.plan.latent_score:
                self._read_best(self.image)

    def _run_side_layers(
        self, side_layers: nn.ModuleList, image: torch.Tensor, arguments: dict[str, Any], cache_name: str
    ) -> torch.Tensor:
        if self.cache is not None:
            layers, depth = self.cache.layers, len(self.plan.modes)
            if self.record is None:
                layers[depth:] = [SideBranchKeys(layers[0]) for _ in side_layers]
            elif len(layers) - depth - 1 != len(side_layers):
                raise ValueError(
                    f"This cache was filled with a side branch of {len(layers) - depth - 1} layers, and the model now "
                    f"has one of {len(side_layers)}: start with a new cache after changing the side branch."
                )
        like = next(side_layers.parameters())  # PEFT trains in float32 on a base of half precision
        device = image.device if like.device.type == "meta" else like.device  # offloaded layers move their inputs
        branch, arguments = (
            image.to(device, like.dtype),
            {name: on(value, device) for name, value in arguments.items()},
        )
        for layer in side_layers:
            branch = layer(branch, **arguments, **{cache_name: self.cache})
            branch = branch[0] if isinstance(branch, tuple) else branch
        return branch.to(image.device, image.dtype)

    # -- after the last layer -----------------------------------------------------------------------------------------

    def _write_record(self) -> None:
        """Record on the cache which keys its layers hold now."""
        if self.cache is None:
            return
        tables, end = {kind: self.key_slots(kind) for kind in TABLES_OF}, self.past + self.length
        num_keys = {"joint": end, **{kind: table.shape[1] for kind, table in tables.items()}}
        if is_static(self.cache):  # the free places will hold text
            for kind in ("text", "context"):
                missing = max(0, self._num_places(kind) - num_keys[kind])
                later = torch.arange(end, end + missing, device=tables[kind].device)
                tables[kind] = torch.cat([tables[kind], later.expand(len(tables[kind]), -1)], dim=1)
        record = CacheRecord(
            self.plan,
            len(self.image_mask),
            length=end,
            last_image=self.last_image,
            plain=self.plain,
            tables=tables,
            num_keys=num_keys,
        )
        let_line_4_crop(self.cache, self.plan, num_keys, end)
        record.put_on(self.cache)
