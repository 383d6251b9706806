"""How much of its attention the text gives to the picture, layer by layer, and where in the picture it looks.

    one prefill with the fast attention kernels      q of every layer caught on the way, k read from the cache
        |
    per layer: softmax(q k^T) of the text tokens     one layer's map at a time; no kernel is switched
        |
    mass on image keys (paper section 3.1, Figure 2b); the last token's map over the picture

Under a routing a text layer has no image keys, so its mass is 0, and a context layer has those that the side branch
made. Axes: T tokens of the prompt, V image and X text tokens, H heads, N images.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from configuration_dpvr import CONTEXT, TEXT
from two_stream_dpvr import visible_keys


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
    decoder, plan = model.model.language_model, model.config.layer_plan()
    slots = torch.arange(ids.shape[1], device=ids.device)
    text, image = slots[~image_mask[0]], slots[image_mask[0]]
    cache = DynamicCache()
    queries = _prefill(model, inputs, cache)
    cos_sin = decoder.rotary_emb(queries[0], position_ids=text[None])
    mass, heat = [], {}
    for index, mode in enumerate(plan.modes):
        if mode == TEXT:
            mass.append(0.0)
            continue
        keys_at = torch.cat([image, text]) if mode == CONTEXT else slots
        rows = queries[index] if queries[index].shape[1] == len(text) else queries[index][:, text]
        keys = cache.layers[index].keys
        weights = _weights(decoder.layers[index].self_attn, rows, keys, cos_sin, text, keys_at)
        to_image = weights[:, :, torch.isin(keys_at, image)]  # (H, X, V)
        mass.append(to_image[:, text > image[0]].sum(-1).mean().item())
        heat[index] = to_image[:, -1].mean(0)
    layer = max(heat)
    return TextToImage(mass, layer, heat[layer].unflatten(0, (len(inputs["pixel_values"]), -1)).cpu())


def _prefill(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> list[torch.Tensor]:
    """Fill the cache, and return what each layer's q_proj gave, (1, T or X, H * head width)."""
    queries: list[torch.Tensor] = []

    def catch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        queries.append(output)

    layers = model.model.language_model.layers
    hooks = [layer.self_attn.q_proj.register_forward_hook(catch) for layer in layers]
    try:
        model(**inputs, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    return queries


def _weights(
    attention: nn.Module,
    rows: torch.Tensor,
    keys: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    queries_at: torch.Tensor,
    keys_at: torch.Tensor,
) -> torch.Tensor:
    """Attention weights float32 (H, X, K) of rows (1, X, H * head width), not yet rotated, to cached keys."""
    rows = rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (1, H, X, head width)
    rows, _ = apply_rotary_pos_emb(rows, rows, *cos_sin)
    keys = keys.repeat_interleave(rows.shape[1] // keys.shape[1], dim=1)
    scores = (rows @ keys.transpose(-1, -2)).float() * attention.scaling
    seen = visible_keys(queries_at[None], keys_at[None], None)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)[0]
