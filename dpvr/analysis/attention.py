"""How much attention text tokens give to the picture, layer by layer, and to which patches.

    one prefill with the fast attention kernels      a hook records the input of each layer's attention
        |
    per layer: softmax(q k^T) of the text tokens     q from the layer's own projections, norms and rotary embedding, k
        |                                            from the cache; one layer's map is in memory at a time
    mass on image keys (paper section 3.1, Figure 2b); the last token's map over the picture

A text layer has no image keys, so its mass is 0; a context layer has the keys of the side branch's image states. All
of the project's measurements of attention use `attention_inputs` and `AttentionInputs.weights`.

Axes: B batch, T tokens of the prompt, V image and X text tokens, H heads, N images, Q queries, K keys.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from configuration_dpvr import CONTEXT, TEXT
from streams_dpvr import visible_keys
from twins_dpvr import Zeros, twin
from versions_dpvr import CACHE_NAMES, argument_names, cache_name

TAP = "dpvr_attention_inputs"


class TextToImage(NamedTuple):
    """Attention of text to the images of one prompt.

    Attributes:
        mass: per layer, the share of attention on image tokens; mean over heads and the text tokens after an image.
        layer: the deepest layer that reads the image.
        heat: float[N, V / N], that layer's attention of the prompt's last token to each patch, mean over heads.
        maps: float[L, N, V / N], the same in each of the L layers; 0 where the text does not see the image.
    """

    mass: list[float]
    layer: int
    heat: torch.Tensor
    maps: torch.Tensor


class AttentionInputs(NamedTuple):
    """Inputs of an attention kernel: query (B, H, Q, d), key (B, H / groups, K, d), and the scale of their product."""

    query: torch.Tensor
    key: torch.Tensor
    scaling: float

    def weights(self, seen: torch.Tensor, part: slice = slice(None)) -> torch.Tensor:
        """Attention weights float32 (B, H, Q, K) of some of the queries.

        Args:
            seen: bool (B or 1, 1, Q, K), which keys each of these queries attends to.
            part: which queries.
        """
        query, key = self.query[:, :, part], self.key
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, H / groups, groups, Q, d)
        scores = (grouped @ key[:, :, None].transpose(-1, -2)).flatten(1, 2) * self.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


class AttentionTapped(Exception):
    """Raised where the kernel would run; carries the kernel's inputs."""


def _tap(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> None:
    if more := [name for name in ("softcap", "s_aux") if options.get(name) is not None]:
        raise ValueError(
            f"The attention of {type(module).__name__} is more than a softmax of products ({', '.join(more)}), so it "
            "cannot be measured: use a decoder whose is not, such as Llama's or Qwen's."
        )
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise AttentionTapped(AttentionInputs(query, key, scaling))


AttentionInterface.register(TAP, _tap)


class HeldKeys:
    """A stand-in for a cache that returns keys (B, H, K, d) cached before, whatever is written."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def update(self, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.keys


def attention_inputs(
    layer: nn.Module, states: torch.Tensor, arguments: dict[str, Any], keys: torch.Tensor | None = None
) -> AttentionInputs:
    """Inputs of a stock decoder layer's attention kernel for states (B, Q, D).

    Args:
        layer: the decoder layer, or its attention module if the states are normed already.
        arguments: the layer's other arguments for these states, without a cache.
        keys: (B, H, K, d), to use in place of those computed from the states.

    Raises:
        ValueError: if the attention does not call its kernel through transformers.
    """
    attention = layer._modules.get("self_attn", layer)
    parts = {} if keys is None else {"k_proj": Zeros(keys.shape[-1]), "v_proj": Zeros(keys.shape[-1])}
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
    raise ValueError(
        f"{type(attention).__name__} does not take its kernel from transformers' AttentionInterface, so its attention "
        "cannot be measured: use a decoder that does, such as Llama's."
    )


@torch.no_grad()
def text_to_image_attention(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> TextToImage:
    """Measure a DPVR-LLaVA's attention to the pictures of one prompt under its current routing.

    Args:
        model: a `DpvrLlavaForConditionalGeneration`.
        inputs: what its processor made of one prompt with at least one picture, on the model's device.

    Raises:
        ValueError: for several prompts, padding, or a prompt without a picture.
    """
    ids = inputs["input_ids"]
    image_mask = ids == model.config.image_token_id
    if len(ids) != 1 or not image_mask.any() or not inputs["attention_mask"].all():
        padding = int((inputs["attention_mask"] == 0).sum())
        raise ValueError(
            f"These input_ids have shape {tuple(ids.shape)}, {int(image_mask.sum())} image tokens and {padding} "
            "padding tokens: attention is measured on one prompt at a time, with a picture and without padding."
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
    maps = torch.stack([heat.get(index, torch.zeros_like(heat[layer])) for index in range(len(mass))])
    maps = maps.unflatten(1, (len(inputs["pixel_values"]), -1)).cpu()
    return TextToImage(mass, layer, maps[layer], maps)


def _prefill(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: DynamicCache
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Fill the cache, and return the input states of each layer's attention, with its other arguments."""
    calls = []

    def record(module: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        arguments = dict(zip(argument_names(type(module).forward), args, strict=False)) | arguments
        states = arguments.pop("hidden_states")
        calls.append((states, {name: value for name, value in arguments.items() if name not in CACHE_NAMES}))

    layers = model.model.language_model.layers
    hooks = [layer.self_attn.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model(**inputs, **{cache_name(type(model).forward): cache}, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
