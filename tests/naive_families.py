"""A naive derivation of the method for any model family: one unpadded row, no cache, whole sequences, explicit masks.

    stock forward, watched by hooks      each layer's inputs and arguments for all T tokens
        h at the split                   from the hooks
        side branch                      the branch's layers on the image rows
        each deep layer                  the stock layer on all T rows of h, under a mask written out; text rows kept
        norm and head                    the stock forward again, h put before its norm

The stock layers stand for what they compute; streams, caches, selection of keys and order of work are not the
product's. `exact` lets stock norms, angles and softmax keep float64, which they round to float32 otherwise.

Axes: T tokens of the row, V image tokens, X text tokens, D width.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from configuration_dpvr import LayerPlan
from side_branch_dpvr import SideBranch

CACHES = ("cache", "past_key_values")
TABLES = ("position_embeddings", "position_embeddings_global", "position_embeddings_local")


@contextmanager
def exact() -> Iterator[None]:
    """Let the stock models compute in float64 throughout."""
    to, softmax = torch.Tensor.to, nn.functional.softmax

    def double(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def to_double(self, *args, **kwargs):
        return to(self, *map(double, args), **{name: double(value) for name, value in kwargs.items()})

    def softmax_in_double(*args, **kwargs):
        return softmax(*args, **{name: double(value) for name, value in kwargs.items()})

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "to", to_double))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(patch.object(nn.functional, "softmax", softmax_in_double))
        yield


class Watched:
    """The inputs and arguments of every layer in a stock forward on one row."""

    def __init__(self, model: nn.Module, decoder: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        self.layers, self.seen = list(decoder.layers), {}
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                hook = layer.register_forward_pre_hook(self._note(index), with_kwargs=True)
                stack.callback(hook.remove)
            self.logits = model(**inputs, use_cache=False).logits[0]

    def _note(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.seen[index] = args, dict(kwargs)

        return hook

    def states(self, index: int) -> torch.Tensor:
        """The states (1, T, D) before a layer."""
        args, kwargs = self.seen[index]
        return (args[0] if args else kwargs["hidden_states"]).clone()

    def run(
        self,
        index: int,
        layer: nn.Module,
        states: torch.Tensor,
        at: torch.Tensor,
        hidden: torch.Tensor | None,
        recurrent: bool = False,
    ) -> torch.Tensor:
        """A layer on states (1, N, D) of the tokens `at` (N,), with the arguments of layer `index`.

        Args:
            hidden: bool (T, T), True where a query must not see a key, beside what the stock mask hides.
        """
        _, kwargs = self.seen[index]
        kwargs = {name: value for name, value in kwargs.items() if name not in (*CACHES, "hidden_states")}
        for name in TABLES:
            if name in kwargs:
                kwargs[name] = tuple(table[..., at, :] for table in kwargs[name])
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., at]
        kwargs["attention_mask"] = None if recurrent else self._mask(kwargs.get("attention_mask"), at, hidden)
        out = layer(states, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _mask(self, stock: torch.Tensor | None, at: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        length = self.states(0).shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() if stock is None else stock[0, 0]
        assert seen.dtype == torch.bool and seen.shape == (length, length)
        if hidden is not None:
            seen = seen & ~hidden
        return seen[at][:, at][None, None]


@contextmanager
def latent_keys(
    latent: nn.Module | None, index: int, layer: nn.Module, branch: torch.Tensor, images: torch.Tensor
) -> Iterator[None]:
    """Put keys and values made from image states (1, V, D) in place of those that a layer has for image tokens."""
    if latent is None:
        yield
        return
    compressed = (branch / (branch.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()) @ latent.reduce.weight.T
    with ExitStack() as stack:
        for name, made in (("k_proj", latent.keys), ("v_proj", latent.values)):
            linear = made[str(index)]
            rows = compressed @ linear.weight.T + linear.bias
            hook = layer.self_attn._modules[name].register_forward_hook(
                lambda module, args, out, rows=rows: out.index_copy(1, images, rows.to(out.dtype))
            )
            stack.callback(hook.remove)
        yield


def naive_read(
    places: list[int], states: torch.Tensor, stride: int, score: str | None, worth: torch.Tensor | None = None
) -> list[int]:
    """Which image tokens of a row are read, by their number among them.

    Args:
        places: where in the row they stand, V of them.
        states: (V, D), what the latent is made of.
        worth: (V,), scores that take the place of those of the states.
    """
    if score is None and worth is None:
        return list(range(0, len(places), stride))
    read, pictures = [], []
    for number, place in enumerate(places):
        if number == 0 or place != places[number - 1] + 1:
            pictures.append([])
        pictures[-1].append(number)
    for picture in pictures:
        mean = sum(states[number] for number in picture) / len(picture)
        values = {}
        for number in picture:
            own = states[number]
            cosine = (own @ mean) / (own @ own).sqrt() / (mean @ mean).sqrt()
            values[number] = (own @ own).sqrt() if score == "norm" else 1 - cosine
            if worth is not None:
                values[number] = worth[number]
        ranked = sorted(picture, key=lambda number: (-float(values[number]), number))
        read += ranked[: (len(picture) + stride - 1) // stride]
    return sorted(read)


@torch.no_grad()
def naive_text_logits(
    model: nn.Module,
    decoder: nn.Module,
    inputs: dict[str, torch.Tensor],
    image: torch.Tensor,
    plan: LayerPlan,
    side_branch: SideBranch,
    recurrent: frozenset[int],
) -> torch.Tensor:
    """Logits (X, vocabulary) at the text tokens of one row under a layer plan.

    Args:
        model: the stock model, with sdpa attention.
        inputs: of the one row.
        image: bool (T,).
        recurrent: the layers without attention.
    """
    watched, split_layer, modes = Watched(model, decoder, inputs), plan.split_layer, plan.modes
    images, texts = image.nonzero().flatten(), (~image).nonzero().flatten()
    if len(images) == 0:
        return watched.logits
    everything = torch.arange(len(image))
    states = watched.states(split_layer)
    first = next(index for index in range(split_layer, len(modes)) if index not in recurrent)
    branch, latent = states[:, images], side_branch.latent if plan.latent_stride else None
    for layer in side_branch if latent is None else latent.layers:
        branch = watched.run(first, layer, branch, images, None)
    unread = image.clone()
    unread[images[naive_read(images.tolist(), branch[0], plan.latent_stride or 1, plan.latent_score)]] = False
    if any(mode != "text" for mode in modes[split_layer:]):
        states[:, images] = branch
    to_image = (~image)[:, None] & image[None, :]
    for index in range(split_layer, len(modes)):
        layer, mode, new = watched.layers[index], modes[index], states.clone()
        if index in recurrent and mode != "joint":
            new[:, texts] = watched.run(index, layer, states[:, texts], texts, None, recurrent=True)
        elif mode == "text":
            new[:, texts] = watched.run(index, layer, states, everything, to_image)[:, texts]
        else:
            with latent_keys(latent, index, layer, branch, images):
                hidden = None if latent is None or index == 0 else (~image)[:, None] & unread[None, :]
                out = watched.run(index, layer, states, everything, hidden, recurrent=index in recurrent)
            new = out if mode == "joint" else new.index_copy(1, texts, out[:, texts])
        states = new
    norm = next(decoder._modules[name] for name in ("norm", "embedding_norm") if name in decoder._modules)
    hook = norm.register_forward_pre_hook(lambda module, args: (states,))
    try:
        return model(**inputs, use_cache=False).logits[0, texts]
    finally:
        hook.remove()
