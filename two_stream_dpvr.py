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

Nothing of the base model is written again. Its own forward runs on twins (same class, weights and attributes) whose
decoder layers are `RoutedLayer`s; each picks its stream's tokens out of what the stock decoder made for all T:

    outer model's own forward      tower, projector, merging               on a twin whose decoder is
        decoder's own forward      cache, masks, rotary tables             a twin whose layers are routed
            RoutedLayer            states, tables, ids: its tokens; mask: the rows of its queries, the columns of its
                                   keys; then the stock layer runs

A context layer writes the image's keys before the text's own: attention does not care in which order keys lie as long
as the mask knows where each belongs (streams_dpvr.py). A chunk of text on a cache that has seen images takes a twin
that only picks columns, and a single token after a prompt without padding the stock decoder itself.

Axes: B batch, T all tokens of a chunk, X its text tokens, V its image tokens, D width, H heads, L layers.
"""

import copy
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

try:
    from .cache_dpvr import (
        KINDS,
        CacheRecord,
        ChunkNotes,
        SideBranchKeys,
        continue_cache,
        fit_static_layers,
        is_static,
        let_line_4_crop,
    )
    from .configuration_dpvr import CONTEXT, JOINT, RESET, DpvrLlavaConfig, LayerPlan
    from .images_dpvr import find_images
    from .streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from .versions_dpvr import CACHE_NAMES, LINE_4, argument_names, cache_in
except ImportError:
    from cache_dpvr import (
        KINDS,
        CacheRecord,
        ChunkNotes,
        SideBranchKeys,
        continue_cache,
        fit_static_layers,
        is_static,
        let_line_4_crop,
    )
    from configuration_dpvr import CONTEXT, JOINT, RESET, DpvrLlavaConfig, LayerPlan
    from images_dpvr import find_images
    from streams_dpvr import Streams, mask_of_keys, shifted, visible_keys
    from versions_dpvr import CACHE_NAMES, LINE_4, argument_names, cache_in

DECODER_NAMES = ("language_model", "text_model")  # what outer models call their decoder
SUPPORTED_DECODERS = ("llama", "mistral", "qwen2")
SUPPORTED_ATTENTION = ("eager", "sdpa", "flex_attention")
TOKEN_AXES = {"position_ids": -1, "token_type_ids": -1, "mm_token_type_ids": -1, "position_embeddings": -2}
MASK = "attention_mask"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
eagerly = torch.compiler.disable(recursive=False)  # sorting tokens is not compiled; the stock layers may be
KEYS_OF = ("text", "image", "context")  # kinds of layers whose keys are not simply all tokens' in order


# ---------------------------------------------------------------------------------------------------------------------
# Twins of stock modules


def twin(module: nn.Module, *, hooks: bool = True, **parts: nn.Module) -> nn.Module:
    """A module of the same class, weights and attributes with other parts; the module itself does not change.

    Without `hooks` it has none of those on the module: for a call that stops on the way.
    """
    new = copy.copy(module)
    if not hooks:
        vars(new).update({name: type(value)() for name, value in vars(module).items() if name in HOOKS})
    vars(new)["_modules"] = {**module._modules, **parts}
    for name, value in vars(module).items():  # a forward that accelerate has wrapped is bound to the module
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(new)[name] = MethodType(value.__func__, new)
        elif isinstance(value, partial) and value.args[:1] == (module,):
            vars(new)[name] = partial(value.func, new, *value.args[1:], **value.keywords)
    return new


class RoutedLayer(nn.Module):
    """In a decoder layer's place among its decoder's: `run` decides what the stock layer gets to see.

    Args:
        layer: the stock layer, not registered as a part: its weights have one owner.
        index: its place in the decoder.
        run: called with this, the states that the layer before gave, the layer's other arguments, and the cache.
    """

    def __init__(self, layer: nn.Module, index: int, run: Callable) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # the decoder may ask it for its attention's type
            if not name.startswith("_") and not callable(value):
                vars(self)[name] = value
        names = argument_names(type(layer).forward)
        vars(self).update(stock=layer, index=index, run=run, names=names)
        self.cache_name = next(name for name in CACHE_NAMES if name in names)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """As the stock layer's."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        hidden, cache = arguments.pop(self.names[0]), arguments.pop(self.cache_name, None)
        return self.run(self, hidden, arguments, cache)

    def call(
        self, states: torch.Tensor, arguments: dict[str, Any], cache: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The stock layer itself."""
        return self.stock(states, **arguments, **{self.cache_name: cache})

    def keys_and_values(
        self, states: torch.Tensor, arguments: dict[str, Any], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (B, H, N, head width) that the stock layer would cache for states (B, N, D).

        To be called within the layer's own call where something gathers its weights for that. No query is projected.
        """
        attention = self.stock.self_attn
        width = attention.q_proj.out_features // attention.config.num_attention_heads
        layer = twin(self.stock, self_attn=twin(attention, hooks=False, q_proj=Nothing(width)))
        arguments = {**{name: _on(value, device) for name, value in arguments.items()}, MASK: None}
        tap = KeyTap()
        try:
            type(layer).forward(layer, states.to(device), **arguments, **{self.cache_name: tap})
        except KeysTaken:
            pass
        return tap.taken


class Nothing(nn.Module):
    """In a projection's place: one head of zeros, for a layer whose queries nobody reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(()).expand(*states.shape[:-1], self.width)


class KeysTaken(Exception):
    """A layer has made its keys; nothing more is wanted of it."""


class KeyTap:
    """In a cache's place: takes the keys and values that a layer writes, and stops it there."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> None:
        self.taken = keys, values
        raise KeysTaken


class WriteFirst:
    """In a cache's place: before what a layer writes, writes the keys that it makes of other states.

    Args:
        cache: the cache itself, or None.
        layer: the layer that is given this for its cache.
        others: the other states (B, N, D), each with the layer's arguments for them.
    """

    def __init__(
        self, cache: Cache | None, layer: RoutedLayer, others: list[tuple[torch.Tensor, dict[str, Any]]]
    ) -> None:
        self.cache, self.layer, self.others = cache, layer, others

    def write(self, device: torch.device, layer_idx: int, *args: Any, **kwargs: Any) -> list:
        """Write the keys of the other states, and return them, each with its values."""
        made = [self.layer.keys_and_values(states, arguments, device) for states, arguments in self.others]
        for keys, values in made if self.cache is not None else ():
            self.cache.update(keys, values, layer_idx, *args, **kwargs)
            if self.cache.offloading:  # more keys of this layer follow
                self.cache.layers[layer_idx].prefetch()
        return made

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Cache.update`."""
        made = self.write(keys.device, layer_idx, *args, **kwargs)
        if self.cache is not None:
            return self.cache.update(keys, values, layer_idx, *args, **kwargs)
        both = zip(*made, (keys, values), strict=True)
        return tuple(torch.cat(parts, dim=-2) for parts in both)


def _on(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of them, on a device."""
    if isinstance(value, tuple):
        return tuple(_on(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def decoder_of(owner: nn.Module) -> tuple[str, nn.Module]:
    """The decoder in an outer model, and its name there.

    Raises:
        ValueError: if there is none.
    """
    for name in DECODER_NAMES:
        decoder = owner._modules.get(name)
        if decoder is not None and isinstance(decoder._modules.get("layers"), nn.ModuleList):
            return name, decoder
    raise ValueError(
        f"Expected a model with a decoder called {' or '.join(DECODER_NAMES)}; got {type(owner).__name__}. Remedy: a "
        "vision-language model of transformers, such as LLaVA."
    )


def stock_class(owner: nn.Module) -> type:
    """The library's class of an outer model, whose forward routes nothing."""
    return owner.stock if hasattr(type(owner), "stock") else type(owner)


@torch.compiler.disable
def routed_twin(owner: nn.Module, run: Callable) -> nn.Module:
    """A twin of an outer model, whose decoder's layers are routed."""
    name, decoder = decoder_of(owner)
    layers = nn.ModuleList(RoutedLayer(layer, index, run) for index, layer in enumerate(decoder.layers))
    return twin(owner, **{name: twin(decoder, layers=layers)})


# ---------------------------------------------------------------------------------------------------------------------
# The method: a chunk with images, layer by layer


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
        branch = image.to(like.device, like.dtype)
        arguments = {name: _on(value, like.device) for name, value in arguments.items()}
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


# ---------------------------------------------------------------------------------------------------------------------
# The method: a chunk of text after images


def text_after_images(
    layer: RoutedLayer, hidden: torch.Tensor, arguments: dict[str, Any], cache: Cache
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """A layer of a chunk of text on a cache that has seen images: all tokens, and the columns of its kind's keys."""
    record = CacheRecord.find(cache)
    kind, full = KINDS[record.plan.modes[layer.index]], arguments.get(MASK)
    if record.step.states is not None:
        record.step.states.append(hidden)
    if kind != "joint":
        arguments = {**arguments, MASK: _columns(record, kind, full, hidden.shape[1])}
    return layer.call(hidden, arguments, cache)


def _columns(record: CacheRecord, kind: str, full: Any, length: int) -> Any:
    for stock, of_kind, mask in record.step.masks:
        if stock is full and of_kind == kind:
            return mask
    places = record.step.places[kind]
    if full is not None:
        mask = mask_of_keys(full, None, places)
    else:  # one token, which sees all there is but padding slots
        mask = None if record.plain else (places >= 0)[:, None, None, :].expand(-1, -1, length, -1)
    record.step.masks.append((full, kind, mask))
    return mask


def _text_twin(owner: nn.Module) -> nn.Module:
    """The twin that runs text after images; it stays on the outer model, so that a compiled step finds it again."""
    made = vars(owner).get("_text_twin")
    if made is None or not _is_current(made, owner):
        made = vars(owner)["_text_twin"] = routed_twin(owner, text_after_images)
    return made


def _is_current(made: nn.Module, owner: nn.Module) -> bool:
    """Whether no part of the outer model was replaced since its twin was made."""
    name, decoder = decoder_of(owner)
    twins = made._modules[name]
    pairs = [(made._modules, owner._modules, name), (twins._modules, decoder._modules, "layers")]
    if any(mine.keys() != its.keys() or mine[k] is not its[k] for mine, its, but in pairs for k in mine if k != but):
        return False
    layers = twins.layers
    return len(layers) == len(decoder.layers) and all(
        routed.stock is layer for routed, layer in zip(layers, decoder.layers, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The method: an outer model's forward


class RoutedModel:
    """Mixed in before a stock model without its head by `routed_model`.

    Attributes:
        stock: the library's class.
        plan: what every decoder layer does; to be given by the class that inherits.
        branch: the side branch that the plan reads; likewise.
    """

    stock: type
    plan: LayerPlan
    branch: nn.ModuleList


@lru_cache
def routed_model(stock: type) -> type:
    """A class with the name of a stock model without its head, whose forward runs a plan; see `routed_forward`."""
    names = argument_names(stock.forward)

    @can_return_tuple
    @wraps(stock.forward)
    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        return routed_forward(self, stock.forward, self.branch, self.plan, arguments)

    own = {"forward": forward, "stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (RoutedModel, stock), own)


def routed_forward(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    arguments: dict[str, Any],
    *,
    make_pass: Callable[..., TwoStreamPass] = TwoStreamPass,
) -> ModelOutput:
    """Run the forward of a vision-language model without its head under a layer plan.

    Args:
        owner: tower, projector and decoder; nothing in it is changed.
        stock_forward: its forward as the library has it, called on the model or on a twin.
        side_branch: decoder layers of its shapes, whose `layer_idx` follow the decoder's.
        plan: what every decoder layer does.
        arguments: of the stock forward, by name, and `kept_logits`: the tokens whose states are wanted, as
            `logits_to_keep`. With n > 0, only the last n query in the last layer; what stands at others is not theirs.
        make_pass: what takes a chunk with images through the layers.

    Returns:
        What the stock forward returns. Past the split image tokens are context, not queries: their last_hidden_state
        is the side branch's output, and predicts nothing, as do hidden_states there until a joint layer moves it on.

    Raises:
        ValueError: for image tokens and pixels that do not match, masks of a wrong shape, what a routing does not
            support, and a cache that was filled under another plan; the message names expected, got and remedy.
    """
    arguments = dict(arguments)
    kept, cache = arguments.pop("kept_logits", 0), cache_in(arguments)
    image_mask = find_images(owner, arguments)
    record = continue_cache(cache, plan)
    if plan.is_vanilla or (image_mask is None and record is None):
        output = stock_forward(owner, **arguments)
        if image_mask is not None and cache_in(output) is not None:
            CacheRecord(plan, len(image_mask)).put_on(cache_in(output))  # no other plan goes on with it
        output.last_hidden_state = _with_gradient(output.last_hidden_state, side_branch)
        return output
    _check(owner, plan, arguments, cache)
    if image_mask is None:
        return _text_chunk(owner, stock_forward, record, arguments, cache)
    return _image_chunk(owner, stock_forward, side_branch, plan, arguments, image_mask, record, kept, make_pass)


@eagerly
def _image_chunk(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    side_branch: nn.ModuleList,
    plan: LayerPlan,
    arguments: dict[str, Any],
    image_mask: torch.Tensor,
    record: CacheRecord | None,
    kept: int | torch.Tensor,
    make_pass: Callable[..., TwoStreamPass],
) -> ModelOutput:
    """A chunk with images, on a twin of its own; what it calls may be compiled, it may not."""
    if arguments.get("use_cache") is None and owner.training:
        arguments["use_cache"] = False
    mask, wanted = arguments.get(MASK), _states_wanted(owner, arguments)
    this = make_pass(
        side_branch,
        plan,
        image_mask,
        record=record,
        padded=None if mask is None else (mask == 0).any() if _is_flat(mask) else torch.tensor(True),
        tail=None if wanted else _text_tail(kept, image_mask),
        keep_states=bool(wanted),
    )
    _text_twin(owner)
    made = routed_twin(owner, this)
    output = stock_forward(made, **arguments)
    for name, value in vars(made).items():  # what the stock forward notes on its model, as rope_deltas
        if not name.startswith("_") and name in vars(owner) and vars(owner)[name] is not value and not callable(value):
            vars(owner)[name] = value
    return _with_states(output, this.states, wanted)


def _text_chunk(
    owner: nn.Module,
    stock_forward: Callable[..., ModelOutput],
    record: CacheRecord,
    arguments: dict[str, Any],
    cache: Cache,
) -> ModelOutput:
    """A chunk of text on a cache that has seen images; a single token asks nothing of the device."""
    ids, mask, static = arguments.get("input_ids"), arguments.get(MASK), is_static(cache)
    length = (ids if ids is not None else arguments["inputs_embeds"]).shape[1]
    flat = mask is None or _is_flat(mask)
    if not static and length > 1 and record.plain and mask is not None:
        record.plain = flat and bool(mask.all())
    config = decoder_of(owner)[1].config
    if length == 1 and flat and not static and config._attn_implementation == "sdpa":
        if record.plain:
            return stock_forward(owner, **{**arguments, MASK: None})
        if mask is not None and not set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            arguments[MASK] = mask.bool()[
                :, None, None, :
            ]  # as the stock decoder makes it, which would ask for padding
    places = record.tables
    if static:
        if LINE_4 and arguments.get("cache_position") is None:  # else the stock decoder asks for it
            arguments["cache_position"] = cache.get_seq_length() + torch.arange(length, device=places["text"].device)
    else:
        past = cache.get_seq_length()
        new = torch.arange(past, past + length, device=places["text"].device).expand(len(places["text"]), -1)
        places = {kind: torch.cat([record.slots(kind, past), new], dim=1) for kind in ("text", "context")}
    wanted = _states_wanted(owner, arguments)
    record.step = ChunkNotes(places, states=[] if wanted else None)
    output = stock_forward(_text_twin(owner), **arguments)
    states, record.step = record.step.states, None
    return _with_states(output, states, wanted)


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def _states_wanted(owner: nn.Module, arguments: dict[str, Any]) -> bool | int | list[int]:
    """Take the wish for hidden states from the arguments: the stock recorder would see one stream, not all tokens."""
    wanted = arguments.get("output_hidden_states")
    wanted = owner.config.output_hidden_states if wanted is None else wanted
    arguments |= {"output_hidden_states": False, "return_dict": True}
    return wanted


def _with_states(
    output: ModelOutput, states: list[torch.Tensor] | None, wanted: bool | int | list[int]
) -> ModelOutput:
    if states is not None:
        states = [*states, output.last_hidden_state]
        if not isinstance(wanted, bool):  # from transformers 5.24 on some may be chosen
            chosen = {at % len(states) for at in ([wanted] if isinstance(wanted, int) else wanted)}
            states = [state if at in chosen else None for at, state in enumerate(states)]
        output.hidden_states = tuple(states)
    return output


def _text_tail(kept: int | torch.Tensor, image_mask: torch.Tensor) -> int | None:
    """How many of the last tokens hold all that are kept, if none of these is an image token; else None."""
    length = image_mask.shape[1]
    tail = length - int((kept % length).min()) if isinstance(kept, torch.Tensor) else min(kept, length)
    return None if tail == 0 or bool(image_mask[:, -tail:].any()) else tail


def _with_gradient(states: torch.Tensor, side_branch: nn.ModuleList) -> torch.Tensor:
    """States of a batch without pictures, tied to the side branch that they did not use: its gradient is zero.

    A trainer that meets such a batch would otherwise find nothing to differentiate.
    """
    trained = [weight for weight in side_branch.parameters() if weight.requires_grad]
    if not trained or not torch.is_grad_enabled() or states.requires_grad:
        return states
    return states + 0.0 * sum(weight.flatten()[0] for weight in trained).to(states)


# ---------------------------------------------------------------------------------------------------------------------
# What the method does not run on


def check_support(config: DpvrLlavaConfig) -> None:
    """Raise ValueError for a decoder or an attention implementation that the method does not run on."""
    text = config.text_config
    if text.model_type not in SUPPORTED_DECODERS:
        raise ValueError(
            f"Expected a decoder of type {SUPPORTED_DECODERS}; got {text.model_type!r}. Remedy: use a LLaVA on one of "
            "these."
        )
    if (
        text.model_type != "llama"
        and text.sliding_window is not None
        and (text.model_type != "qwen2" or text.use_sliding_window)
    ):
        raise ValueError(
            f"Expected a decoder with full attention; got sliding_window={text.sliding_window}. Remedy: set it to "
            "None."
        )
    if not 0 <= config.image_token_id < text.vocab_size:
        raise ValueError(
            f"Expected image_token_id, the id of '<image>', below the vocabulary size {text.vocab_size}; got "
            f"{config.image_token_id}. Remedy: set image_token_id in the config to the tokenizer's id of '<image>'."
        )
    for part in (config, text):
        if "flash" in (implementation := str(part._attn_implementation)):
            raise ValueError(_unsupported_attention(implementation))


def _unsupported_attention(implementation: str) -> str:
    return (
        f"Expected attn_implementation to be one of {SUPPORTED_ATTENTION}; got {implementation!r}. Remedy: use "
        "'sdpa', which runs the flash kernel wherever no mask is needed; a context layer needs one, which "
        "flash_attention_2 does not take."
    )


def _check(owner: nn.Module, plan: LayerPlan, arguments: dict[str, Any], cache: Cache | None) -> None:
    """Refuse what would be wrong under a plan, before any work."""
    decoder = decoder_of(owner)[1]
    implementation = decoder.config._attn_implementation
    if implementation not in SUPPORTED_ATTENTION:
        raise ValueError(_unsupported_attention(implementation))
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", MASK))
    tokens = ids if ids is not None else embeds
    on_cpu = tokens.device.type == "cpu"
    if implementation == "flex_attention" and on_cpu and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ValueError(
            "Expected a GPU or a CPU with AVX-512 for flex_attention, whose compiled kernel gives wrong and changing "
            f"results on others; got {torch.backends.cpu.get_cpu_capability()}. Remedy: attn_implementation='sdpa'."
        )
    if arguments.get("output_attentions") or owner.config.output_attentions:
        raise ValueError(
            f"Expected output_attentions=False under the plan {plan}, whose layers differ in their keys; got True. "
            "Remedy: set_routing('none'), or disable_adapter()."
        )
    if decoder.training and any(layer.gradient_checkpointing for layer in decoder.layers):
        raise ValueError(
            "Expected gradient checkpointing to be off; got it on. Remedy: gradient_checkpointing=False. It saves "
            "nothing here: no activation is kept below the first layer that reads the trainable side branch."
        )
    if mask is not None and _is_flat(mask) and not is_static(cache):
        expected = (tokens.shape[0], (0 if cache is None else cache.get_seq_length()) + tokens.shape[1])
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"Expected an attention_mask of shape (batch, cached + new tokens) = {expected}; got "
                f"{tuple(mask.shape)}. Remedy: pass the processor's mask, extended by ones for cached answers."
            )
