"""How much of its attention the text gives to the picture, layer by layer, and where in the picture it looks.

    one prefill with the fast attention kernels      what each layer's attention is given, caught on the way
        |
    per layer: softmax(q k^T) of the text tokens     its own projections, norms and rotary embedding on that, and the
        |                                            cached keys; one layer's map at a time, no kernel is switched
    mass on image keys (paper section 3.1, Figure 2b); the last token's map over the picture

Under a routing a text layer has no image keys, so its mass is 0, and a context layer has those that the side branch
made. `attention_weights` is what all of the project's measurements of attention are made with. Axes: B batch, T tokens
of the prompt, V image and X text tokens, H heads, N images, Q queries, K keys.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from configuration_dpvr import CONTEXT, TEXT
from streams_dpvr import visible_keys
from twins_dpvr import Nothing, twin
from versions_dpvr import CACHE_NAMES, argument_names, cache_name

TAP = "dpvr_attention_inputs"


class TextToImage(NamedTuple):
    """Attention of text to the images of one prompt.

    Attributes:
        mass: per layer, the share of attention on image tokens; mean over heads and the text tokens after an image.
        layer: the deepest layer that reads the image.
        heat: float[N, V / N], that layer's attention of the prompt's last token to each patch, mean over heads.
    """

    mass: list[float]
    layer: int
    heat: torch.Tensor


class AttentionInputs(NamedTuple):
    """What an attention kernel gets: query (B, H, Q, d), key (B, H / groups, K, d), their product's factor."""

    query: torch.Tensor
    key: torch.Tensor
    scaling: float

    def weights(self, seen: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Attention weights float32 (B, H, Q of the part, K); `seen` bool (B or 1, 1, Q of the part, K)."""
        query, key = self.query[:, :, part], self.key
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, H / groups, groups, Q, d)
        scores = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2) * self.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


class AttentionTapped(Exception):
    """An attention module has made its inputs; its output is not wanted."""


def _tap(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scaling: float, **__: Any
) -> None:
    raise AttentionTapped(AttentionInputs(query, key, scaling))


AttentionInterface.register(TAP, _tap)


class HeldKeys:
    """In a cache's place: gives keys (B, H, K, d) that were cached before, whatever is written."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.keys


def attention_inputs(
    layer: nn.Module, states: torch.Tensor, arguments: dict[str, Any], keys: torch.Tensor | None = None
) -> AttentionInputs:
    """What the kernel of a stock decoder layer would get for states (B, Q, D).

    Args:
        layer: the decoder layer, or its attention module with states that are normed already.
        arguments: the layer's own for these states, without a cache.
        keys: (B, H, K, d) in place of those that it would make of the states.
    """
    attention = layer._modules.get("self_attn", layer)
    parts = {} if keys is None else {"k_proj": Nothing(keys.shape[-1]), "v_proj": Nothing(keys.shape[-1])}
    tapped = twin(attention, hooks=False, **parts)
    tapped.config = copy.copy(attention.config)
    tapped.config._attn_implementation = TAP
    module = tapped if layer is attention else twin(layer, self_attn=tapped)
    held = None if keys is None else HeldKeys(keys)
    arguments = {**arguments, "attention_mask": None, cache_name(type(layer).forward): held}
    try:
        type(layer).forward(module, states, **arguments)
    except AttentionTapped as tap:
        return tap.args[0]
    raise ValueError(f"Expected an attention that asks transformers for its kernel; got {type(attention).__name__}.")


@torch.no_grad()
def text_to_image_attention(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> TextToImage:
    """Measure a DPVR-LLaVA's attention to the pictures of one prompt under its configured routing.

    Args:
        model: a `DpvrLlavaForConditionalGeneration`.
        inputs: what its processor made of one prompt with at least one picture, on the model's device.

    Raises:
        ValueError: for several prompts, padding, or a prompt without a picture.
    """
    ids = inputs["input_ids"]
    image_mask = ids == model.config.image_token_id
    if len(ids) != 1 or not image_mask.any() or not inputs["attention_mask"].all():
        raise ValueError(
            f"Expected one unpadded prompt with a picture; got input_ids of shape {tuple(ids.shape)} with "
            f"{int(image_mask.sum())} image tokens. Remedy: measure prompts one by one."
        )
    layers, plan = model.model.language_model.layers, model.config.layer_plan()
    slots = torch.arange(ids.shape[1], device=ids.device)
    text, image = slots[~image_mask[0]], slots[image_mask[0]]
    cache = DynamicCache()
    calls = _prefill(model, inputs, cache)
    mass, heat = [], {}
    for index, mode in enumerate(plan.modes):
        if mode == TEXT:
            mass.append(0.0)
            continue
        keys_at = torch.cat([image, text]) if mode == CONTEXT else slots
        queries_at = text if mode == CONTEXT else slots
        states, arguments = calls[index]
        found = attention_inputs(layers[index].self_attn, states, arguments, cache.layers[index].keys)
        weights = found.weights(visible_keys(queries_at[None], keys_at[None]))[0]  # (H, Q, K)
        to_image = weights[:, torch.isin(queries_at, text)][:, :, torch.isin(keys_at, image)]  # (H, X, V)
        mass.append(to_image[:, text > image[0]].sum(-1).mean().item())
        heat[index] = to_image[:, -1].mean(0)
    layer = max(heat)
    return TextToImage(mass, layer, heat[layer].unflatten(0, (len(inputs["pixel_values"]), -1)).cpu())


def _prefill(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: DynamicCache
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Fill the cache, and return the states that each layer's attention was given, with its other arguments."""
    calls = []

    def catch(module: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        arguments = dict(zip(argument_names(type(module).forward), args, strict=False)) | arguments
        states = arguments.pop("hidden_states")
        calls.append((states, {name: value for name, value in arguments.items() if name not in CACHE_NAMES}))

    layers = model.model.language_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(catch, with_kwargs=True) for layer in layers]
    try:
        model(**inputs, **{cache_name(type(model).forward): cache}, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
