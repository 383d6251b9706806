"""Find the image tokens of a prompt, and check that the pixels fit them.

    input_ids or inputs_embeds, pixel_values --find_images--> bool (B, T), True at image tokens; None without images

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

MARKS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
LLAVAS = ("llava", "dpvr_llava")
FIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")  # every image has the same number of tokens


def mark_ids(config: PretrainedConfig) -> list[int]:
    """The ids of the tokens that stand for images and videos in a prompt."""
    return sorted({getattr(config, name, None) for name in MARKS} - {None})


def image_marks(owner: nn.Module, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """bool (B, T), True at the tokens of images and videos, given as ids or as embeddings."""
    marks = mark_ids(owner.config)
    if input_ids is not None:
        return torch.stack([input_ids == mark for mark in marks]).any(0)
    embed = owner.get_input_embeddings()
    table = embed(torch.tensor(marks, device=inputs_embeds.device))
    return torch.stack([(inputs_embeds == row).all(-1) for row in table]).any(0)


def find_images(owner: nn.Module, arguments: dict[str, Any]) -> torch.Tensor | None:
    """The image tokens of a chunk, bool (B, T), or None if there are none.

    A single id with a cache and no pixels is taken for a decoded text token and not looked at: that would synchronise
    with the device in every step.

    Args:
        owner: the vision-language model whose forward gets `arguments`.

    Raises:
        ValueError: for image tokens and pixels that do not match, and pixels that are not finite.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        given = "Neither" if ids is None else "Both"
        raise ValueError(f"{given} of input_ids and inputs_embeds came: pass exactly one of them.")
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
        marks = " or ".join(map(str, mark_ids(owner.config)))
        raise ValueError(
            f"The prompt has {num_tokens} image tokens (id {marks}), and {given} images came with it: make both with "
            "the processor, with one <image> mark per image."
        )
    _check_pixels(pixels)
    if (per_image := _tokens_of_images(owner.config, arguments)) is not None:
        _check_counts(image_mask.sum(1).tolist(), per_image)
    return image_mask


def tokens_per_image(config: PretrainedConfig, arguments: dict[str, Any]) -> int | None:
    """The number of tokens of each image in a LLaVA, from the shape of its tower; None if images differ in it.

    `image_seq_length` is not used, as many configs leave it at its default.
    """
    vision = config.vision_config
    if config.model_type not in LLAVAS or vision.model_type not in FIXED_TOWERS:
        return None
    patches = (vision.image_size // vision.patch_size) ** 2
    strategy = arguments.get("vision_feature_select_strategy") or config.vision_feature_select_strategy
    return patches + (vision.model_type == "clip_vision_model") - (strategy == "default")


def images_per_row(image_mask: torch.Tensor, tokens: int) -> list[int]:
    """The number of images in each row of bool (B, T), with `tokens` tokens per image."""
    return (image_mask.sum(1) // tokens).tolist()


def _tokens_of_images(config: PretrainedConfig, arguments: dict[str, Any]) -> list[int] | None:
    """The number of tokens of each image, from its features or from a tower of fixed shape; None if it is not known.

    It is not known for a single piece of features: a prefill in chunks passes these, and a chunk may end in an image.
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
            f"pixel_values have the shape {tuple(pixels.shape)}, but (images, channels, height, width) is needed: "
            "make them with the processor of this model."
        )
    return [tokens] * len(pixels)


def _check_counts(counts: list[int], per_image: list[int]) -> None:
    """Raise ValueError unless the image tokens of every row, `counts`, are those of whole images."""
    image_ends = set(torch.tensor([0, *per_image]).cumsum(0).tolist())
    row_ends = torch.tensor(counts).cumsum(0).tolist()
    if row_ends[-1] != sum(per_image) or not image_ends.issuperset(row_ends):
        raise ValueError(
            f"The rows have {counts} image tokens, but {len(per_image)} images of {sorted(set(per_image))} tokens "
            f"have {sum(per_image)}: use the processor of this model, with one image per <image> mark, and do not "
            "truncate inside an image."
        )


def _check_pixels(pixels: list[torch.Tensor]) -> None:
    for values in pixels:
        finite = int(torch.isfinite(values).sum())
        if finite != values.numel():
            raise ValueError(
                f"{values.numel() - finite} of {values.numel()} pixel_values are NaN or infinite: check the picture "
                "and its preprocessing."
            )
