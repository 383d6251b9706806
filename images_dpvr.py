"""Which tokens of a prompt are images, and whether the pixels that come with them are theirs.

Axes: B batch, T tokens of a chunk, N images, V image tokens, D width.
"""

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

try:
    from .versions_dpvr import cache_in
except ImportError:
    from versions_dpvr import cache_in

MARKS = ("image_token_id", "video_token_id")
FIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")  # they give every image the same number of tokens


def image_marks(owner: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """bool (B, T), True where an image's or a video's token stands, or its embedding."""
    marks = [getattr(owner.config, name, None) for name in MARKS]
    marks = [mark for mark in marks if mark is not None]
    if input_ids is not None:
        return torch.stack([input_ids == mark for mark in marks]).any(0)
    embed = owner.get_input_embeddings()
    table = embed(torch.tensor(marks, device=inputs_embeds.device))
    return torch.stack([(inputs_embeds == row).all(-1) for row in table]).any(0)


def find_images(owner: nn.Module, arguments: dict[str, Any]) -> torch.Tensor | None:
    """The image tokens of a chunk, bool (B, T), or None without any; a decoded token is taken for text, unread.

    Args:
        owner: the model whose forward gets `arguments`.

    Raises:
        ValueError: for image tokens and pixels that do not match, and pixels that are not finite.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("Expected exactly one of input_ids and inputs_embeds; got both or neither. Remedy: drop one.")
    tokens = ids if ids is not None else embeds
    pixels = [value for name, value in arguments.items() if name.startswith("pixel_values") and value is not None]
    encoded = [value for value in (arguments.get("mm_encoder_outputs") or {}).values() if value is not None]
    if not pixels and not encoded and (ids is None or (tokens.shape[1] == 1 and cache_in(arguments) is not None)):
        return None
    image_mask = image_marks(owner, ids, embeds)
    num_tokens = int(image_mask.sum())
    if num_tokens == 0 and not pixels and not encoded:
        return None
    if num_tokens == 0 or not (pixels or encoded):
        given = sum(map(len, pixels)) + sum(len(output.pooler_output) for output in encoded)
        marks = " or ".join(str(getattr(owner.config, name)) for name in MARKS if hasattr(owner.config, name))
        raise ValueError(
            f"Expected image tokens and pixels together; got {num_tokens} image tokens (id {marks}) and {given} "
            "images. Remedy: make both with the processor, one <image> mark per image."
        )
    _check_pixels(pixels)
    if (per_image := _tokens_of_images(owner.config, arguments)) is not None:
        _check_counts(image_mask.sum(1).tolist(), per_image)
    return image_mask


def tokens_per_image(config: PretrainedConfig, arguments: dict[str, Any]) -> int | None:
    """How many tokens every image of a LLaVA takes, from its tower's shape; None where images differ in that.

    Not from `image_seq_length`, which configs often leave at its default.
    """
    vision = config.vision_config
    if vision.model_type not in FIXED_TOWERS or hasattr(config, "image_grid_pinpoints"):
        return None
    patches = (vision.image_size // vision.patch_size) ** 2
    strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return patches + (vision.model_type == "clip_vision_model") - (strategy == "default")


def images_per_row(image_mask: torch.Tensor, tokens: int) -> list[int]:
    """How many images each row of bool (B, T) holds, of `tokens` tokens each."""
    return (image_mask.sum(1) // tokens).tolist()


def _tokens_of_images(config: PretrainedConfig, arguments: dict[str, Any]) -> list[int] | None:
    """How many tokens each image takes, where that is known: from its features, or from a tower of fixed shape.

    None for one piece of features, of a prefill in chunks, which may cut through images.
    """
    encoded, pixels = (arguments.get("mm_encoder_outputs") or {}).get("image"), arguments.get("pixel_values")
    if encoded is not None:
        lengths = [len(features) for features in encoded.pooler_output]
        return lengths if len(lengths) > 1 else None
    tokens = tokens_per_image(config, arguments)
    if tokens is None or pixels is None:
        return None
    if pixels.ndim != 4:
        raise ValueError(
            f"Expected pixel_values of shape (images, channels, height, width); got {tuple(pixels.shape)}. Remedy: "
            "use the processor of this model."
        )
    return [tokens] * len(pixels)


def _check_counts(counts: list[int], per_image: list[int]) -> None:
    """Raise ValueError unless the rows' image tokens, `counts`, are those of whole images."""
    ends = set(torch.tensor([0, *per_image]).cumsum(0).tolist())
    rows = torch.tensor(counts).cumsum(0).tolist()
    if rows[-1] != sum(per_image) or not ends.issuperset(rows):
        raise ValueError(
            f"Expected as many image tokens as image features; got tokens per row: {counts}, features: "
            f"{sum(per_image)} ({len(per_image)} images of {sorted(set(per_image))}). Remedy: use the processor of "
            "this model, one image per <image> mark, and do not truncate inside an image."
        )


def _check_pixels(pixels: list[torch.Tensor]) -> None:
    for values in pixels:
        finite = int(torch.isfinite(values).sum())
        if finite != values.numel():
            raise ValueError(
                f"Expected finite pixel_values; got {values.numel() - finite} of {values.numel()} that are NaN or "
                "infinite. Remedy: check the picture and its preprocessing."
            )
