"""Twins of stock modules: the same class, weights and attributes with other parts, so that their own code runs.

    outer model's own forward      tower, projector, merging               on a twin whose decoder is
        decoder's own forward      cache, masks, rotary tables             a twin whose layers are
            RoutedLayer            run(layer, states, arguments, cache)    the stock layer, for some of the tokens

A layer's keys and values are made by itself: a stand-in for its cache takes what it writes and stops it there.

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
    from .versions_dpvr import argument_names, cache_name
except ImportError:
    from versions_dpvr import argument_names, cache_name

DECODER_NAMES = ("language_model", "text_model")  # what outer models call their decoder
MASK = "attention_mask"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


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
        vars(self).update(stock=layer, index=index, run=run, names=argument_names(type(layer).forward))
        self.cache_name = cache_name(type(layer).forward)

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
        arguments = {**{name: on(value, device) for name, value in arguments.items()}, MASK: None}
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


def on(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple of them, on a device."""
    if isinstance(value, tuple):
        return tuple(on(part, device) for part in value)
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


@torch.compiler.disable
def routed_twin(owner: nn.Module, run: Callable) -> nn.Module:
    """A twin of an outer model, whose decoder's layers are routed."""
    name, decoder = decoder_of(owner)
    layers = nn.ModuleList(RoutedLayer(layer, index, run) for index, layer in enumerate(decoder.layers))
    return twin(owner, **{name: twin(decoder, layers=layers)})
