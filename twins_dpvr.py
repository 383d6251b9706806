"""Twins of stock modules: copies with the same class, weights and attributes, in which some submodules are replaced.

    outer model's own forward      tower, projector, merging               on a twin whose decoder is
        decoder's own forward      cache, masks, rotary embeddings         a twin whose layers are
            RoutedLayer            run(layer, states, arguments, cache)    calls of the stock layer, for some tokens

So the library's code runs under a layer plan without being changed or written again. Keys and values for other tokens
than the queries are made by the stock layer too: it gets a `KeyTap` for its cache, which takes them and ends the call.

Axes: B batch, N tokens, D width, H heads.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

try:
    from .decoders_dpvr import decoder_of, layer_kinds
    from .streams_dpvr import Streams
    from .versions_dpvr import argument_names, cache_name
except ImportError:
    from decoders_dpvr import decoder_of, layer_kinds
    from streams_dpvr import Streams
    from versions_dpvr import argument_names, cache_name

MASK = "attention_mask"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def twin(module: nn.Module, *, hooks: bool = True, **parts: nn.Module) -> nn.Module:
    """A shallow copy of a module in which some submodules are replaced by `parts`; the module does not change.

    Args:
        hooks: False: without the module's hooks, for a call that ends before its outputs are made.
    """
    new = copy.copy(module)
    if not hooks:
        vars(new).update({name: type(value)() for name, value in vars(module).items() if name in HOOKS})
    vars(new)["_modules"] = {**module._modules, **parts}
    for name, value in vars(module).items():  # accelerate binds a wrapped forward to the module: bind it to the twin
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(new)[name] = MethodType(value.__func__, new)
        elif isinstance(value, partial) and value.args[:1] == (module,):
            vars(new)[name] = partial(value.func, new, *value.args[1:], **value.keywords)
    return new


class RoutedLayer(nn.Module):
    """Stands for a decoder layer in its decoder, and leaves to `run` for which tokens the stock layer is called.

    Args:
        layer: the stock layer; not registered as a submodule, as its weights already belong to the model.
        index: its place in the decoder.
        kind: that of its attention, or `RECURRENT`.
        run: called with this, the states from the layer before, the layer's other arguments, and the cache.
    """

    def __init__(self, layer: nn.Module, index: int, kind: str, run: Callable) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # the decoder reads attributes of its layers, as attention_type
            if not name.startswith("_") and not callable(value):
                vars(self)[name] = value
        vars(self).update(stock=layer, index=index, kind=kind, run=run, names=argument_names(type(layer).forward))
        self.cache_name = cache_name(type(layer).forward)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Called as the stock layer is."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        hidden, cache = arguments.pop(self.names[0]), arguments.pop(self.cache_name, None)
        return self.run(self, hidden, arguments, cache)

    def call(
        self, states: torch.Tensor, arguments: dict[str, Any], cache: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Call the stock layer."""
        return self.stock(states, **arguments, **{self.cache_name: cache})

    def keys_and_values(
        self,
        states: torch.Tensor,
        arguments: dict[str, Any],
        device: torch.device,
        projections: dict[str, nn.Module] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (B, H, N, head width) that the stock layer would cache for states (B, N, D).

        With `projections`, of a latent, states are (B, N, r) and the layer's norm is left out: they replace k_proj and
        v_proj, and the layer's k-norm and rotary embedding follow. No query is projected. If the layer's weights are
        sharded or offloaded, call it within the layer's own call, when they are there.
        """
        attention, parts = self.stock.self_attn, {}
        if "q_proj" in attention._modules:  # else queries are projected too, together with other things
            parts["q_proj"] = Zeros(attention.q_proj.out_features // attention.config.num_attention_heads)
        of_layer = {} if projections is None else {"input_layernorm": nn.Identity()}
        attention = twin(attention, hooks=False, **parts, **projections or {})
        layer = twin(self.stock, self_attn=attention, **of_layer)
        arguments = {**{name: on(value, device) for name, value in arguments.items()}, MASK: None}
        tap = KeyTap()
        try:
            type(layer).forward(layer, states.to(device), **arguments, **{self.cache_name: tap})
        except KeysTaken:
            pass
        return tap.taken


class Zeros(nn.Module):
    """Replaces a projection whose output is not needed: zeros (B, N, width), without computing or storing them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(()).expand(*states.shape[:-1], self.width)


class KeysTaken(Exception):
    """Ends a layer's call once its keys and values are made."""


class KeyTap:
    """Passed to a layer as its cache: takes the keys and values that the layer writes, and ends its call."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> None:
        self.taken = keys, values
        raise KeysTaken


class WriteFirst:
    """Passed to a layer as its cache: writes the keys and values of other states before those of the layer's call.

    Args:
        cache: the real cache, or None.
        layer: the layer that gets this.
        others: the other states (B, N, D), each with the layer's arguments for them, and the projections of a latent
            or None.
    """

    def __init__(
        self, cache: Cache | None, layer: RoutedLayer, others: list[tuple[torch.Tensor, dict, dict | None]]
    ) -> None:
        self.cache, self.layer, self.others = cache, layer, others

    def write(self, device: torch.device, layer_idx: int, *args: Any, **kwargs: Any) -> list:
        """Write the keys and values of the other states, and return them in pairs."""
        made = [
            self.layer.keys_and_values(states, arguments, device, projections)
            for states, arguments, projections in self.others
        ]
        for keys, values in made if self.cache is not None else ():
            self.cache.update(keys, values, layer_idx, *args, **kwargs)
            if self.cache.offloading:  # update sends the layer off, and more keys of it follow
                self.cache.layers[layer_idx].prefetch()
        return made

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called as `Cache.update` is."""
        made = self.write(keys.device, layer_idx, *args, **kwargs)
        if self.cache is not None:
            return self.cache.update(keys, values, layer_idx, *args, **kwargs)
        both = zip(*made, (keys, values), strict=True)
        return tuple(torch.cat(parts, dim=-2) for parts in both)


class WriteMerged:
    """Passed to layer 0 as its cache, where text reads a latent: writes all tokens' keys in their own order."""

    def __init__(
        self,
        cache: Cache | None,
        layer: RoutedLayer,
        states: torch.Tensor,
        arguments: dict[str, Any],
        projections: dict[str, nn.Module],
        streams: Streams,
    ) -> None:
        self.cache, self.layer, self.streams = cache, layer, streams
        self.image = states, arguments, projections

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called as `Cache.update` is, with the text's."""
        made = self._image(keys.device)
        keys, values = (
            self.streams.merge(text.transpose(1, 2).flatten(2), image.transpose(1, 2).flatten(2))
            .unflatten(2, (text.shape[1], -1))
            .transpose(1, 2)
            for text, image in zip((keys, values), made, strict=True)
        )
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, layer_idx, *args, **kwargs)

    def write(self, device: torch.device) -> None:
        """Write the image's alone, of a chunk without text."""
        if self.cache is not None:
            self.cache.update(*self._image(device), self.layer.stock.self_attn.layer_idx)

    def _image(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        states, arguments, projections = self.image
        return self.layer.keys_and_values(states, arguments, device, projections)


def on(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of tensors, on a device; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(on(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@torch.compiler.disable
def routed_twin(owner: nn.Module, run: Callable) -> nn.Module:
    """A twin of a vision-language model without its head, in which `run` runs the layers of the decoder."""
    name, decoder = decoder_of(owner)
    return twin(owner, **{name: routed_decoder(decoder, run)})


def routed_decoder(decoder: nn.Module, run: Callable) -> nn.Module:
    """A twin of a decoder whose layers are run by `run`."""
    kinds = layer_kinds(decoder.config)
    layers = nn.ModuleList(
        RoutedLayer(layer, index, kind, run)
        for index, (layer, kind) in enumerate(zip(decoder.layers, kinds, strict=True))
    )
    return twin(decoder, layers=layers)
